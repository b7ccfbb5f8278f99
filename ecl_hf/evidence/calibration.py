"""True confidences, and the class frequencies of pictures without labels."""

import torch
from torch import Tensor
from torch.nn import functional as F

RANGE = (0.01, 100.0)
"""Temperatures that are looked at."""


def fit_temperature(logits: Tensor, labels: Tensor, prior: Tensor) -> float:
    """The temperature T that makes `softmax(z / T)` likeliest (Guo et al., ICML 2017, Sec. 4.2).

    Pictures are weighted so that classes are as frequent as the logits take them to be: else the frequent ones, of
    which a model is surer, would choose a temperature that makes it too sure of all others.

    The likelihood is concave in 1 / T, so that halving the interval finds its top. It has none where all pictures are
    right: as in Platt's scaling (1999, Sec. 2.2), a share of 2 / (N + 2) of each label is spread over the classes.

    Args:
        logits: raw logits z of pictures that were not trained on, [N, C].
        labels: [N].
        prior: log prior of those pictures less the log prior that the logits carry, [C].

    Returns:
        A number in 0.01..100.
    """
    logits, weights = logits.double(), (-prior.double())[labels].softmax(0)
    spread = 2 / (len(labels) + 2)
    low, high = 1 / RANGE[1], 1 / RANGE[0]
    for _ in range(60):
        sharpness = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        losses = F.cross_entropy(sharpness * logits, labels, label_smoothing=spread, reduction="none")
        [slope] = torch.autograd.grad(weights @ losses, sharpness)
        low, high = (low, sharpness.item()) if slope > 0 else (sharpness.item(), high)
    return 2 / (low + high)


def estimate_prior(probabilities: Tensor, prior: Tensor, steps: int = 1000, tolerance: float = 1e-9) -> Tensor:
    """Class frequencies of unlabelled pictures, by EM (Saerens, Latinne and Decaestecker, Neural Computation 2002).

    Each step moves the probabilities to the frequencies found so far (E) and takes their mean (M), Eq. 2.9.

    Args:
        probabilities: of a classifier that is calibrated for `prior`, rows that sum to one, [N, C].
        prior: class probabilities that these outputs carry, [C].
        steps: at most.
        tolerance: largest change of a frequency at which it ends.

    Returns:
        [C], float64, sums to one.

    Raises:
        ValueError: there is no picture.
    """
    if not len(probabilities):
        raise ValueError("class frequencies can't be estimated from no picture")
    probabilities, prior = probabilities.double(), prior.double() / prior.sum()
    found = prior
    for _ in range(steps):
        moved = probabilities * (found / prior)
        new = (moved / moved.sum(-1, keepdim=True)).mean(0)
        change, found = (new - found).abs().max(), new
        if change < tolerance:
            break
    return found
