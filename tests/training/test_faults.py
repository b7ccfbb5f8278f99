"""What happens to trainings: they are killed, asked to stop, starved of memory and disk, and given bad numbers."""

import json
import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ecl_hf.runs.folder import RunFolder
from ecl_hf.runs.interruption import STOPPED
from tests import faults
from tests.children import TINY, context, start, start_connected

pytestmark = pytest.mark.slow


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in (run / "model").glob("*.safetensors") for key, value in load_file(file).items()}


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def assert_same(ours: Path, theirs: Path) -> None:
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    states = [load_file(run / "checkpoints" / "step_00000012" / "model.safetensors") for run in (ours, theirs)]
    assert "queue.keys" in states[0]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    results = [json.loads((run / "results.json").read_text()) for run in (ours, theirs)]
    assert results[0]["test"] == results[1]["test"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    child = start(folder)
    assert child.wait() == 0, child.said
    return folder


def test_killed_at_any_moment_the_run_is_the_same(undisturbed, tmp_path):
    """Twelve steps with checkpoints after the sixth and the last; every training but the last dies."""
    run = tmp_path / "run"
    for fault, left in (
        (partial(faults.kill_in_write, 1), []),
        (partial(faults.kill_between_epochs, 1), [6]),
        (partial(faults.kill_in_step, 3), [6]),
        (partial(faults.kill_in_seal, 1), [6]),
    ):
        child = start(run, "--resume", fault=fault)
        assert child.wait() == -signal.SIGKILL, child.said
        assert steps(run) == left
        if left:
            assert RunFolder(run).resumable_checkpoint().name == "step_00000006"
        assert not (run / "results.json").exists()
    child = start(run, "--resume")
    assert child.wait() == 0, child.said
    assert "continuing after step 6" in child.said
    assert_same(run, undisturbed)
    left = [path.name for path in run.rglob(".*")]
    assert left == []  # neither halves nor the lock


def test_killed_in_any_stage_between_them_or_in_finish_the_run_is_the_same(tmp_path):
    """Two stages of an epoch each, a sampler, mixed pictures, and scales that fold into the classifier."""
    own = [flag for flag in TINY if not flag.startswith(("--loss", "--model.num_experts"))]
    train = partial(start, tiny=[*own, "--method=mislas", "--stage_epochs=[1,1]"])
    whole, run = tmp_path / "whole", tmp_path / "run"
    child = train(whole)
    assert child.wait() == 0, child.said
    for fault, left in (
        (partial(faults.kill_in_step, 3), []),
        (partial(faults.kill_between_stages, 2), [6]),
        (partial(faults.kill_in_step, 2), [6]),  # of the second stage
        (faults.kill_in_finish, [6, 12]),
    ):
        child = train(run, "--resume", fault=fault)
        assert child.wait() == -signal.SIGKILL, child.said
        assert steps(run) == left
    child = train(run, "--resume")
    assert child.wait() == 0, child.said
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    tests = [json.loads((folder / "results.json").read_text())["test"] for folder in (run, whole)]
    assert tests[0] == tests[1]


def test_run_that_is_asked_to_stop_continues_as_if_it_had_not_been(undisturbed, tmp_path):
    """Its loading processes get the signal too."""
    run, flags = tmp_path / "run", ["--resume", "--data.num_workers=1"]
    for number, calls, step in ((signal.SIGTERM, 3, 3), (signal.SIGINT, 5, 8)):
        child = start(run, *flags, fault=partial(faults.ask_to_stop, calls, number))
        assert child.wait() == STOPPED == 75, child.said
        assert f"stopped after step {step}" in child.said
        assert child.errors == []
        assert steps(run)[-1] == step
    child = start(run, *flags)
    assert child.wait() == 0, child.said
    assert_same(run, undisturbed)


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(undisturbed, tmp_path):
    run = tmp_path / "run"
    child = start(run, "--train.max_steps=8")
    assert child.wait() == 0, child.said
    file = run / "checkpoints" / "step_00000008" / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-100])
    child = start(run, "--resume")
    assert child.wait() == 0, child.said
    assert "step_00000008: optimizer.bin is damaged" in child.said
    assert "continuing after step 6" in child.said
    assert_same(run, undisturbed)


def test_killed_loading_process_ends_the_run_with_one_sentence(tmp_path):
    child = start(tmp_path / "run", "--data.num_workers=1", fault=partial(faults.kill_loading_process, 8))
    assert child.wait() == 1
    [line] = child.errors
    assert "a data-loading process was killed" in line
    assert "Traceback" not in child.said
    assert steps(tmp_path / "run") == [6]


@pytest.mark.parametrize(
    ("on_error", "message"),
    [
        (
            "raise",
            r"error: train row \d+, class \d/\d+\.png: the file is not there; data\.on_error skip goes on without it",
        ),
        ("skip", "error: none of the 80 train pictures can be decoded"),
    ],
)
def test_vanished_data_directory_is_named(on_error, message, tmp_path):
    photos = tmp_path / "photos"
    for n in range(100):
        file = photos / f"class {n % 2}" / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (n, n, n)).save(file)
    flags = [f"--data.path={photos}", "--data.profile=as_is", "--data.test_fraction=0.2", f"--data.on_error={on_error}"]
    tiny = [flag for flag in TINY if not flag.startswith(("--data.imbalance_factor", "--data.max_count"))]
    child = start(tmp_path / "run", *flags, tiny=tiny, fault=partial(faults.vanish, photos, 6))
    assert child.wait() == 1, child.said
    [line] = child.errors
    assert re.fullmatch(message, line), line
    assert steps(tmp_path / "run") == [5]


@pytest.mark.parametrize("fault", [faults.full_disk, faults.small_files])
def test_full_disk_leaves_the_last_checkpoint(fault, tmp_path):
    child = start(tmp_path / "run", "--data.num_workers=0", fault=partial(fault, 2))
    assert child.wait() == 1
    [line] = child.errors
    assert "run/checkpoints: " in line
    assert ("the disk is full" in line) == (fault is faults.full_disk)
    assert "Traceback" not in child.said
    assert RunFolder(tmp_path / "run").resumable_checkpoint().name == "step_00000006"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000006"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (faults.infinite_loss, ["the loss is not finite", "supervision is nan", "contrastive is nan"]),
        (faults.infinite_gradient, ["the gradient of model.experts.0.head.bias is not finite, though the loss is"]),
    ],
)
def test_bad_numbers_stop_before_the_optimiser_moves(fault, words, tmp_path):
    child = start(tmp_path / "run", fault=partial(fault, 8))
    assert child.wait() == 1
    [line] = child.errors
    assert "step 8 was not taken" in line
    assert all(word in line for word in words)
    assert "for training pictures [" in line
    assert RunFolder(tmp_path / "run").resumable_checkpoint().name == "step_00000006"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_with_bad_numbers_can_be_left_out(accumulation, tmp_path):
    run = tmp_path / "run"
    flags = ["--train.on_nonfinite=skip", f"--train.gradient_accumulation_steps={accumulation}"]
    child = start(run, *flags, "--train.max_steps=3", fault=partial(faults.infinite_loss, 3 * accumulation))
    assert child.wait() == 0, child.said
    two = start(tmp_path / "two", *flags, "--train.max_steps=2")
    assert two.wait() == 0, two.said
    results = json.loads((run / "results.json").read_text())
    assert results["skipped_steps"] == 1
    # The third step changed neither weights, running statistics, momentum encoders nor queues
    ours = load_file(run / "checkpoints" / "step_00000003" / "model.safetensors")
    theirs = load_file(tmp_path / "two" / "checkpoints" / "step_00000002" / "model.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    lines = [json.loads((folder / "metrics.jsonl").read_text()) for folder in (run, tmp_path / "two")]
    assert [line["loss"] for line in lines] == [lines[0]["loss"]] * 2
    assert lines[0]["lr"] == lines[1]["lr"]


def test_of_two_unconnected_trainings_one_is_refused(tmp_path):
    children = [start(tmp_path / "run", "--epochs=1", log=tmp_path / f"{n}.log") for n in range(2)]
    assert sorted(child.wait() for child in children) == [0, 1]
    [loser] = [child for child in children if child.process.exitcode == 1]
    [winner] = [child for child in children if child.process.exitcode == 0]
    assert (
        f'written by another training ({{"host": "{os.uname().nodename}", "pid": {winner.process.pid}}})' in loser.said
    )


def hold(folder: Path, ready: object) -> None:
    run = RunFolder(folder)
    run.path.mkdir()
    run.lock.acquire()
    ready.set()
    signal.pause()


def test_lock_names_its_holder_and_dies_with_it(tmp_path):
    folder, ready = tmp_path / "run", context.Event()
    process = context.Process(target=hold, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    run = RunFolder(folder)
    with pytest.raises(FileExistsError, match=rf'"host": "{os.uname().nodename}", "pid": {process.pid}'):
        run.lock.acquire()
    process.kill()
    process.join()
    assert run.lock.file.exists()
    run.lock.acquire()
    assert json.loads(run.lock.file.read_text())["pid"] == os.getpid()
    run.close()
    assert list(folder.iterdir()) == []
    run.close()


def test_processes_stop_after_the_same_step_and_continue_exactly(tmp_path):
    """One of two gets the signal; later one dies. BatchNorm's statistics differ between the two."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    children = start_connected(2, whole)
    assert [child.wait() for child in children] == [0, 0], children[0].said
    for rank, step in ((1, 2), (0, 8)):
        children = start_connected(2, run, "--resume", faults={rank: partial(faults.ask_to_stop, 2 + 4 * (rank == 0))})
        assert [child.wait() for child in children] == [STOPPED, STOPPED], [child.said for child in children]
        assert steps(run)[-1] == step
    children = start_connected(2, run, "--resume", faults={1: partial(faults.kill_in_step, 2)})
    assert [child.wait() for child in children] == [1, -signal.SIGKILL]
    [line] = children[0].errors
    assert "another process of this training has ended" in line
    assert "Traceback" not in children[0].said
    children = start_connected(2, run, "--resume")
    assert [child.wait() for child in children] == [0, 0], children[0].said
    assert_same(run, whole)


def test_process_that_does_not_answer_is_given_up(tmp_path):
    children = start_connected(2, tmp_path / "run", "--train.timeout=0.05", faults={1: partial(faults.hang, 8)})
    try:
        assert children[0].wait() == 1
    finally:
        children[1].process.kill()
    [line] = children[0].errors
    assert "does not answer" in line
    assert RunFolder(tmp_path / "run").resumable_checkpoint().name == "step_00000006"


@pytest.mark.parametrize("store", [False, True])
def test_process_that_is_killed_while_they_connect_is_soon_given_up(tmp_path, store):
    fault = {1: partial(faults.kill_while_connecting, store)}
    children = start_connected(2, tmp_path / "run", "--train.connect_timeout=0.1", faults=fault)
    assert [child.wait() for child in children] == [1, -signal.SIGKILL], children[0].said
    [line] = children[0].errors
    assert "another process of this training has ended or does not answer" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bad_numbers_of_one_process_concern_both(tmp_path):
    fault = {1: partial(faults.infinite_loss, 2)}
    children = start_connected(2, tmp_path / "skip", "--train.on_nonfinite=skip", "--train.max_steps=4", faults=fault)
    assert [child.wait() for child in children] == [0, 0], children[0].said
    assert json.loads((tmp_path / "skip" / "results.json").read_text())["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in weights(tmp_path / "skip").values())
    children = start_connected(2, tmp_path / "raise", faults=fault)
    assert [child.wait() for child in children] == [1, 1]
    assert "step 2 was not taken: the loss is not finite" in children[0].errors[0]
    assert children[1].errors == []
