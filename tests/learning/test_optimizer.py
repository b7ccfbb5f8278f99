"""Fused SGD, which on CPUs takes weights, gradients and momentum as they lie in memory, whatever their strides."""

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import ECLSettings

LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-3


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_fused_sgd_is_textbook_sgd_in_every_memory_format(memory_format):
    torch.manual_seed(0)
    config = ECLConfig(architecture="test_resnet", num_experts=2, class_counts=[9, 5, 2])
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["ecl"], ECLSettings(queue_size=7))
    task.to(memory_format=memory_format).train()
    weights = [weight for weight in task.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    expected = [weight.detach().double() for weight in weights]
    velocity = [torch.zeros_like(weight) for weight in expected]
    for _ in range(3):
        views = [view.contiguous(memory_format=memory_format) for view in torch.randn(2, 4, 3, 32, 32)]
        task(views[0], torch.arange(4) % 3, views[1])["loss"].backward()
        for old, speed, weight in zip(expected, velocity, weights, strict=True):
            speed.mul_(MOMENTUM).add_(weight.grad.double() + WEIGHT_DECAY * old)
            old.sub_(LR * speed)
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(weights, expected, strict=True):
        assert_close(ours.detach().double(), theirs, rtol=1e-4, atol=1e-5)
