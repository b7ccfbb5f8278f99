"""Run folders after a power failure, or from a stranger: what is whole is used, what is not is named."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.evidence.results import report
from ecl_hf.learning.finite import check_saved, check_weights
from ecl_hf.runs.checkpoints import find_defect, seal
from ecl_hf.runs.folder import Progress, RunFolder, write_atomically
from ecl_hf.runs.recipe import Recipe, read_yaml

TAILS = {
    "half a line": b'{"epoch": 3, "lo',
    "NULs": b"\0" * 300,
    "binary": bytes(range(256)),
    "list": b"[1, 2]\n",
    "no epoch": b'{"loss": 1.0}\n',
    "text for an epoch": b'{"epoch": "x"}\n',
    "deep": b"[" * 100_000,
    "huge number": b'{"epoch": 1' + b"0" * 5000 + b"}\n",
    "a line again": b'{"epoch": 2, "loss": 1.0}\n',
}


@pytest.fixture
def logged(tmp_path):
    run = RunFolder(tmp_path)
    for epoch in (1, 2):
        run.log({"epoch": epoch, "loss": 0.5})
    return run


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_damaged_log_is_cut_back(logged, tail):
    whole = logged.metrics_file.read_bytes()
    logged.metrics_file.write_bytes(whole + tail)
    said = []
    logged.mend_log(Progress(epoch=2), said.append)
    assert logged.metrics_file.read_bytes() == whole
    assert len(said) == 1
    assert "metrics.jsonl, line 3 is damaged: cut back to 2 epochs" in said[0]
    logged.log({"epoch": 3})
    assert [entry["epoch"] for entry in logged.read_log()[0]] == [1, 2, 3]
    logged.mend_log(Progress(epoch=3), said.append)
    assert len(said) == 1


@pytest.mark.parametrize("left", [None, "", '{"epoch": 2}\n'])
def test_lost_log_is_said(logged, left):
    logged.metrics_file.unlink()
    if left is not None:
        logged.metrics_file.write_text(left)
    said = []
    logged.mend_log(Progress(epoch=2, batch=3), said.append)
    assert len(said) == 1
    assert f"metrics.jsonl lacks {1 if left else 2} epochs that the checkpoint knows" in said[0]
    logged.log({"epoch": 3})
    assert logged.read_log()[0][-1] == {"epoch": 3}


@pytest.mark.parametrize("odd", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda _: None])
def test_log_that_is_no_file_begins_anew(logged, odd):
    logged.metrics_file.unlink()
    odd(logged.metrics_file)
    logged.mend_log(Progress(epoch=2), lambda _: None)
    logged.log({"epoch": 3})
    assert logged.metrics_file.read_text() == '{"epoch": 3}\n'


def finish(run):
    model = ECLForImageClassification(ECLConfig(architecture="test_resnet", num_experts=2, class_counts=[3, 1]))
    run.finish(model, lambda folder: (folder / "README.md").write_text("card"), {"finished": True})
    run.checkpoints.mkdir()


def flip(file):
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), flip, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00002.safetensors", "SHA256SUMS"])
def test_damaged_model_is_not_finished(name, harm, tmp_path):
    run = RunFolder(tmp_path)
    finish(run)
    (run.model / "README.md").write_text("a card of one's own")
    assert run.finished
    harm(run.model / name)
    assert not run.finished
    said = []
    with pytest.raises(ValueError, match="has results, but no checkpoint to go on from"):
        run.resumable_checkpoint(said.append)
    assert "the model of the finished run is not whole" in said[0]


def test_all_that_is_published_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """A power failure would else leave empty files and a run that says that it is finished."""
    run, brought, fsync = RunFolder(tmp_path.resolve()), [], os.fsync

    def note(descriptor):
        brought.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def card(folder):
        (folder / ".eval_results").mkdir()
        for name in ("README.md", "class_counts.png", ".eval_results/photos.yaml"):
            (folder / name).write_text("x")

    monkeypatch.setattr(os, "fsync", note)
    model = ECLForImageClassification(ECLConfig(architecture="test_resnet", num_experts=2, class_counts=[3, 1]))
    run.finish(model, card, {"finished": True}, "class\n")
    partial = run.path / ".model.partial"
    published = {str(partial), *(str(partial / path.relative_to(run.model)) for path in run.model.rglob("*"))}
    assert len(published) > 10
    rename = brought.index(str(run.path))
    assert set(brought[:rename]) == published
    assert brought[rename + 1 :] == [str(run.path / f".{name}.partial") for name in ("classes.csv", "results.json")]


@pytest.mark.parametrize("name", ["weights", "progress.json", "SHA256SUMS"])
def test_pipe_in_a_checkpoint_is_a_defect(name, tmp_path):
    for file in ("weights", "progress.json"):
        (tmp_path / file).write_text("x")
    seal(tmp_path)
    assert find_defect(tmp_path) is None
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert re.search(rf"{name} is no regular file", find_defect(tmp_path))


def test_sparse_terabytes_are_not_hashed(tmp_path):
    run = RunFolder(tmp_path)
    finish(run)
    os.truncate(run.model / "model-00001-of-00002.safetensors", 1 << 40)
    assert not run.finished
    assert re.search(r"model have 1099\d+ bytes; more than \d+ are not read", run.find_damage())
    for step in (1, 2):
        partial = run.partial_checkpoint(step)
        partial.mkdir()
        (partial / "optimizer.bin").write_bytes(b"numbers")
        run.publish_checkpoint(Progress(step=step), keep_last=2)
    os.truncate(run.newest_checkpoint() / "optimizer.bin", run.most)
    said = []
    assert run.resumable_checkpoint(said.append).name == "step_00000001"
    assert re.search(r"step_00000002: it can't be read: .* more than \d+ are not read", said[1])


@pytest.mark.parametrize("name", ["../model-00001-of-00002.safetensors", "/dev/zero", "", "./config.json"])
def test_seals_are_about_files_beside_them(name, tmp_path):
    run = RunFolder(tmp_path)
    finish(run)
    with (run.model / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    assert "which is no file beside it" in run.find_damage()


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", '{"finished": tr', "[" * 100_000, '{"finished": "yes"}', "\0\xff"]
)
def test_results_that_are_none(text, tmp_path):
    run = RunFolder(tmp_path)
    finish(run)
    run.results_file.write_text(text)
    assert not run.finished
    with pytest.raises(ValueError, match=r"results\.json"):
        report(run)


SIZES = {"stage_epochs": [1, 2], "images": 11, "batch_size": 2, "accumulation": 1}
GOOD = asdict(Progress(stage=1, epoch=2, batch=2, step=12, seconds=3, sums={"loss": 1.0}, broken=["train row 1"]))
NONSENSE = {
    "step": [-5, 10**9, "x", 2.5, None, True, 0, 11, 13],
    "epoch": [-1, 10**9, "1", 0, 1, 3],
    "batch": [-1, 10**9, 3, 0, 5],
    "stage": [2, -1, 0],
    "sums": [[1], {"loss": float("nan")}, {"loss": "x"}, {"loss": 10**400}, {"stage": 1.0}, {"lr": 1.0}],
    "seconds": ["x", float("nan"), -1.0],
    "skipped": [-9, 10**9],
    "missing": [2, 3],
    "images": [12, -1],
    "batch_size": [1, 4],
    "best": [0.5],
    "best_epoch": [1],
    "broken": [7, [7]],
    "commit": [7],
    "evil": [1],
}
WRONG = "not know|within an epoch|not the end|outside of the recipe's|left out|sums can't|best score"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values])
def test_progress_is_read_strictly(name, value, tmp_path):
    file = tmp_path / "progress.json"
    for good in (GOOD, GOOD | {"images": 11, "batch_size": 2, "best": 0.5, "best_epoch": 2}):
        file.write_text(json.dumps(good))
        Progress.read(file).check(**SIZES)
    file.write_text(json.dumps(GOOD | {name: value}))
    with pytest.raises(ValueError, match=f"json: {name} can't be|{WRONG}"):
        Progress.read(file).check(**SIZES)


@pytest.mark.parametrize(
    "place",
    [
        {"step": 10, "batch": 10},  # nothing is left of the epoch: a training would wait for its next batch for ever
        {"step": 5, "batch": 5},
        {"epoch": 2, "step": 3},
        {"epoch": 1, "step": 0},
        {"step": 5},
        {"stage": 1},
        {"epoch": 2, "step": 10, "sums": {"loss": 1.0}},
        {"epoch": 1, "step": 5, "best": 0.5, "best_epoch": 2},
    ],
)
def test_places_where_no_run_can_stand(place):
    with pytest.raises(ValueError, match=WRONG):
        Progress(**place).check([2, 1], images=11, batch_size=2, accumulation=1)


@pytest.mark.parametrize("changed", [{"accumulation": 2}, {"batch_size": 3}, {"images": 9}, {"images": 10}])
def test_other_sizes_continue_at_the_end_of_an_epoch_alone(changed):
    sizes = {"stage_epochs": [3], "images": 11, "batch_size": 2, "accumulation": 1}
    known = {"images": 11, "batch_size": 2}
    for within in (Progress(batch=4, step=4, **known), Progress(epoch=1, batch=4, step=9, **known)):
        within.check(**sizes)
        with pytest.raises(ValueError, match="it stands within an epoch"):
            within.check(**sizes | changed)
    Progress(epoch=1, step=5, **known).check(**sizes | changed)


def test_steps_are_counted_as_those_of_the_new_sizes():
    at_end = Progress(epoch=2, step=10, images=11, batch_size=2).counted_anew(images=11, batch_size=4)
    assert (at_end.epoch, at_end.step, at_end.batch_size) == (2, 4, 4)
    assert Progress(batch=3, step=3).counted_anew(11, 2).step == 3


def test_folder_of_a_run_that_was_killed_at_once_can_begin(tmp_path):
    (tmp_path / ".recipe.yaml.partial").write_text("method: e")
    (tmp_path / ".lock").touch()
    run = RunFolder(tmp_path)
    run.open(Recipe(), resume=True)
    run.close()
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", [".lock", ".recipe.yaml.partial"])
def test_links_lead_to_no_other_file(name, tmp_path):
    (tmp_path / "precious").write_text("years of work")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / name).symlink_to(tmp_path / "precious")
    if name == ".lock":
        with pytest.raises(FileExistsError, match=r"\.lock is no lock but a link"):
            run.open(Recipe())
    else:
        run.open(Recipe())
        write_atomically(run.metrics_file, "x")
        run.close()
    assert (tmp_path / "precious").read_text() == "years of work"


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [BOMB.encode(), "seed: 1".encode("utf-16"), b"method: \xe9", b"\0" * 9, b"[" * 2_000, b"x: " + b"y" * (2 << 20)],
    ids=["bomb", "utf-16", "latin-1", "NUL", "deep", "huge"],
)
def test_recipe_files_of_strangers(content, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        read_yaml(tmp_path / "bad.yaml")


def test_infinite_statistics_and_other_types_are_noticed(tmp_path):
    norm = torch.nn.BatchNorm2d(3)
    norm.running_var[1] = torch.inf
    with pytest.raises(FloatingPointError, match="running_var"):
        check_weights(norm)
    state = norm.state_dict() | {"weight": torch.ones(3, dtype=torch.int8)}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors holds weight as torch\.int8, not torch\.float32"):
        check_saved(tmp_path / "model.safetensors", norm)
