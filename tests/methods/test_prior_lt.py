"""Prior-LT: published values of Bayias and UniMix, and whom the shares favour."""

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods import prior_lt
from tests.methods.comparing import agrees, tensors


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/prior_lt"))


def bayias_shift(values):
    counts = values["class_counts"].double()
    return (counts * len(counts) / counts.sum()).log()


def test_published_bayias(values):
    shift = bayias_shift(values)
    assert_close(shift, values["prior_log"] - values["inference_log"], rtol=1e-9, atol=1e-12)

    def loss(logits):
        return losses.cross_entropies(logits, values["labels"], shift)

    agrees(loss, values["logits"], values["loss_bayias_none"], values["grad_bayias_sum"])


@pytest.mark.parametrize("tau", ["-0.1", "-0.5"])
def test_published_unimix(values, tau):
    labels, partner = values["labels"], values[f"pair_index_tau{tau}"]
    counts = values["class_counts"].double()[labels]
    probabilities = prior_lt.partner_probabilities(counts, float(tau))
    assert_close(probabilities, values[f"pair_probability_tau{tau}"], rtol=1e-9, atol=0)
    shares = prior_lt.unimix_shares(values["beta_draws"], counts, counts[partner])
    assert_close(shares, values[f"lambda_tau{tau}"], rtol=1e-9, atol=1e-12)
    shift = bayias_shift(values)

    def loss(logits):
        own, other = (losses.cross_entropies(logits, y, shift) for y in (labels, labels[partner]))
        return (shares * own + (1 - shares) * other).mean()

    agrees(loss, values["logits"], values[f"loss_tau{tau}"], values[f"grad_tau{tau}"])


def test_where_the_draw_is_an_end_the_share_is_that_of_the_partners_class():
    counts, partner = torch.tensor([90.0, 10, 5, 5]), torch.tensor([10.0, 90, 5, 5])
    for draw in (0.0, 1.0):
        shares = prior_lt.unimix_shares(torch.full((4,), draw), counts, partner)
        assert_close(shares, torch.tensor([0.1, 0.9, 0.5, 0.5]))
