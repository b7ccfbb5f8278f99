"""Logit adjustment in the loss and after training: values of the published equations."""

import pytest
from torch.testing import assert_close

from ecl_hf import log_prior_shift, losses
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
