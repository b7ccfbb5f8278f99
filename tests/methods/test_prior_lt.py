"""Prior-LT: published values of Bayias and UniMix, and whom the shares favour."""

from types import SimpleNamespace

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


def test_partners_shares_and_pixels_of_a_mixed_batch():
    torch.manual_seed(0)
    labels = torch.randint(3, (6000,))
    batch = {"pixel_values": labels[:, None, None, None].float().expand(-1, 3, 1, 1), "labels": labels}
    counts, settings = torch.tensor([100, 10, 1]), prior_lt.UniMixSettings(alpha=0.001, tau=-0.5)
    context = SimpleNamespace(settings=settings, generator=torch.Generator().manual_seed(0), class_counts=counts)
    mixed = prior_lt.unimix(batch, context)
    partners, shares = mixed["mixed_labels"], mixed["share"]
    assert_close(mixed["pixel_values"][:, 0, 0, 0], shares * labels + (1 - shares) * partners)
    # In a batch with as many pictures of each class, partners come in proportion to n^tau
    expected = labels.bincount() * counts**-0.5
    assert_close(partners.bincount() / 6000, expected / expected.sum(), rtol=0, atol=0.02)
    # Where alpha is next to nothing, nearly all draws are 0 or 1, and the share is that of the partner's class
    off = shares - counts[partners] / (counts[labels] + counts[partners])
    assert (off.abs() > 1e-3).float().mean() < 0.02
    assert 0 <= shares.min() <= shares.max() <= 1
