"""Weights of experts for a test set: published steps, a loop, and what they settle on."""

import math

import pytest
import torch
from torch.testing import assert_close

from ecl_hf.evidence.weighing import prediction_stability, stable_weights
from tests.methods.comparing import tensors


def draw(*shape):
    return 2 * torch.randn(*shape, dtype=torch.double)


def softmax(values):
    exps = [math.exp(v) for v in values]
    return [e / sum(exps) for e in exps]


def test_stability_by_loop():
    logits, raw = draw(2, 4, 3, 5), draw(3)
    weights, total = softmax(raw.tolist()), 0.0
    for i in range(4):
        p, q = (
            softmax([sum(weights[k] * logits[v, i, k, c].item() for k in range(3)) for c in range(5)]) for v in (0, 1)
        )
        total += sum(a * b for a, b in zip(p, q, strict=True)) / (math.hypot(*p) * math.hypot(*q))
    assert prediction_stability(logits, raw).item() == pytest.approx(total / 4, rel=1e-12)


@pytest.mark.parametrize("alike", ["views", "experts"])
def test_stability_asks_for_no_weights_where_nothing_differs(alike):
    logits = draw(2, 8, 3, 10)
    logits = logits[:1].repeat(2, 1, 1, 1) if alike == "views" else logits[:, :, :1].repeat(1, 1, 3, 1)
    weights = draw(3).requires_grad_()
    stability = prediction_stability(logits, weights)
    (gradient,) = torch.autograd.grad(stability, weights)
    assert_close(gradient, torch.zeros(3, dtype=torch.double))
    if alike == "views":
        assert_close(stability.item(), 1.0)


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_published_weights_of_a_test_set(published, epochs):
    values = tensors(published("experts/sade_test_time"))
    batches = values["views"]
    found = stable_weights(lambda _: batches, epochs, least=0)
    assert_close(found, values["raw_weights"][epochs * len(batches)].softmax(0), rtol=1e-9, atol=1e-12)
    assert_close((100 * found).round() / 100, values["rounded_softmax_per_epoch"][epochs - 1])


def test_the_stable_expert_is_preferred_and_a_vanishing_one_ends_the_search():
    same, epochs = draw(1, 16, 1, 6).repeat(2, 1, 1, 1), []
    batch = torch.cat([draw(2, 16, 1, 6), 4 * same], dim=2)

    def views(epoch):
        epochs.append(epoch)
        return [batch] * 40

    weights = stable_weights(views, epochs=50, lr=1.0)
    assert weights[1] > 0.94
    assert_close(weights.sum().item(), 1.0)
    assert len(epochs) < 50


def test_no_picture():
    with pytest.raises(ValueError, match="no picture"):
        stable_weights(lambda _: [])
