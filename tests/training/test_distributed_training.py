"""Two processes on one machine train as one."""

import json
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import train
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from ecl_hf.learning.stages import check_stages
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from tests.children import TINY, begin, connections, start, start_connected

pytestmark = pytest.mark.slow
FLAGS = [
    "--method=ecl",
    "--data.source=digits",
    "--data.max_count=20",
    "--data.imbalance_factor=5",
    "--model.architecture=test_vit",  # LayerNorm: the statistics of BatchNorm would see half of the batch
    "--model.image_size=32",
    "--batch_size=16",
    "--epochs=2",
]


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").iterdir()) / "model.safetensors")


@pytest.mark.parametrize(
    ("flags", "accumulation"),
    [
        # LayerNorm; the statistics of BatchNorm would see half of the batch
        (["--model.architecture=test_vit", "--model.image_size=32"], 2),
        (["--train.sync_batchnorm=true"], 1),
        (["--train.sync_batchnorm=true", "--train.gradient_checkpointing=true", "--train.experts_one_by_one=true"], 1),
    ],
)
def test_two_processes_equal_one(flags, accumulation, tmp_path):
    """The smallest class has one picture, and the last 13 pictures of an epoch fill no batch."""
    flags = [*flags, "--epochs=1", "--data.max_count=25", "--data.imbalance_factor=25"]
    split = f"--train.gradient_accumulation_steps={accumulation}"
    one = start(tmp_path / "1", *flags)
    two = start_connected(2, tmp_path / "2", *flags, split)
    assert [child.wait() for child in (one, *two)] == [0, 0, 0], [child.said for child in (one, *two)]
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("1", "2")]
    assert [result["machine"]["processes"] for result in results] == [1, 2]
    assert results[0]["class_counts"][-1] == 1
    assert results[0]["steps"] == results[1]["steps"] == sum(results[0]["class_counts"]) // 16
    assert sum(results[0]["class_counts"]) % 16
    assert results[0]["test_images"] == results[1]["test_images"] == 400
    # Weights of experts and train-only branches, running statistics, momentum encoders and queues
    ours, theirs = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2")
    assert {"queue.keys", "queue.cursor", "momentum.0.projector.0.weight"} < ours.keys()
    assert ours["queue.cursor"] == results[0]["steps"] * 16 % 40
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for flip, parts in results[0]["test"].items():
        assert parts["ensemble"] == pytest.approx(results[1]["test"][flip]["ensemble"], abs=1e-5)
    lines = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1]) for n in ("1", "2")]
    for name in ("loss", "supervision", "reference", "logit", "feature", "contrastive"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-5)


LAYERNORM = ["--model.architecture=test_vit", "--model.image_size=32", "--model.num_experts=1"]
TSC = ["--loss.queue_size=40", "--loss.projection_dim=10", "--loss.classifier_lr=1"]


@pytest.mark.parametrize(
    ("method", "flags", "equal"),
    [
        ("tsc", [*LAYERNORM, *TSC, "--loss.positives=0"], True),
        ("hybrid_psc", LAYERNORM, True),
        ("cam", ["--model.num_experts=1"], False),
    ],
)
def test_methods_with_parts_of_their_own_train_in_two_processes(method, flags, equal, tmp_path):
    """They go through all their stages; where no process draws numbers of its own, with the weights of one process.

    TSC moves centroids and targets after each step by the sums of all processes, and takes all positives here, since
    each process draws its own. CAM draws which pictures it makes, and its encoder has BatchNorm, as those with feature
    maps do.
    """
    stages = len(METHODS[method].stages)
    tiny = [flag for flag in TINY if not flag.startswith("--loss")]
    flags = [f"--method={method}", f"--epochs={stages}", "--data.max_count=12", "--data.imbalance_factor=3", *flags]
    two = start_connected(2, tmp_path / "2", *flags, tiny=tiny)
    one = [start(tmp_path / "1", *flags, tiny=tiny)] if equal else []
    children = [*one, *two]
    assert [child.wait() for child in children] == [0] * len(children), [child.said for child in children]
    results = json.loads((tmp_path / "2" / "results.json").read_text())
    assert results["steps"] == stages * (sum(results["class_counts"]) // 16)
    if equal:
        torch.testing.assert_close(checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["paco", "bcl", "hybrid_sc"])
def test_contrast_within_the_batch_is_refused_in_two_processes(method):
    """Each picture has the whole batch's as candidates, of which a process sees its own alone."""
    with pytest.raises(ValueError, match="needs the batch in one piece: one process"):
        check_stages(METHODS[method], streaming=False, pieces=2, teacher=None, name=method)


def compare_queues() -> None:
    """Put other keys into this process's queue, and see that they are still there before the next step's."""
    enqueue, left = CollaborativeTask.enqueue, []

    def enqueue_and_mark(task: CollaborativeTask, keys: torch.Tensor, labels: torch.Tensor) -> None:
        if all(torch.equal(task.queue.keys, keys) for keys in left[-1:]):
            sys.stdout.write("the queue is as it was left\n")
        enqueue(task, keys, labels)
        task.queue.keys.neg_()
        left.append(task.queue.keys.clone())

    CollaborativeTask.enqueue = enqueue_and_mark


def test_queues_are_not_sent_in_every_step(tmp_path):
    """DistributedDataParallel would overwrite the queue of the second process with that of the first."""
    children = start_connected(2, tmp_path / "run", "--train.max_steps=3", faults={1: compare_queues})
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    assert children[1].said.count("the queue is as it was left") == 3
    assert "FutureWarning" not in children[0].said + children[1].said


def test_two_processes_weigh_classes_as_one(tmp_path):
    """The mean of a class-weighted loss is divided by the weights of the whole step, wherever its pictures are."""
    flags = ["--method=ldam_drw", "--loss.reweight_from=0", "--epochs=1"]
    children = [start(tmp_path / "1", *flags, tiny=FLAGS, ACCELERATE_USE_CPU="true")]
    children += start_connected(2, tmp_path / "2", *flags, "--train.gradient_accumulation_steps=2", tiny=FLAGS)
    assert [child.wait() for child in children] == [0, 0, 0], [child.said for child in children]
    torch.testing.assert_close(checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2"), atol=1e-5, rtol=1e-5)


def test_two_processes_count_over_the_batch_of_both(tmp_path):
    """The mean angles of regions are those of the images of both."""
    flags = ["--method=lgla", "--epochs=1", "--train.max_steps=3", "--optim.lr=0.05"]
    children = [start(tmp_path / "1", *flags, tiny=FLAGS, ACCELERATE_USE_CPU="true")]
    children += start_connected(2, tmp_path / "2", *flags, tiny=FLAGS)
    assert [child.wait() for child in children] == [0, 0, 0], [child.said for child in children]
    torch.testing.assert_close(checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2"), atol=1e-5, rtol=1e-5)


def test_two_processes_test_each_picture_once(tmp_path):
    """400 pictures in batches of 256: the second process pads its part."""
    flags = ["--method=bc", "--model.architecture=resnet20_cifar", "--model.image_size=8", "--epochs=1"]
    children = start_connected(2, tmp_path / "run", *flags, tiny=FLAGS)
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    ours = json.loads((tmp_path / "run" / "results.json").read_text())
    # One process repeats the test of the model that two have tested
    output = tmp_path / "one.json"
    evaluate.main([f"--model={tmp_path}/run/model", f"--recipe={tmp_path}/run/recipe.yaml", f"--output={output}"])
    one = json.loads(output.read_text())
    assert ours["test_images"] == one["test_images"] == 400
    for flip in ("plain", "flip"):
        assert ours["test"][flip]["ensemble"] == pytest.approx(one["test"][flip]["ensemble"], abs=1e-6)


def test_two_processes_collect_the_same_arrays(tmp_path):
    """Test pictures, training pictures and landscape directions are shared out, and nothing counts twice."""
    flags = [*FLAGS, "--method=bkt", "--model.architecture=resnet20_cifar", "--model.image_size=8", "--epochs=1"]
    run = train.main([*flags, f"--output_dir={tmp_path / 'run'}"])
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    flags = [f"--run={run}", "--landscape_images=20", "--batch_size=100"]
    evaluate.main([*flags, f"--output={tmp_path / 'one.json'}"])
    flags.append(f"--output={tmp_path / 'two.json'}")
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    children = [begin("evaluate", flags, *child) for child in zip(logs, connections(2), strict=True)]
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert [result["machine"]["processes"] for result in (one, two)] == [1, 2]
    for key in ("test", "test_images", "reliability", "posthoc", "shifted"):
        assert one[key] == two[key]
    with np.load(tmp_path / "one.npz") as ours, np.load(tmp_path / "two.npz") as theirs:
        assert {"transfer_weight", "landscape_loss", "confusion"} < set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, err_msg=name)


def test_unconnected_processes_are_refused(tmp_path):
    """As torchrun starts them, where nothing says that CPUs are wanted."""
    if torch.cuda.is_available():
        pytest.skip("with GPUs, torchrun connects the processes")
    flags = [*FLAGS, f"--output_dir={tmp_path / 'run'}"]
    environments = [{**environment, "ACCELERATE_USE_CPU": "false"} for environment in connections(2)]
    children = [begin("train", flags, tmp_path / f"{rank}.log", environments[rank]) for rank in (0, 1)]
    assert [child.wait() for child in children] == [1, 1]
    assert all("2 processes were launched, but each trains alone" in child.said for child in children)
    assert not (tmp_path / "run").exists()
