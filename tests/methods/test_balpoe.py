"""BalPoE: published values, also with mixup, and which strengths leave the mean unbiased."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.losses import carried_log_prior, prior_shifts, shifted_cross_entropy, spread
from tests.methods.comparing import agrees, tensors

LIMITS = {"tau012": (0, 2), "imagenet": (0, 2.5), "inat": (-1, 3)}


@pytest.fixture
def values(published):
    return tensors(published("experts/balpoe"))


def shifts_of(values, case):
    return prior_shifts(values["class_counts"].double(), spread(*LIMITS[case], len(values["logits"])))


@pytest.mark.parametrize("case", LIMITS)
def test_published_values(values, case):
    shifts, labels = shifts_of(values, case), values["labels"]
    # The published logarithm adds 1e-9 to each prior
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    losses = shifted_cross_entropy(values["logits"], labels, shifts).mean(-1)
    assert_close(losses, values[f"{case}_expert_losses"], **tolerance)
    expected = values[f"{case}_loss"], values[f"{case}_grad"]
    agrees(lambda z: shifted_cross_entropy(z, labels, shifts).mean(), values["logits"], *expected, **tolerance)


def test_published_values_with_mixup(values):
    share, partners, labels = values["mix_lambda"], values["mix_index"], values["labels"]
    mixed = share * values["mix_image"] + (1 - share) * values["mix_image"][partners]

    def loss(weight):
        logits = torch.einsum("bd,kdc->kbc", mixed, weight)
        own, other = (shifted_cross_entropy(logits, y, shifts_of(values, "tau012")) for y in (labels, labels[partners]))
        return (share * own + (1 - share) * other).mean()

    agrees(loss, values["mix_weight"], values["mix_loss"], values["mix_grad"], rtol=1e-6, atol=1e-7)


def test_strengths_lie_at_equal_distances():
    assert spread(-1, 3, 5) == [-1, 0, 1, 2, 3]
    assert spread(0, 2.5, 3) == [0, 1.25, 2.5]
    assert spread(0, 2, 1) == [1]


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4])
def test_mean_logits_are_unbiased_where_the_mean_strength_is_1(num_experts):
    counts = torch.tensor([60.0, 7, 1, 25]).double()
    uniform = torch.full((4,), 0.25, dtype=torch.double)
    for limits in ((0, 2), (-1, 3)):
        shifts = prior_shifts(counts, spread(*limits, num_experts))
        assert_close(carried_log_prior(counts, shifts).exp(), uniform)
    biased = carried_log_prior(counts, prior_shifts(counts, spread(0, 2.5, num_experts)))
    assert_close(biased, (-0.25 * counts.log()).log_softmax(0))


def test_without_strength_it_is_cross_entropy():
    logits, labels = torch.randn(3, 4, 4, dtype=torch.double), torch.tensor([0, 3, 3, 1])
    shifts = prior_shifts(torch.tensor([60.0, 7, 1, 25]), [0.0] * 3)
    expected = torch.stack([F.cross_entropy(z, labels) for z in logits]).mean()
    assert_close(shifted_cross_entropy(logits, labels, shifts).mean(), expected)
