"""Temperature and class frequencies, against data whose true ones are known."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from ecl_hf.evidence.calibration import estimate_prior, fit_temperature


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_temperature_is_the_likeliest_one(truth):
    logits, prior = 3 * torch.randn(4000, 5), torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1]).log()
    labels = torch.multinomial((logits / truth + prior).softmax(-1), 1)[:, 0]
    found = fit_temperature(logits, labels, prior)
    targets = F.one_hot(labels, 5).double() * 4000 / 4002 + 2 / 4002 / 5
    best = minimize_scalar(
        lambda log: F.cross_entropy(logits.double() / torch.tensor(log).double().exp() + prior, targets).item(),
        bounds=(-4, 4),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert found == pytest.approx(torch.tensor(best.x).exp().item(), rel=1e-5)
    assert found == pytest.approx(truth, rel=0.1)


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
