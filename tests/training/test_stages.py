"""A method of three stages through the script: with samplers, mixing, new and wrapped heads; whole and interrupted."""

import json

import pytest
import timm
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from train import main

from ecl_hf import ECLForImageClassification
from ecl_hf.data.mixing import mixup
from ecl_hf.data.samplers import class_aware, class_balanced
from ecl_hf.methods import METHODS, Method, Stage, Term
from ecl_hf.methods.base import HEADS, EpochContext, Part, PerImage, Trains
from ecl_hf.methods.ecl import SUPERVISION
from tests.children import TINY
from tests.learning.test_stages import Doubled

FLAGS = [flag for flag in TINY if not flag.startswith(("--loss", "--epochs"))] + ["--epochs=4"]


class Remembers(Part):
    """Counts hooks, and weighs pictures by how sure the model is of them."""

    def __init__(self, context):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3, dtype=torch.long))
        self.register_buffer("weights", torch.ones(len(context.labels)))

    @property
    def picture_weights(self):
        return self.weights

    def before_epoch(self, _: EpochContext):
        self.calls[0] += 1

    def after_epoch(self, context: EpochContext):
        labels, logits, _ = context.predict()
        self.calls[1] += 1
        self.weights.copy_(1.1 - logits.mean(1).softmax(-1).gather(1, labels[:, None])[:, 0])

    def after_step(self):
        self.calls[2] += 1


def weighted(out, _):
    losses = torch.nn.functional.cross_entropy(out.cls_logits.mean(0), out.labels, reduction="none")
    return PerImage(losses, 1 / out.class_counts)


WEIGHTED = Term("weighted", weighted, part=Remembers)
STAGED = Method(
    (
        Stage((SUPERVISION,), "one", sampler=class_balanced(), mixing=mixup(1.0), share=0.5),
        Stage(
            (Term("weighted", weighted, part=Remembers),), "two", class_aware(2), trains=HEADS, heads="new", share=0.25
        ),
        Stage(
            (SUPERVISION, WEIGHTED),
            "three",
            trains=Trains(lambda name: name.endswith(".factor")),
            heads=lambda head, _: Doubled(head),
            share=0.25,
            lr=0.1,
        ),
    ),
    settings=METHODS["bc"].settings,
    finish=(lambda context: context.model.experts[0].head.bias.data.zero_(),),
)


@pytest.fixture(autouse=True)
def staged(monkeypatch):
    monkeypatch.setitem(METHODS, "staged", STAGED)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def train(folder, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([*FLAGS, "--method=staged", f"--output_dir={folder}", *flags])


def weights(run):
    return {key: value for file in (run / "model").glob("*.safetensors") for key, value in load_file(file).items()}


def lines(run):
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in logged]


@pytest.mark.slow
def test_stopped_anywhere_it_ends_with_the_same_weights(tmp_path):
    whole = train(tmp_path / "whole")
    assert [line["stage"] for line in lines(whole)] == ["one", "one", "two", "three"]
    parts = tmp_path / "parts"
    for stop in (3, 12, 15, 20):  # within a stage, between stages, within the next ones
        train(parts, f"--train.max_steps={stop}", "--resume")
    train(parts, "--resume")
    ours, theirs = weights(whole), weights(parts)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert lines(whole) == lines(parts)
    assert not ours["experts.0.head.bias"].any()  # the step after the last stage
    assert ours["experts.1.head.bias"].any()
    model = ECLForImageClassification.from_pretrained(parts / "model")
    assert {type(expert.head).__name__ for expert in model.experts} == {"ECLHead"}


@pytest.mark.parametrize("pieces", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_gives_the_step_of_the_whole_batch(pieces, tmp_path, monkeypatch):
    """A class-weighted mean is that of the step, not of its pieces; LayerNorm, since BatchNorm sees the pieces."""
    method = Method((Stage((Term("weighted", weighted),)),), settings=METHODS["bc"].settings)
    monkeypatch.setitem(METHODS, "staged", method)
    flags = ["--model.architecture=test_vit", "--model.image_size=32", "--train.max_steps=4", "--optim.momentum=0"]
    one = weights(train(tmp_path / "one", *flags))
    more = weights(train(tmp_path / "more", *flags, f"--train.gradient_accumulation_steps={pieces}"))
    for name, value in one.items():
        torch.testing.assert_close(more[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_the_average_is_tested_and_published(tmp_path):
    plain = weights(train(tmp_path / "plain", "--method=bc", "--model.num_experts=1"))
    averaged = train(tmp_path / "averaged", "--method=bc", "--model.num_experts=1", "--optim.ema=0.9")
    assert lines(averaged) == lines(tmp_path / "plain")  # the training itself is the same
    assert not torch.equal(weights(averaged)["experts.0.head.weight"], plain["experts.0.head.weight"])


@pytest.mark.parametrize("tune", [pytest.param("all", marks=pytest.mark.slow), "head"])
def test_the_average_is_uploaded_on_the_way(tune, tmp_path, monkeypatch):
    """What goes up after an epoch is what a run publishes that ends there."""
    offered = []

    class Upload:
        def __init__(self, *_):
            self.wait = lambda: None

        def offer(self, model, *_):
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, 8, 8))
            offered.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    monkeypatch.setattr("ecl_hf.session.BackgroundUpload", Upload)
    monkeypatch.setattr("ecl_hf.session.check_upload", lambda *_: None)
    encoder = tmp_path / "encoder.safetensors"
    save_file(timm.create_model("resnet20_cifar", num_classes=0).state_dict(), encoder)
    flags = ["--method=bc", "--model.num_experts=1", "--optim.ema=0.9", f"--model.pretrained={encoder}"]
    flags += ["--hub.push=true", "--hub.repo_id=me/x", "--hub.every=1", f"--model.tune={tune}", "--train.max_steps=6"]
    run = train(tmp_path / "run", *flags)
    assert [(line["epoch"], line["step"]) for line in lines(run)] == [(1, 6)]
    [sent] = offered
    assert all(torch.equal(sent[name], tensor) for name, tensor in weights(run).items())


class Silences(Part):
    """Sets the classifiers to zero after each epoch."""

    def __init__(self, _):
        super().__init__()

    def after_epoch(self, context: EpochContext):
        for expert in context.model.experts:
            expert.head.weight.data.zero_()


def test_the_model_is_validated_and_chosen_as_the_parts_leave_it(tmp_path, monkeypatch):
    method = Method((Stage((Term("weighted", weighted, part=Silences),)),), settings=METHODS["bc"].settings)
    monkeypatch.setitem(METHODS, "staged", method)
    run = train(tmp_path / "run", "--epochs=1", "--data.val_fraction=0.2")
    assert not weights(run)["experts.0.head.weight"].any()
