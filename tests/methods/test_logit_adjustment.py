"""Logit adjustment in the loss and after training: values of the published equations."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification, log_prior_shift, losses
from ecl_hf.methods import logit_adjustment
from tests.methods.comparing import agrees, tensors

# The published code adds 1e-12 to the powers of the prior
RTOL = 1e-7

taus = pytest.mark.parametrize("tau", [0.5, 1, 1.5])


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/logit_adjustment"))


def log_prior(values):
    counts = values["class_counts"].double()
    return (counts / counts.sum()).log()


@taus
def test_published_adjustment_of_the_loss(values, tau):
    def loss(logits):
        return losses.balanced_cross_entropy(logits, values["labels"], log_prior(values), tau)

    agrees(loss, values["logits"], values[f"loss_tau{tau}"], values[f"grad_tau{tau}"], rtol=RTOL)


@taus
def test_published_adjustment_after_training(values, tau):
    adjusted = losses.posthoc_adjust(values["logits"], log_prior(values), tau)
    assert_close(adjusted, values[f"posthoc_logits_tau{tau}"], rtol=RTOL, atol=1e-8)


@taus
def test_our_shift_differs_from_the_log_prior_by_the_uniform_prior(values, tau):
    adjusted = losses.posthoc_adjust(values["logits"], log_prior_shift(values["class_counts"]), tau)
    assert_close(adjusted.softmax(-1), values[f"posthoc_logits_tau{tau}"].softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_what_is_folded_into_the_bias_is_the_adjustment_of_the_logits(classifier):
    counts = [60, 20, 5, 0]
    config = ECLConfig(
        architecture="resnet20_cifar", num_experts=1, classifier=classifier, class_counts=counts, num_labels=4
    )
    model = ECLForImageClassification(config).eval()
    settings = logit_adjustment.LogitAdjustmentSettings(tau=1.5)
    pictures = torch.randn(3, 3, 16, 16)
    with pytest.warns(UserWarning, match="no training image"):
        shift = log_prior_shift(counts)
    expected = losses.posthoc_adjust(model(pictures).logits, shift, 1.5)
    with pytest.warns(UserWarning, match="no training image"):
        logit_adjustment.adjust_bias(SimpleNamespace(model=model, settings=settings, class_counts=torch.tensor(counts)))
    assert_close(model(pictures).logits, expected)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_the_published_logits_carry_what_is_left_of_the_prior(tau):
    counts = torch.tensor([8.0, 1, 1], dtype=torch.double)
    left = logit_adjustment._left_prior(counts, logit_adjustment.LogitAdjustmentSettings(tau=tau), 1)
    expected = (counts / 10) ** (1 - tau)
    assert_close(left.exp(), expected / expected.sum())
