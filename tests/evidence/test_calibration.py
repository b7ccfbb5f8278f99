"""Temperature and class frequencies, against data whose true ones are known."""

import math
import statistics

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from ecl_hf.evidence.calibration import estimate_prior, fit_temperature
from tests.reference import balanced_likelihood


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_temperature_is_the_likeliest_one(truth):
    logits, frequencies = 3 * torch.randn(3000, 5), torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    labels = torch.multinomial((logits / truth + frequencies.log()).softmax(-1), 1)[:, 0]
    found = fit_temperature(logits, labels, frequencies.log())
    as_lists = logits.tolist(), labels.tolist(), frequencies.tolist()
    best = minimize_scalar(
        lambda log: balanced_likelihood(*as_lists, math.exp(log)),
        bounds=(-3, 3),
        method="bounded",
        options={"xatol": 1e-7},
    )
    assert found == pytest.approx(math.exp(best.x), rel=1e-5)
    assert found == pytest.approx(truth, rel=0.1)


def test_temperature_is_for_classes_as_frequent_as_the_logits_take_them_to_be():
    """A model that is rightly sure of the frequent class, and wrongly of the rare ones."""
    labels = torch.tensor([0] * 900 + [1] * 50 + [2] * 50)
    logits = 4.0 * F.one_hot(torch.where(torch.rand(1000) < 0.5, labels, torch.randint(3, (1000,))), 3)
    logits[:900] = 4.0 * F.one_hot(labels[:900], 3)
    frequencies = torch.tensor([0.9, 0.05, 0.05])
    balanced = fit_temperature(logits, labels, frequencies.log() - torch.tensor(1 / 3).log())
    assert balanced > 2 * fit_temperature(logits, labels, torch.zeros(3))  # the logits carry the prior of the pictures
    confidence = (logits / balanced).softmax(-1).amax(-1)
    right = logits.argmax(-1) == labels
    means = [
        statistics.mean(values[labels == label].float().mean().item() for label in range(3))
        for values in (confidence, right)
    ]
    assert means[0] == pytest.approx(means[1], abs=0.03)


def test_pictures_that_are_all_right_leave_the_confidence_below_one():
    labels = torch.arange(40) % 2
    logits = F.one_hot(labels, 2) * torch.linspace(0.3, 2, 40)[:, None]
    prior = torch.zeros(2)
    sure = (logits / fit_temperature(logits, labels, prior)).softmax(-1).gather(1, labels[:, None])
    assert 0.95 < sure.mean() < 0.99
    few = (logits[:4] / fit_temperature(logits[:4], labels[:4], prior)).softmax(-1).gather(1, labels[:4, None])
    assert few.mean() < sure.mean()


def test_prior_of_unlabelled_pictures_is_found():
    """Gaussian classes, for which the classifier of the training prior is known exactly."""
    train, truth = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    means = 1.5 * torch.eye(3, dtype=torch.float64)
    labels = torch.multinomial(truth, 20_000, replacement=True)
    points = means[labels] + torch.randn(20_000, 3, dtype=torch.float64)
    probabilities = (-0.5 * torch.cdist(points, means) ** 2 + train.double().log()).softmax(-1)
    found = estimate_prior(probabilities, train)
    assert found.sum().item() == pytest.approx(1)
    assert (found - truth).abs().max() < 0.02
    assert (probabilities.mean(0) - truth).abs().max() > 0.1  # which counting would give
    # A fixed point: the mean of the probabilities under the found prior is that prior.
    moved = probabilities * (found / train.double())
    torch.testing.assert_close((moved / moved.sum(-1, keepdim=True)).mean(0), found, atol=1e-6, rtol=0)


def test_no_picture_has_no_prior():
    with pytest.raises(ValueError, match="from no picture"):
        estimate_prior(torch.zeros(0, 3), torch.ones(3))
