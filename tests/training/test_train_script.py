"""The training script as a user calls it, on a small long-tailed split of the handwritten digits."""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import train as script
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from train import main

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.publishing.hub import BackgroundUpload
from ecl_hf.runs.folder import RunFolder

TINY = [
    "--data.source=digits",
    "--data.max_count=20",
    "--data.imbalance_factor=5",
    "--data.horizontal_flip=false",
    "--model.architecture=resnet20_cifar",
    "--model.image_size=8",
    "--batch_size=16",
    "--epochs=3",
]
QUEUE = "--loss.queue_size=40"


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the life of a process; every run here is a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def train(folder: Path, *flags: str) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([*TINY, f"--output_dir={folder}", *flags])


def test_a_number_of_experts_that_a_method_is_not_made_for_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"trains 3 experts, but the model has 1: take --model.num_experts 3"):
        train(tmp_path / "sade", "--method=sade", "--model.num_experts=1")
    train(tmp_path / "ride", "--method=ride", "--model.num_experts=1", "--epochs=1")
    assert "ride is made for several: --model.num_experts 3" in capsys.readouterr().out


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in (run / "model").glob("*.safetensors") for key, value in load_file(file).items()}


def epochs(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert epochs(a) == epochs(b)
    tests = [json.loads((run / "results.json").read_text())["test"] for run in (a, b)]
    assert tests[0] == tests[1]


@pytest.fixture(scope="session")
def teacher_flags(tmp_path_factory):
    """The flag that names a model of a method's teacher, which is trained once; no flag for a method without."""
    runs = {}

    def flags(method: str) -> list[str]:
        if (teacher := METHODS[method].teacher) is None:
            return []
        if teacher not in runs:
            folder = tmp_path_factory.mktemp("teacher") / teacher
            runs[teacher] = train(folder, f"--method={teacher}", "--train.max_steps=2")
        return [f"--model.teacher={runs[teacher]}"]

    return flags


SEVERAL_KINDS = ("ecl", "bbn", "crt", "kcl")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in SEVERAL_KINDS else pytest.mark.slow) for name in METHODS]
)
def test_every_method_trains_and_exports_only_what_inference_needs(method, tmp_path, teacher_flags):
    run = train(tmp_path / "run", f"--method={method}", "--train.max_steps=2", *teacher_flags(method))
    stage = METHODS[method].stages[0]
    assert set(epochs(run)[0]) == {"epoch", "stage", "step", "loss", "lr", *(term.name for term in stage.terms)}
    results = json.loads((run / "results.json").read_text())
    experts = METHODS[method].num_experts(None)
    assert len(results["test"]["plain"]["experts"]) == experts
    assert results["classifier"] == ECLConfig.from_pretrained(run / "model").classifier
    assert not results["finished"]
    assert results["machine"]["processes"] == 1
    parts = [key.split(".") for key in weights(run)]
    assert all(
        key[0] == "router" or key[:2] == ["trunk", "backbone"] or key[2] in ("backbone", "head") for key in parts
    )
    model = ECLForImageClassification.from_pretrained(run / "model")
    assert len(model.experts) == experts
    assert model.config.class_counts == results["class_counts"]
    prior = METHODS[method].logit_prior
    if callable(prior):
        carried = prior(torch.tensor(model.config.class_counts).double(), METHODS[method].settings(), experts).tolist()
        prior = "uniform" if max(carried) - min(carried) < 1e-9 else carried
    assert model.config.logit_prior == prior
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_whole_run_learns_and_follows_the_cosine(tmp_path):
    run = train(tmp_path / "run", "--method=bc", "--epochs=8", "--optim.lr=0.05")
    lines = epochs(run)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert [line["lr"] for line in lines] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * e / 8)) / 2 for e in range(1, 9)], abs=1e-9
    )
    results = json.loads((run / "results.json").read_text())
    assert results["finished"]
    assert results["epochs"] == 8
    images = results["steps"] * 16  # in a batch
    assert results["training_images_per_second"] == pytest.approx(images / results["training_seconds"])
    assert 1e8 < results["peak_memory_bytes"] < 1e11
    assert results["pretrained_weights"] is None
    assert results["test"]["plain"]["ensemble"]["top1"] > 0.2
    assert results["test"]["plain"]["ensemble"]["many"] is None  # no class of this split has more than 100 images


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_bit_identical(workers, tmp_path):
    flags = ["--method=ecl", f"--data.num_workers={workers}"]
    whole = train(tmp_path / "whole", *flags)
    steps = epochs(whole)[0]["step"]
    train(tmp_path / "parts", *flags, f"--train.max_steps={steps + 2}")  # stops within the second epoch
    train(tmp_path / "parts", *flags, "--train.max_steps=1", "--resume")  # which lies behind already
    parts = train(tmp_path / "parts", *flags, f"--train.max_steps={2 * steps}", "--resume")  # and at its end
    assert train(tmp_path / "parts", *flags, "--resume") == parts
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_other_sizes_begin_with_an_epoch(tmp_path, monkeypatch):
    """Within an epoch nothing is left for some of them, and the others would leave pictures out or repeat them."""
    monkeypatch.setattr("train.Training.test", lambda _: None)
    flags = ["--method=ce", "--epochs=2", "--resume", "--allow_changes"]
    halves, doubled = "--train.gradient_accumulation_steps=2", "--batch_size=32"
    run = train(tmp_path / "run", *flags, "--train.max_steps=4")
    with pytest.raises(SystemExit, match=r"step_00000004 does not fit this recipe .*: it stands within an epoch"):
        train(run, *flags, doubled, halves)
    train(run, *flags, "--train.max_steps=6")
    train(run, *flags, doubled, halves)
    assert [(line["epoch"], line["step"]) for line in epochs(run)] == [(1, 6), (2, 6)]


@pytest.mark.slow
def test_precision_is_chosen_once_for_a_run(tmp_path, monkeypatch, capsys):
    """Where it was chosen by the clock, a resumed run must not choose again."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    runs = {}
    for name, fault in (("bf16", ""), ("no", "it is slower")):
        monkeypatch.setattr("ecl_hf.session.bfloat16_fault", lambda *_, fault=fault: fault)
        whole = train(tmp_path / name, "--method=bc", "--epochs=1")
        train(tmp_path / f"{name}_parts", "--method=bc", "--epochs=1", "--train.max_steps=2")
        monkeypatch.setattr("ecl_hf.session.bfloat16_fault", None)
        assert_same_run(whole, train(tmp_path / f"{name}_parts", "--method=bc", "--epochs=1", "--resume"))
        assert json.loads((whole / "results.json").read_text())["mixed_precision"] == name
        runs[name] = weights(whole)
    assert "bfloat16 is left off: it is slower" in capsys.readouterr().out
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    plain = weights(train(tmp_path / "plain", "--method=bc", "--epochs=1"))
    assert all(torch.equal(plain[key], value) for key, value in runs["no"].items())
    assert not all(torch.equal(plain[key], value) for key, value in runs["bf16"].items())


@pytest.mark.slow
def test_number_of_workers_does_not_change_the_run(tmp_path):
    runs = [train(tmp_path / str(n), "--method=fld_cpt", f"--data.num_workers={n}", "--epochs=1") for n in (0, 2)]
    assert_same_run(*runs)


def test_seed_decides_the_run(tmp_path):
    runs = [train(tmp_path / str(seed), "--method=bc", "--epochs=1", f"--seed={seed}") for seed in (0, 1)]
    ours, theirs = (weights(run)["experts.0.head.weight"] for run in runs)
    assert not torch.equal(ours, theirs)


@pytest.mark.slow
def test_accumulation_keeps_the_number_of_steps(tmp_path):
    flags = ["--method=bc", "--data.max_count=25", "--epochs=1"]  # 123 images: quarter batches would fill one step more
    runs = [train(tmp_path / str(n), *flags, f"--train.gradient_accumulation_steps={n}") for n in (1, 2, 4)]
    assert [epochs(run)[0]["step"] for run in runs] == [7, 7, 7]


class Interrupted(Exception):
    pass


@pytest.mark.slow
def test_crash_between_checkpoints_loses_nothing(tmp_path, monkeypatch):
    flags = ["--method=ecl", "--train.checkpoint_every=1", "--epochs=4"]
    whole = train(tmp_path / "whole", *flags)
    steps = epochs(whole)[0]["step"]
    follow, calls = CollaborativeTask.follow, []

    def follow_until_the_third_epoch(task):
        calls.append(1)
        if len(calls) == 2 * steps + 3:
            raise Interrupted
        follow(task)

    monkeypatch.setattr(CollaborativeTask, "follow", follow_until_the_third_epoch)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", *flags)
    monkeypatch.undo()
    assert [path.name for path in sorted((tmp_path / "parts" / "checkpoints").iterdir())] == [
        f"step_{steps * epoch:08d}" for epoch in (1, 2)
    ]
    parts = train(tmp_path / "parts", *flags, "--resume")
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    flags = ["--method=bkt", "--model.architecture=test_vit", "--model.image_size=32", "--epochs=1"]
    runs = [train(tmp_path / str(n), *flags, f"--train.gradient_accumulation_steps={n}") for n in (1, 2)]
    assert [line["step"] for line in epochs(runs[0])] == [line["step"] for line in epochs(runs[1])]
    ours, theirs = (weights(run) for run in runs)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_run_that_saves_memory_is_the_same(tmp_path):
    """It may also begin when memory was found to be short."""
    flags = ["--method=ecl", "--epochs=2"]
    sparing = ["--train.gradient_checkpointing=true", "--train.experts_one_by_one=true"]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--train.max_steps=4")
    parts = train(tmp_path / "parts", *flags, *sparing, "--resume")
    assert_same_run(whole, parts)


def test_mixed_precision_and_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("ecl_hf.session.bfloat16_fault", lambda *_: "")
    run = train(tmp_path / "run", "--method=ecl", "--train.max_steps=2", "--report_to", "tensorboard")
    assert json.loads((run / "results.json").read_text())["mixed_precision"] == "bf16"
    assert all(tensor.dtype != torch.bfloat16 for tensor in weights(run).values())
    assert list(run.rglob("events.out.tfevents.*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--train.gradient_accumulation_steps=2"], ["--train.experts_one_by_one=true"]])
def test_recorded_kernels_of_a_gpu_train_as_others_do(tmp_path, flags):
    eager, recorded = (
        epochs(train(tmp_path / name, "--method=ecl", QUEUE, f"--train.compile={name}", *flags))
        for name in ("false", "true")
    )
    for ours, theirs in zip(recorded, eager, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


def test_finished_run_is_reported_again_and_not_touched(tmp_path, capsys):
    run = train(tmp_path / "run", "--method=bc", "--epochs=1")
    before = {path: path.stat().st_mtime_ns for path in (run / "model").iterdir()}
    capsys.readouterr()
    train(tmp_path / "run", "--method=bc", "--epochs=1", "--resume")
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (run / "model").iterdir()}


@pytest.mark.slow
def test_damaged_model_of_a_finished_run_is_written_again(tmp_path, capsys):
    flags = ["--method=ce", "--model.num_experts=1", "--epochs=1"]
    run = train(tmp_path / "run", *flags)
    whole = {key: value.clone() for key, value in weights(run).items()}  # not what the damaged file holds
    tested = json.loads((run / "results.json").read_text())["test"]
    file = run / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    train(run, *flags, "--resume")
    said = capsys.readouterr().out
    assert "the model of the finished run is not whole" in said
    assert "model.safetensors is damaged; it is written again from the last checkpoint" in said
    assert all(torch.equal(whole[key], value) for key, value in weights(run).items())
    assert json.loads((run / "results.json").read_text())["test"] == tested
    train(run, *flags, "--resume")
    assert "finished already" in capsys.readouterr().out


def test_non_finite_loss_stops_the_run_and_names_the_terms(tmp_path):
    with pytest.raises(SystemExit, match=r"step 2 .*supervision is (nan|inf).* training pictures \[\d+(, \d+){15}\]"):
        train(tmp_path / "run", "--method=bc", "--optim.lr=1e30")
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["_log", "finish"])
def test_diverged_run_publishes_nothing(when, tmp_path, monkeypatch):
    """The statistics of a layer are infinite after the first epoch, or after the last one."""
    offered = []
    monkeypatch.setattr("ecl_hf.session.check_upload", lambda *_: None)
    monkeypatch.setattr(BackgroundUpload, "offer", lambda _, model, *__: offered.append(model))
    monkeypatch.setattr("train.upload_directory", lambda *_, **kwargs: offered.append(kwargs))
    before = getattr(script.Training, when)

    def diverge(training, *arguments):
        training.model.experts[0].backbone.bn1.running_var[0] = torch.inf
        before(training, *arguments)

    monkeypatch.setattr(script.Training, when, diverge)
    flags = ["--method=ce", "--model.num_experts=1", "--train.checkpoint_every=10", "--epochs=2"]
    hub = ["--hub.push=true", "--hub.repo_id=me/x", *(["--hub.every=1"] if when == "_log" else [])]
    with pytest.raises(SystemExit, match=r"^\nerror: the weights are not finite and were not saved: .*running_var"):
        train(tmp_path / "run", *flags, *hub)
    assert offered == []
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nonsense=1"], "nonsense"),
        (["--data.nonsense=1"], "nonsense"),
        (["--epochs=many"], "epochs"),
        (["--epochs=0"], "epochs"),
        (["--optim.lr=-1"], "optim.lr"),
        (["--method=elc"], "elc.*ecl"),
        (["--data.path=/no/such/place"], "/no/such/place"),
        (["--data.image_column=photo"], "photo.*image"),
        (["--data.label_column=breed"], "breed.*label"),
        (["--data.test_split=test", "--data.max_count=1000"], "max_count"),
        (["--data.imbalance_factor=1000"], "imbalance_factor"),
        (["--batch_size=100000"], r"batch_size.*training split.*take --batch_size 16, or up to \d+"),
        (["--batch_size=15", "--train.gradient_accumulation_steps=2"], "batch_size 15"),
        (["--model.architecture=resnet32_cifra"], "resnet32_cifar"),
        (["--model.pretrained=true"], "pretrained"),
        (["--report_to", "telegraph"], "telegraph"),
        (["--model.architecture=test_vit", "--model.image_size=33"], r"test_vit can't take images.*33.*image_size"),
        (["--model.architecture=test_convnext"], r"test_convnext can't take images.*8.*image_size"),
        (
            ["--model.architecture=pit_ti_224", "--train.gradient_checkpointing=true"],
            "gradient_checkpointing.*pit_ti_224",
        ),
        (["--model.pretrained=/no/such/weights.safetensors"], "weights.safetensors"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", *flags)
    said = f"{caught.value} {capsys.readouterr().err}"
    assert re.search(message, said, re.DOTALL), said
    assert not (tmp_path / "run").exists()


def test_unknown_recipe_key_is_named(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: ecl\ndata:\n  sauce: digits\n")
    with pytest.raises(SystemExit):
        main([f"--recipe={recipe}", f"--output_dir={tmp_path / 'run'}"])
    assert "sauce" in capsys.readouterr().err


def test_output_directory_must_be_free_and_writable(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="not empty"):
        train(tmp_path / "used")
    with pytest.raises(SystemExit, match=r"thesis\.tex"):
        train(tmp_path / "used" / "thesis.tex" / "run")
    assert (tmp_path / "used" / "thesis.tex").read_text() == "years of work"

    run = train(tmp_path / "run", "--method=bc", "--train.max_steps=1")
    with pytest.raises(SystemExit, match="--resume"):
        train(tmp_path / "run", "--method=bc")
    with pytest.raises(SystemExit, match=r"optim\.lr: 0\.01 -> 0\.02"):
        train(tmp_path / "run", "--method=bc", "--optim.lr=0.02", "--resume")
    shutil.rmtree(run / "checkpoints")
    assert train(run, "--method=bc", "--train.max_steps=1", "--resume") == run  # nothing to go on from: starts again


def test_run_to_which_nobody_listens_comes_to_its_end(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        run = RunFolder(train(tmp_path / "run", "--method=bc_ensemble", "--model.num_experts=1", "--train.max_steps=2"))
        monkeypatch.undo()
    assert run.newest_checkpoint().name == "step_00000002"
    assert run.results_file.exists()
