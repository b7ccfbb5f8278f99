"""Mixed batches: pixels and shares agree, shares have their distribution, and the generator decides everything."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ecl_hf.data.mixing import beta_draws, mix, mixup


def batch_of(labels):
    """Pictures whose every pixel is their label."""
    labels = torch.tensor(labels)
    return {"pixel_values": labels.float()[:, None, None, None].expand(-1, 3, 2, 2), "labels": labels}


def context(seed, **settings):
    return SimpleNamespace(generator=torch.Generator().manual_seed(seed), settings=SimpleNamespace(**settings))


def test_pixels_have_the_shares_of_the_labels():
    mixed = mix(batch_of([5, 1, 3]), torch.tensor([2, 2, 0]), torch.tensor([0.5, 1.0, 0.25]))
    assert mixed["mixed_labels"].tolist() == [3, 3, 5]
    assert_close(mixed["pixel_values"][:, 0, 0, 0], torch.tensor([4.0, 1.0, 4.5]))


def test_mixup_has_one_share_and_every_picture_once_as_a_partner():
    mixed = mixup(lambda settings: settings.alpha)(batch_of(range(20)), context(0, alpha=1.0))
    share, labels = mixed["share"], torch.arange(20)
    assert share.shape == ()
    assert sorted(mixed["mixed_labels"].tolist()) == list(range(20)) != mixed["mixed_labels"].tolist()
    expected = share * labels + (1 - share) * mixed["mixed_labels"]
    assert_close(mixed["pixel_values"][:, 1, 1, 1], expected)


def test_the_same_generator_mixes_alike():
    first, again, other = (mixup(0.4)(batch_of(range(9)), context(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert first["share"] != other["share"]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_have_the_moments_of_a_beta_distribution(alpha):
    draws = beta_draws(alpha, 20_000, torch.Generator().manual_seed(1))
    assert 0 <= draws.min() <= draws.max() <= 1
    assert_close(draws.mean().item(), 0.5, rtol=0, atol=0.01)
    assert_close(draws.var().item(), 1 / (4 * (2 * alpha + 1)), rtol=0.03, atol=0)
