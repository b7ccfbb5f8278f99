"""Methods whose train-only modules hold something: stopped within their later stages they end with the same weights."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from train import main

from tests.children import TINY

FLAGS = [flag for flag in TINY if not flag.startswith(("--loss", "--epochs", "--model.num_experts"))]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def train(folder, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([*FLAGS, f"--output_dir={folder}", *flags])


def weights(run):
    return {key: value for file in (run / "model").glob("*.safetensors") for key, value in load_file(file).items()}


def lines(run):
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in logged]


TSC = ("--loss.queue_size=40", "--loss.projection_dim=4", "--loss.target_steps=5", "--loss.classifier_lr=1")


@pytest.mark.parametrize(
    ("method", "stops", "flags"),
    [
        ("cam", (9,), ("--stage_epochs=[1,1,1]", "--epochs=3")),  # the network that makes pictures
        ("tsc", (9, 12), ("--stage_epochs=[1,1,1]", "--epochs=3", *TSC)),  # queue, centroids and assignment
        ("oltr", (9,), ("--epochs=3", "--loss.attention=true")),  # memory, and attention in the encoder
        ("m2m", (27,), ("--epochs=5", "--loss.beta=0", "--loss.confidence=0")),  # within the epoch that translates
    ],
)
@pytest.mark.slow
def test_stopped_in_a_later_stage_it_ends_with_the_same_weights(method, stops, flags, tmp_path):
    flags = (f"--method={method}", *flags)
    if method == "m2m":
        teacher = train(tmp_path / "teacher", "--method=ce", "--epochs=1")
        flags = (*flags, f"--model.teacher={teacher}")
    whole = train(tmp_path / "whole", *flags)
    for stop in stops:
        train(tmp_path / "parts", *flags, f"--train.max_steps={stop}", "--resume")
    parts = train(tmp_path / "parts", *flags, "--resume")
    ours, theirs = weights(whole), weights(parts)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert lines(whole) == lines(parts)
