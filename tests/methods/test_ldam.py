"""LDAM: published margins, losses and gradients, and what remains when margins or counts are equal."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods import ldam
from tests.methods.comparing import agrees, tensors


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/ldam"))


def test_published_margins(values):
    actual = ldam.ldam_margins(values["class_counts"].double(), float(values["max_m"]))
    assert_close(actual, values["margins"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("deferred", [False, True])
def test_published_losses(values, deferred):
    labels = values["labels"]
    margins = ldam.ldam_margins(values["class_counts"].double(), float(values["max_m"]))
    weights = losses.effective_number_weights(values["class_counts"].double(), 0.9999)[labels] if deferred else None

    def loss(cosines):
        return losses.weighted_mean(ldam.ldam_losses(cosines, labels, margins, float(values["s"])), weights)

    case = "_drw" if deferred else ""
    agrees(loss, values["cosine"], values[f"loss{case}"], values[f"grad{case}"])


def test_without_margins_it_is_the_cross_entropy_of_the_scaled_cosines():
    cosines, labels = torch.rand(4, 3, dtype=torch.double), torch.tensor([0, 2, 1, 2])
    expected = F.cross_entropy(7 * cosines, labels, reduction="none")
    assert_close(ldam.ldam_losses(cosines, labels, ldam.ldam_margins(torch.tensor([9, 5, 1]), 0), 7), expected)


def test_classes_of_equal_size_all_have_the_largest_margin():
    assert_close(ldam.ldam_margins(torch.tensor([8, 8]), 0.4), torch.tensor([0.4, 0.4]))
