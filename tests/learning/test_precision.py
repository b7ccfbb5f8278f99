"""When a CPU is not to compute in bfloat16."""

import copy
import re

import pytest
import torch
from torch import nn

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.precision import bfloat16_fault
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS


def clock(*seconds):
    """A clock by which the passes take so long, one after another."""
    times = [0.0]
    for passed in seconds:
        times += [times[-1] + passed] * 2
    return iter(times).__next__


@pytest.fixture
def batch():
    return {"pixel_values": torch.randn(6, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}


class Passed(nn.Module):
    """A layer whose gradient is other in bfloat16."""

    def __init__(self, other):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.ones(())), other

    def forward(self, **_):
        half = torch.is_autocast_enabled("cpu")
        return {"loss": self.other(self.weight) if half else 2 * self.weight}


def test_slower_bfloat16_is_left_off_and_nothing_has_changed(batch):
    config = ECLConfig(architecture="resnet20_cifar", num_experts=2, class_counts=[9, 5, 2])
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["bkt"]).train()
    before, numbers = copy.deepcopy(task.state_dict()), torch.get_rng_state()
    assert bfloat16_fault(task, batch, clock(2, 1, 2, 1)) == ""
    assert bfloat16_fault(task, batch, clock(3, 1.5, 1, 1.5)) == "this CPU trains 4 images/s with it, and 6 without"
    assert bfloat16_fault(task, batch, clock(1, 3)) == "this CPU trains 2 images/s with it, and 6 without"
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda weight: 3 * weight, "loss of the first batch is 3 instead of 2"),
        (lambda weight: weight / 0, "loss of the first batch is inf"),
        (lambda weight: 4 - 2 * weight, "points elsewhere .* -1.00"),
    ],
)
def test_wrong_bfloat16_is_left_off(batch, other, message):
    assert re.search(message, bfloat16_fault(Passed(other), batch, clock(2, 1, 2, 1)))
