"""SHIKE: published values of both stages, and whom the gradient reaches."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.losses import cross_entropies, prior_shifts, shifted_cross_entropy
from ecl_hf.methods import shike
from tests.methods.comparing import agrees, tensors

WEIGHT = 10.0


@pytest.fixture
def values(published):
    return tensors(published("experts/shike"))


def test_published_values_of_the_first_stage(values):
    labels = values["labels"]

    def loss(logits):
        losses = cross_entropies(logits, labels).sum(0) + shike.mutual_distillation(logits)
        return (losses + WEIGHT * shike.hard_negative_distillation(logits, labels)).mean()

    agrees(loss, values["logits"], values["stage1_loss"], values["stage1_grad"])


def test_published_values_of_the_second_stage(values):
    labels = values["labels"]
    shifts = prior_shifts(values["class_counts"].double(), [1.0] * len(values["logits"]))
    expected = values["stage2_loss"], values["stage2_grad"]
    agrees(lambda z: shifted_cross_entropy(z, labels, shifts).mean(-1).sum(), values["logits"], *expected)


def test_hard_target_by_hand():
    logits = torch.tensor([[[9.0, 4.0, 1.0, -1.0]], [[7.0, 2.0, 3.0, 5.0]]])
    # Means 8, 3, 2, 2: of the wrong classes 1 is the hardest
    assert shike.hard_target(logits, torch.tensor([0])).tolist() == [[0.0, 3.0, 3.0, 5.0]]


def test_experts_that_agree_have_nothing_to_teach_each_other():
    logits = torch.randn(1, 4, 5, dtype=torch.double).repeat(3, 1, 1).requires_grad_()
    loss = shike.mutual_distillation(logits).sum()
    assert_close(loss.item(), 0.0)
    assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))
    alone = shike.mutual_distillation(logits[:1])
    assert not alone.any()


def test_a_constant_changes_only_the_hard_term():
    logits, labels = torch.randn(3, 4, 5, dtype=torch.double), torch.tensor([0, 4, 2, 2])
    for loss in (shike.mutual_distillation, lambda z: cross_entropies(z, labels)):
        assert_close(loss(logits + 2.0), loss(logits))
    change = shike.hard_negative_distillation(logits + 2.0, labels) - shike.hard_negative_distillation(logits, labels)
    assert (change.abs() > 1e-3).all()


@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_large_logits_in_half_precision_are_finite(scale):
    logits, labels = (scale * torch.randn(3, 4, 5)).bfloat16().requires_grad_(), torch.tensor([0, 4, 2, 2])
    loss = (shike.hard_negative_distillation(logits, labels) + shike.mutual_distillation(logits)).mean()
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_equal_counts_make_the_second_stage_cross_entropy():
    logits, labels = torch.randn(3, 4, 5, dtype=torch.double), torch.tensor([0, 4, 2, 2])
    shifts = prior_shifts(torch.full((5,), 3.0).double(), [1.0] * 3)
    expected = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    assert_close(shifted_cross_entropy(logits, labels, shifts), expected)
