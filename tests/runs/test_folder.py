"""The run folder: when a run may start, which checkpoint counts, and what is written about it."""

import json
import os
import platform
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.data.config import DataConfig
from ecl_hf.learning.config import ModelConfig, OptimConfig, TrainConfig
from ecl_hf.methods.ecl import ECLSettings
from ecl_hf.runs.folder import (
    Forecast,
    Progress,
    RunFolder,
    describe_environment,
    describe_model,
    epoch_line,
    flatten,
    write_atomically,
)
from ecl_hf.runs.recipe import Recipe


def begun(path, recipe=None):
    run = RunFolder(path)
    run.check(recipe or Recipe(), resume=False)
    run.open(recipe or Recipe())
    run.close()
    return run


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("place", ["new", "deep/er/new", "empty"])
def test_free_place_is_accepted_and_only_then_made(place, resume, tmp_path):
    (tmp_path / "empty").mkdir()
    run = RunFolder(str(tmp_path / place))
    run.check(Recipe(seed=3), resume)
    assert run.path.exists() == (place == "empty")
    run.open(Recipe(seed=3))
    run.close()
    assert Recipe.from_file(run.path / "recipe.yaml") == Recipe(seed=3)
    assert list(run.path.iterdir()) == [run.path / "recipe.yaml"]


def test_used_folder_needs_resume(tmp_path):
    run = begun(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"run holds a run already.*--resume"):
        run.check(Recipe(), resume=False)
    run.check(Recipe(), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_file_and_foreign_folder_are_refused_and_kept(resume, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    for place, message in (("file", "file is not a directory"), ("other", "other is not empty")):
        with pytest.raises(FileExistsError, match=message):
            RunFolder(tmp_path / place).check(Recipe(), resume)
    assert (tmp_path / "file").read_text() == "text"
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_place_below_a_file_can_not_be_opened(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match="file"):
        RunFolder(tmp_path / "file" / "run").open(Recipe())


def test_changed_recipe_is_refused_by_key(tmp_path):
    run = begun(tmp_path / "run", Recipe(seed=1))
    changed = Recipe(
        seed=2,
        optim=OptimConfig(lr=0.02),
        model=ModelConfig(image_size=16),
        data=DataConfig(num_workers=3),
        train=TrainConfig(max_steps=5),
    )
    with pytest.raises(ValueError, match="another recipe") as caught:
        run.check(changed, resume=True)
    said = str(caught.value).split("resume: ")[1].split("; ")[:-1]
    assert said == ["model.image_size: None -> 16", "optim.lr: 0.01 -> 0.02", "seed: 1 -> 2"]
    assert Recipe.from_file(run.recipe_file) == Recipe(seed=1)


def test_finished_run_keeps_its_recipe(tmp_path):
    run = begun(tmp_path / "run", Recipe(epochs=3))
    run.check(Recipe(epochs=5), resume=True, changed=True)
    run.results_file.write_text('{"finished": true}')
    with pytest.raises(ValueError, match=r"is finished, with another recipe: epochs: 3 -> 5; train in another"):
        run.open(Recipe(epochs=5), resume=True, changed=True)
    run.close()
    assert Recipe.from_file(run.recipe_file) == Recipe(epochs=3)


def test_key_of_another_version_is_named(tmp_path):
    run = begun(tmp_path / "run")
    tree = yaml.safe_load(run.recipe_file.read_text())
    tree["loss"]["gamma"] = 2.0
    run.recipe_file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"recipe\.yaml.*loss\.gamma is no setting"):
        run.check(Recipe(), resume=True)


def test_key_that_an_older_recipe_lacks_had_its_default(tmp_path):
    run = begun(tmp_path / "run")
    tree = yaml.safe_load(run.recipe_file.read_text())
    del tree["loss"]["tau"], tree["hub"]
    run.recipe_file.write_text(yaml.safe_dump(tree))
    run.check(Recipe(), resume=True)
    with pytest.raises(ValueError, match=r"resume: loss\.tau: 1\.0 -> 0\.5; "):
        run.check(Recipe(loss=ECLSettings(tau=0.5)), resume=True)


FREE = {
    "train.max_steps": 100,
    "train.checkpoint_every": 1,
    "train.keep_last": 9,
    "train.on_nonfinite": "skip",
    "train.timeout": 5.0,
    "train.connect_timeout": 2.0,
    "train.gradient_checkpointing": True,
    "train.experts_one_by_one": True,
    "model.teacher": "/mnt/elsewhere",
    "data.path": "/mnt/elsewhere",
    "data.train_list": "/mnt/elsewhere/train.txt",
    "data.test_list": "/mnt/elsewhere/test.txt",
    "data.split": "/mnt/elsewhere/split",
    "data.num_workers": 4,
    "data.on_error": "skip",
    "hub.push": True,
    "hub.repo_id": "me/model",
    "hub.private": True,
    "hub.every": 5,
    "hub.license": "mit",
}


@pytest.fixture(scope="module")
def once_begun(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("begun") / "run")


@pytest.mark.parametrize("key", flatten(asdict(Recipe())))
def test_only_keys_without_influence_may_change(key, once_begun):
    """Every key is changed by itself, past the checks of its type: the folder compares values."""
    run = once_begun
    section, _, name = key.rpartition(".")
    value = FREE.get(key, "changed")
    recipe = Recipe()
    setattr(getattr(recipe, section) if section else recipe, name, value)
    if key in FREE:
        run.check(recipe, resume=True)
    else:
        with pytest.raises(ValueError, match=rf"resume: {key}: .+ -> changed; "):
            run.check(recipe, resume=True)


def test_free_keys_may_change_together(tmp_path):
    run = begun(tmp_path / "run")
    train = TrainConfig(max_steps=100, checkpoint_every=1, keep_last=9)
    recipe = Recipe(data=DataConfig(path="/mnt/elsewhere", num_workers=4), train=train)
    run.check(recipe, resume=True)
    run.open(recipe, resume=True)
    assert Recipe.from_file(run.recipe_file) == recipe


def publish(run, step, keep_last=2, content="weights", **progress):
    partial = run.partial_checkpoint(step)
    partial.mkdir(parents=True)
    (partial / "state").write_text(content)
    run.publish_checkpoint(Progress(step=step, **progress), keep_last)


def steps(run):
    return sorted(run.read_progress(path).step for path in run.checkpoints.iterdir())


def test_without_checkpoints_there_is_none_to_resume_from(tmp_path):
    assert RunFolder(tmp_path).newest_checkpoint() is None
    (tmp_path / "checkpoints").mkdir()
    assert RunFolder(tmp_path).newest_checkpoint() is None


def test_progress_is_read_back(tmp_path):
    run = RunFolder(tmp_path)
    progress = Progress(epoch=3, batch=7, seconds=0.1, total_seconds=1e3 / 7, sums={"loss": 2 / 3, "logit": 1e-9})
    publish(run, 41, **{key: value for key, value in asdict(progress).items() if key != "step"})
    newest = run.newest_checkpoint()
    assert run.read_progress(newest) == replace(progress, step=41)
    assert (newest / "state").read_text() == "weights"


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [1000]), (2, [999, 1000]), (3, [20, 999, 1000]), (9, None)])
def test_newest_checkpoints_are_kept(keep_last, kept, tmp_path):
    run, all_steps = RunFolder(tmp_path), [7, 20, 999, 1000]
    for n, step in enumerate(all_steps, 1):
        publish(run, step, keep_last)
        assert run.read_progress(run.newest_checkpoint()).step == step
        assert len(steps(run)) == min(n, keep_last)
    assert steps(run) == (kept or all_steps)


def test_partial_checkpoint_never_counts(tmp_path):
    run = RunFolder(tmp_path)
    partial = run.partial_checkpoint(30)
    partial.mkdir(parents=True)
    (partial / "progress.json").write_text(json.dumps(asdict(Progress(step=30))))
    assert run.newest_checkpoint() is None
    for step in (10, 20):
        publish(run, step, keep_last=1)
        assert run.read_progress(run.newest_checkpoint()).step == step
    assert partial.exists()


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    run = RunFolder(tmp_path)
    publish(run, 5, content="old", batch=2)
    publish(run, 5, content="new", batch=3)
    assert steps(run) == [5]
    assert (run.newest_checkpoint() / "state").read_text() == "new"
    assert run.read_progress(run.newest_checkpoint()).batch == 3


def logged(run):
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("epochs", "left"),
    [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 2], [1, 2]), ([1, 1, 1], [1]), ([8, 9, 10, 11, 9], [8, 9]), ([1, 2, 1], [1])],
)
def test_log_replaces_lines_of_the_same_and_later_epochs(epochs, left, tmp_path):
    run = RunFolder(tmp_path)
    for n, epoch in enumerate(epochs):
        run.log({"epoch": epoch, "loss": n + 0.1})
    last = {epoch: n + 0.1 for n, epoch in enumerate(epochs)}
    assert logged(run) == [{"epoch": epoch, "loss": last[epoch]} for epoch in left]
    assert run.metrics_file.read_text().endswith("}\n")


def test_line_holds_means_and_speed():
    progress = Progress(epoch=4, batch=8, step=100, seconds=2.5, total_seconds=90.0, sums={"loss": 12.0, "logit": 2.0})
    assert progress.line("heads", lr=0.05, images_per_batch=30) == {
        "epoch": 5,
        "stage": "heads",
        "step": 100,
        "loss": 1.5,
        "logit": 0.25,
        "images_per_second": 96.0,
        "lr": 0.05,
    }
    assert progress.sums == {"loss": 12.0, "logit": 2.0}


def test_next_epoch_starts_anew():
    progress = Progress(epoch=4, batch=8, step=100, seconds=2.5, total_seconds=90.0, commit="c", sums={"loss": 12.0})
    assert progress.next_epoch() == Progress(epoch=5, step=100, total_seconds=92.5, commit="c")
    assert Progress().next_epoch() == Progress(epoch=1)
    first, second = progress.next_epoch(), progress.next_epoch()
    first.sums["loss"] = 1.0
    assert second.sums == {}


def test_updates_of_a_stage_leave_out_its_skipped_steps():
    progress = Progress(epoch=4, step=100, skipped=3).next_stage()
    assert (progress.stage, progress.updates_since(100)) == (1, 0)
    progress.step, progress.skipped = 110, 5
    assert progress.updates_since(100) == 8


class FakeModel:
    def __init__(self, content, fails=False):
        self.content, self.fails = content, fails

    def save_pretrained(self, directory):
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "weights").write_text(self.content)
        if self.fails:
            raise OSError("no space left")


def card(text):
    return lambda directory: (directory / "README.md").write_text(text)


def test_finish_writes_the_model_and_then_the_results(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.finished
    run.finish(FakeModel("half way"), card("half way"), {"finished": False, "top1": 0.5})
    assert not run.finished
    with pytest.raises(OSError, match="no space"):
        run.finish(FakeModel("broken", fails=True), card("broken"), {"finished": True})
    assert (tmp_path / "model" / "weights").read_text() == "half way"
    assert json.loads((tmp_path / "results.json").read_text()) == {"finished": False, "top1": 0.5}
    run.finish(FakeModel("final"), card("final"), {"finished": True, "top1": 0.75})
    assert run.finished
    assert (tmp_path / "model" / "weights").read_text() == "final"
    assert (tmp_path / "model" / "README.md").read_text() == "final"
    assert json.loads((tmp_path / "results.json").read_text())["top1"] == 0.75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "results.json"]


def test_failed_write_leaves_the_old_content(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_atomically(file, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new " * 1000 + "\udc80")  # a lone surrogate can't be encoded
    assert file.read_text() == "old\n"
    write_atomically(file, "new\n")
    assert file.read_text() == "new\n"
    assert list(tmp_path.iterdir()) == [file]


def test_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_atomically(file, "old")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(file, "new")
    assert file.read_text() == "old"


def test_flatten():
    tree = {"a": 1, "b": {"c": None, "d": {"e": [1, 2]}}, "f": "x"}
    assert flatten(tree) == {"a": 1, "b.c": None, "b.d.e": [1, 2], "f": "x"}
    assert flatten(asdict(ECLSettings()), "loss.")["loss.tau"] == 1.0


def test_environment_of_a_run():
    found = describe_environment(2, torch.device("cpu"))
    assert found["versions"]["python"] == platform.python_version()
    assert torch.__version__.split("+")[0] == found["versions"]["torch"].split("+")[0]
    assert {"ecl-hf", "timm", "transformers", "datasets", "accelerate"} < found["versions"].keys()
    assert found["machine"]["processes"] == 2
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["cpu_cores"] == os.cpu_count()
    assert found["machine"]["threads_per_process"] == torch.get_num_threads()
    json.dumps(found)


def test_commit_is_that_of_the_package(monkeypatch):
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    expected = git.stdout.strip() if git.returncode == 0 else None
    monkeypatch.chdir("/")
    commit = describe_environment(1, torch.device("cpu"))["commit"]
    assert (commit and commit.removesuffix("-dirty")) == expected
    monkeypatch.setenv("PATH", "")  # no git
    assert describe_environment(1, torch.device("cpu"))["commit"] is None


def cifar_resnet(depth, size, num_classes):
    """Parameters and multiply-accumulates of one expert by hand: He et al. 2016, Sec. 4.2, and a linear classifier."""
    parameters, macs = 9 * 3 * 16 + 2 * 16, size * size * 9 * 3 * 16
    width = 16
    for stage, out in enumerate((16, 32, 64)):
        side = size // 2**stage
        for _ in range((depth - 2) // 6):
            weights = 9 * width * out + 9 * out * out
            parameters += weights + 2 * 2 * out
            macs += side * side * weights
            width = out
    return parameters + 64 * num_classes + num_classes, macs + 64 * num_classes


@pytest.mark.parametrize(
    ("depth", "size", "experts", "num_classes"), [(20, 16, 1, 10), (20, 16, 3, 7), (20, 32, 2, 100), (32, 32, 1, 100)]
)
def test_parameters_and_operations(depth, size, experts, num_classes):
    config = ECLConfig(
        architecture=f"resnet{depth}_cifar",
        num_experts=experts,
        class_counts=[1] * num_classes,
        pretrained_cfg={"input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3},
    )
    parameters, macs = cifar_resnet(depth, size, num_classes)
    assert describe_model(ECLForImageClassification(config)) == {
        "parameters": experts * parameters,
        "parameters_per_expert": parameters,
        "macs": experts * macs,
        "macs_per_expert": macs,
    }


def test_a_line_for_each_epoch():
    line = {"epoch": 7, "stage": "training", "loss": 2.3456, "images_per_second": 411.6, "lr": 0.0486}
    assert epoch_line(line, 200, 3661.4) == (
        "epoch   7/200  training  loss 2.346  lr 0.049  412 images/s  1:01:01 left"
    )
    assert "val/balanced 45.2 %" in epoch_line(line | {"val/balanced": 0.452, "val/few": None}, 200, 0)


def test_forecast_of_the_first_steps():
    forecast = Forecast(steps=5)
    times = [10.0, 20.0, 20.5, 21.0, 21.5, 22.0, 22.5, 23.0]  # two slow steps warm up
    said = [forecast.step(now, 7200 - step) for step, now in enumerate(times, 1)]
    assert said[:6] == [None] * 6
    assert said[6] == "the training will take about 0:59:56 (h:mm:ss)"
    assert said[7] is None
    assert forecast.left(24.0, 1000) == 4.0 / 6 * 1000
    slow = Forecast()
    assert [bool(slow.step(30.0 * step, 90)) for step in range(1, 8)] == [False] * 4 + [True] + [False] * 2
    quick = Forecast(steps=3)
    assert [quick.step(0.1 * step, 500) for step in range(10)] == [None] * 10
