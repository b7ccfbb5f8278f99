"""LDAM: published margins, losses and gradients, and what remains when margins or counts are equal."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.heads import ECLCosineHead
from ecl_hf.methods import ldam
from ecl_hf.methods.base import HeadContext, TaskOutputs, Time
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
        images = ldam.ldam_losses(cosines, labels, margins, float(values["s"]))
        return images.mean() if weights is None else losses.weighted_mean(images, weights)

    case = "_drw" if deferred else ""
    agrees(loss, values["cosine"], values[f"loss{case}"], values[f"grad{case}"])


def test_without_margins_it_is_the_cross_entropy_of_the_scaled_cosines():
    cosines, labels = torch.rand(4, 3, dtype=torch.double), torch.tensor([0, 2, 1, 2])
    expected = F.cross_entropy(7 * cosines, labels, reduction="none")
    assert_close(ldam.ldam_losses(cosines, labels, ldam.ldam_margins(torch.tensor([9, 5, 1]), 0), 7), expected)


def test_classes_of_equal_size_all_have_the_largest_margin():
    assert_close(ldam.ldam_margins(torch.tensor([8, 8]), 0.4), torch.tensor([0.4, 0.4]))


def test_terms_take_the_scale_of_the_head_and_weigh_classes_from_four_fifths_on():
    torch.manual_seed(2)
    head, counts = ECLCosineHead(5, 4, scale=30.0, bias=False), torch.tensor([40.0, 20, 5, 1])
    features, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 0, 0])
    cosines = F.cosine_similarity(features[:, None], head.weight, dim=-1)
    expected = ldam.ldam_losses(cosines, labels, ldam.ldam_margins(counts, 0.5), 30.0)
    logits = head(features)[None]
    for epoch, weights in ((159, None), (160, losses.effective_number_weights(counts, 0.9999))):
        shift = counts.log().log_softmax(0)
        out = TaskOutputs(labels, logits, features[None], shift, counts.log(), time=Time(epoch, 200), heads=(head,))
        found = ldam.LDAM_DRW.loss(out, ldam.LDAMDRWSettings())
        assert_close(found.losses, expected, rtol=1e-4, atol=1e-4)
        assert_close(found.class_weights, weights) if weights is not None else None
        assert (found.class_weights is None) == (weights is None)
        assert ldam.LDAM.loss(out, ldam.LDAMSettings()).class_weights is None


def test_new_heads_have_rows_of_length_one_in_all_directions():
    weight = ldam.unit_rows(ECLCosineHead(16, 200, scale=30.0, bias=False), HeadContext(None, torch.ones(200))).weight
    assert_close(weight.norm(dim=-1), torch.ones(200))
    assert weight.mean().abs() < 0.02
