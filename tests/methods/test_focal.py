"""Focal loss on the softmax: published values and the gradient in closed form."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from tests.methods.comparing import agrees, tensors


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/focal"))


@pytest.mark.parametrize("gamma", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_published_values(values, gamma, weighted):
    labels = values["labels"]
    weights = values["weight_cb"][labels] if weighted else 1.0

    def loss(logits):
        return losses.focal_losses(weights * losses.cross_entropies(logits, labels), gamma).mean()

    case = f"cb_gamma{gamma}" if weighted else f"gamma{gamma}"
    agrees(loss, values["logits"], values[f"loss_{case}"], values[f"grad_{case}"])


def test_published_values_with_a_detached_modulator(values):
    def loss(logits):
        return losses.focal_losses(losses.cross_entropies(logits, values["labels"]), 2, detach_modulator=True).mean()

    agrees(loss, values["logits"], values["loss_detached_gamma2"], values["grad_detached_gamma2"])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("detached", [False, True])
def test_gradient_in_closed_form(gamma, detached):
    logits, labels = 2 * torch.randn(6, 5, dtype=torch.double), torch.tensor([0, 4, 2, 2, 1, 3])
    q = logits.softmax(-1)
    own = q.gather(-1, labels[:, None])
    slope = (1 - own) ** gamma
    if not detached:
        slope = slope - gamma * own * (1 - own) ** (gamma - 1) * own.log()
    expected = slope * (q - F.one_hot(labels, 5))
    logits.requires_grad_()
    loss = losses.focal_losses(losses.cross_entropies(logits, labels), gamma, detached).sum()
    assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_certain_prediction_has_no_loss_and_no_gradient(gamma):
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = losses.focal_losses(losses.cross_entropies(logits, torch.tensor([0])), gamma).sum()
    assert loss == 0
    assert_close(torch.autograd.grad(loss, logits)[0], torch.zeros(1, 2))
