"""LADE: published values, and the gradient of its regulariser column by column."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods import lade
from tests.methods.comparing import agrees, tensors

# The published code adds 1e-9 to the priors, of which the smallest is 0.004
RTOL = 1e-6


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/lade"))


def shift_of(counts):
    return (counts / counts.sum()).log() + torch.tensor(len(counts)).double().log()


def test_published_cross_entropy_is_the_balanced_one(values):
    def loss(logits):
        return losses.balanced_cross_entropy(logits, values["labels"], shift_of(values["class_counts"]))

    agrees(loss, values["logits"], values["loss_priorce"], values["grad_priorce"], RTOL)


@pytest.mark.parametrize("regularisation", ["0", "0.01", "0.1", "0.5"])
@pytest.mark.parametrize("case", ["", "missing_"])
def test_published_regulariser(values, regularisation, case):
    labels = values["labels_missing" if case else "labels"]

    def loss(logits):
        return lade.lader(logits, labels, shift_of(values["class_counts"]), float(regularisation))

    case = f"lader_{case}lambda{regularisation}"
    agrees(loss, values["logits"], values[f"loss_{case}"], values[f"grad_{case}"], RTOL, atol=1e-8)


@pytest.mark.parametrize("case", ["", "missing_"])
def test_the_regulariser_of_the_paper(values, case):
    labels = values["labels_missing" if case else "labels"]

    def loss(logits):
        return lade.lader_of_the_paper(logits, labels, shift_of(values["class_counts"]), 0.1)

    case = f"lader_paper_{case}lambda0.1"
    agrees(loss, values["logits"], values[f"loss_{case}"], values[f"grad_{case}"], RTOL, atol=1e-8)


@pytest.mark.parametrize("constant", [0.0, 1.5, -2.0])
def test_constant_logits_of_equal_classes(constant):
    logits, labels = torch.full((6, 3), constant, dtype=torch.double), torch.tensor([0, 1, 2, 2, 0, 1])
    assert_close(lade.lader(logits, labels, shift_of(torch.tensor([4.0, 4, 4])), 0.2).item(), 0.2 * constant**2)


def test_gradient_of_a_column():
    """A softmax over the batch against the images of the class; sums to 0, or to p_c where the class is absent."""
    logits = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    labels, counts = torch.tensor([0, 2, 0, 0, 2]), torch.tensor([6.0, 3, 1], dtype=torch.double)
    (gradient,) = torch.autograd.grad(lade.lader(logits, labels, shift_of(counts), 0.0), logits)
    member = F.one_hot(labels, 3).double()
    expected = counts / 10 * (logits.softmax(0) - member / member.sum(0).clamp_min(1))
    assert_close(gradient, expected)
    assert_close(gradient.sum(0), torch.tensor([0, 0.3, 0], dtype=torch.double))
