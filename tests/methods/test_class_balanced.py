"""Class-balanced losses: published values, and what the weights are at their limits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods import class_balanced
from ecl_hf.methods.base import HeadContext
from tests.methods.comparing import agrees, tensors

BETA = 0.9999  # of all published values of the losses


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/class_balanced"))


@pytest.fixture
def weights(values):
    return losses.effective_number_weights(values["class_counts"].double(), BETA)


@pytest.mark.parametrize("beta", ["0", "0.99", "0.999", "0.9999"])
def test_published_weights(values, beta):
    actual = losses.effective_number_weights(values["class_counts"].double(), float(beta))
    assert_close(actual, values[f"weight_beta{beta}"], rtol=1e-9, atol=0)


def test_published_softmax_loss(values, weights):
    def loss(logits):
        return class_balanced.class_balanced_losses(logits, values["labels"], weights).mean()

    agrees(loss, values["logits"], values["loss_tf_softmax"], values["grad_tf_softmax"])


def test_published_weighted_mean(values, weights):
    labels = values["labels"]

    def loss(logits):
        return losses.weighted_mean(losses.cross_entropies(logits, labels), weights[labels])

    agrees(loss, values["logits"], values["loss_torch_weighted_mean"], values["grad_torch_weighted_mean"])


@pytest.mark.parametrize(("gamma", "case"), [(0, "tf_sigmoid"), *((g, f"focal_gamma{g}") for g in (0.5, 1, 2))])
def test_published_sigmoid_losses(values, weights, gamma, case):
    def loss(logits):
        return class_balanced.class_balanced_focal_losses(logits, values["labels"], weights, gamma).mean()

    agrees(loss, values["logits"], values[f"loss_{case}"], values[f"grad_{case}"])


def test_towards_one_the_weights_are_the_inverse_counts():
    counts = torch.tensor([500.0, 60, 7, 1], dtype=torch.double)
    inverse = 4 / counts / (1 / counts).sum()
    assert_close(losses.effective_number_weights(counts, 1 - 1e-9), inverse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 1e-6])
def test_equal_counts_weigh_alike_in_single_precision(beta):
    assert_close(losses.effective_number_weights(torch.full((5,), 20), beta), torch.ones(5))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_saturated_logits_keep_finite_gradients(gamma):
    logits = (torch.tensor([[200.0, -200.0, 0.0], [-200.0, 200.0, -200.0]])).requires_grad_()
    loss = class_balanced.class_balanced_focal_losses(logits, torch.tensor([0, 0]), torch.ones(3), gamma)
    # Image 0: only the undecided class counts. Image 1: two wrong answers, each with a cross-entropy of 200
    assert_close(loss, torch.tensor([0.5**gamma * F.softplus(torch.tensor(0.0)), 400.0]))
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_a_new_focal_head_gives_every_class_its_share():
    head = class_balanced.answering_no(nn.Linear(3, 8), HeadContext(None, torch.ones(8)))
    assert_close(head.bias.sigmoid(), torch.full((8,), 1 / 8))
