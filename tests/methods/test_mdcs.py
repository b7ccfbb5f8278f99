"""MDCS: published values, and what the weak view teaches the strong one."""

import pytest
import torch
from torch.testing import assert_close

from ecl_hf.losses import prior_shifts, shifted_cross_entropy
from ecl_hf.methods import mdcs
from tests.methods.comparing import agrees, tensors

LAMBDAS = (-0.5, 1.0, 2.5)
WEIGHT = 0.6


@pytest.fixture
def values(published):
    return tensors(published("experts/mdcs"))


def views(values, logits):
    """Shifted logits and labels of the weak and the strong view."""
    shifted = logits + prior_shifts(values["class_counts"].double(), LAMBDAS)[:, None]
    weak, strong = shifted.chunk(2, dim=1)
    return weak, strong, values["labels"].chunk(2)[0]


def total(values, logits, epoch):
    shifts = prior_shifts(values["class_counts"].double(), LAMBDAS)
    supervision = shifted_cross_entropy(logits, values["labels"], shifts).mean(-1).sum()
    return supervision + WEIGHT * mdcs.ramp(epoch - 1, 20) * mdcs.consistency(*views(values, logits)).sum()


@pytest.mark.parametrize("case", ["epoch1", "epoch10", "epoch20", "epoch50", "wrong"])
def test_published_values(values, case):
    epoch = 50 if case == "wrong" else int(case.removeprefix("epoch"))
    logits = values["wrong_logits" if case == "wrong" else "logits"]
    expected = values[f"{case}_loss"], values[f"{case}_grad"]
    # The published logarithm adds 1e-9 to each power of the counts
    agrees(lambda z: total(values, z, epoch), logits, *expected, rtol=1e-6, atol=1e-7)


def test_the_divisor_is_the_number_of_right_images(values):
    weak, strong, labels = views(values, values["logits"])
    for k, divergence in enumerate(mdcs.consistency(weak, strong, labels)):
        right = weak[k].argmax(-1) == labels
        log_q, log_p = strong[k][right].log_softmax(-1), weak[k][right].log_softmax(-1)
        assert right.sum() == values["teachers_right"][k]
        assert_close(divergence, torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


def test_no_gradient_reaches_the_weak_view(values):
    weak, strong, labels = views(values, values["logits"])
    weak, strong = weak.clone().requires_grad_(), strong.clone().requires_grad_()
    mdcs.consistency(weak, strong, labels).sum().backward()
    assert weak.grad is None
    assert_close(strong.grad.sum(-1), torch.zeros(strong.shape[:2], dtype=torch.double))
    assert strong.grad.any()


def test_equal_views_have_nothing_to_learn(values):
    weak, _, labels = views(values, values["logits"])
    strong = weak.clone().requires_grad_()
    divergence = mdcs.consistency(weak, strong, labels)
    divergence.sum().backward()
    zeros = torch.zeros_like(strong)
    assert_close(divergence.detach(), zeros[:, 0, 0])
    assert_close(strong.grad, zeros)


def test_an_expert_that_is_nowhere_right_learns_nothing(values):
    weak, strong, labels = views(values, values["wrong_logits"])
    assert not (weak.argmax(-1) == labels).any()
    strong = strong.clone().requires_grad_()
    divergence = mdcs.consistency(weak, strong, labels)
    divergence.sum().backward()
    assert not divergence.any()
    assert not strong.grad.any()


def test_ramp_of_the_consistency():
    assert [mdcs.ramp(epoch, 20) for epoch in (0, 9, 19, 20, 399)] == [0.05, 0.5, 1.0, 1.0, 1.0]
