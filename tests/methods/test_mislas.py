"""Label-aware smoothing against the values of its published code, and what it is in its limits."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.methods import mislas

SHAPES = ("concave", "linear", "convex", "power")


def test_as_published(published):
    values = {key: torch.as_tensor(value) for key, value in published("reweighting_and_stages/mislas").items()}
    labels, counts = values["labels"], values["class_counts"].double()
    cases = [key.removeprefix("smooth_") for key in values if key.startswith("smooth_")]
    assert cases
    for case in cases:
        head, tail, shape, power = re.fullmatch(r"h(.+)_t(.+)_([a-z]+)(\d*)", case).groups()
        shape = "power" if shape == "exp" else shape
        smoothing = mislas.smoothing_factors(counts, float(head), float(tail), shape, float(power or 2))
        assert_close(smoothing, values[f"smooth_{case}"], rtol=1e-9, atol=1e-12)
        logits = values["logits"].clone().requires_grad_()
        loss = mislas.label_aware_smoothing(logits, labels, values[f"smooth_{case}"]).mean()
        loss.backward()
        assert_close(loss.detach(), values[f"loss_{case}"], rtol=1e-9, atol=0)
        assert_close(logits.grad, values[f"grad_{case}"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_smoothing_grows_from_the_smallest_class_to_the_largest(shape):
    counts = torch.tensor([200, 5, 30, 1000, 80])
    smoothing = mislas.smoothing_factors(counts.double(), 0.4, 0.1, shape)
    assert_close(smoothing[counts.argmin()].item(), 0.1)
    assert_close(smoothing[counts.argmax()].item(), 0.4)
    assert smoothing.argsort().tolist() == counts.argsort().tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_classes_are_smoothed_alike(shape):
    smoothing = mislas.smoothing_factors(torch.full((4,), 30.0), 0.4, 0.1, shape)
    assert_close(smoothing, torch.full((4,), 0.4))


def test_one_amount_for_all_classes_is_label_smoothing():
    logits, labels = torch.randn(6, 5).double(), torch.arange(6) % 5
    for eps in (0.0, 0.3):
        actual = mislas.label_aware_smoothing(logits, labels, torch.full((5,), eps).double())
        expected = F.cross_entropy(logits, labels, label_smoothing=torch.tensor(eps).item(), reduction="none")
        assert_close(actual, expected)


def test_half_precision_is_computed_in_float32():
    logits, labels, smoothing = torch.randn(6, 5).bfloat16(), torch.arange(6) % 5, torch.rand(5)
    actual = mislas.label_aware_smoothing(logits, labels, smoothing)
    assert_close(actual, mislas.label_aware_smoothing(logits.float(), labels, smoothing))
