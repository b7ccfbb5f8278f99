"""SADE: published values, and closed forms of the shifts."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.losses import carried_log_prior, log_class_prior, prior_shifts, shifted_cross_entropy
from ecl_hf.methods import sade
from tests.methods.comparing import agrees, tensors

LABELS = torch.tensor([0, 9, 3, 3, 1, 0])
CASES = {"sorted": "class_counts", "permuted": "permuted_counts", "ties": "ties_counts"}


@pytest.fixture
def values(published):
    return tensors(published("experts/sade"))


def draw(*shape):
    return 2 * torch.randn(*shape, dtype=torch.double)


def summed(logits, labels, shifts):
    return shifted_cross_entropy(logits, labels, shifts).mean(-1).sum()


@pytest.mark.parametrize("tau", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_published_values(values, case, tau):
    counts = values[CASES[case]].double()
    shifts = sade.sade_shifts(counts, tau)
    expected = values[f"{case}_tau{tau}_loss"], values[f"{case}_tau{tau}_grad"]
    # The published logarithm adds 1e-9 to each prior
    agrees(lambda z: summed(z, values["labels"], shifts), values["logits"], *expected, rtol=1e-6, atol=1e-7)
    assert_close(sade.reversed_prior(log_class_prior(counts)).exp(), values[f"{case}_inverse_prior"])


def test_reversing_twice_gives_the_prior_back():
    log_prior = log_class_prior(torch.tensor([13.0, 64, 299, 38, 179, 23, 500]).double())
    twice = sade.reversed_prior(sade.reversed_prior(log_prior))
    assert_close(twice, log_prior, rtol=0, atol=0)


def test_a_geometric_profile_has_shifts_in_proportion_to_the_prior():
    counts = 512 * 0.5 ** torch.arange(10, dtype=torch.double)
    expected = prior_shifts(counts, [0, 1, 3])
    shifts = sade.sade_shifts(counts, tau=2)
    assert_close(shifts.log_softmax(-1), expected.log_softmax(-1))
    uniform = torch.full((10,), 0.1, dtype=torch.double)
    assert_close(carried_log_prior(counts, sade.sade_shifts(counts, tau=1)).exp(), uniform)


def test_equal_counts_leave_cross_entropy_to_all_experts():
    logits = draw(3, 6, 10)
    shifts = sade.sade_shifts(torch.full((10,), 7.0, dtype=torch.double), tau=2)
    assert_close(summed(logits, LABELS, shifts), sum(F.cross_entropy(z, LABELS) for z in logits))


def test_classes_may_come_in_any_order():
    counts, order = torch.tensor([13.0, 64, 299, 38, 179]).double(), torch.tensor([3, 0, 4, 1, 2])
    assert_close(sade.sade_shifts(counts[order], 2), sade.sade_shifts(counts, 2)[:, order])
