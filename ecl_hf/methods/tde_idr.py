"""TDE + IDR: causal norm, sampled by the difficulty of each image (Yu et al., CVPR 2022).

A reading from the paper's idea, not checked against its text or any code (none is public); no result of it reproduces a
published one. A image is hard when its predictions unlearn more than they learn. From one epoch to the next, class j's
probability moves by `D_j = (q_j - q'_j) log(q_j / q'_j)`, which is never negative. It is unlearned where the label's
probability falls or another's rises, and learned otherwise. The next epoch draws images in proportion to

    (c + all that was unlearned) / (c + all that was learned)

Readings: all images are looked at once after each epoch, in the evaluation view, so that those not drawn have a
prediction too; before the first epoch every class has the probability 1 / C; c = 1; probabilities are at least 1e-6.
The model is that of `tde`.
"""

import torch
from torch import Tensor

MIN_PROBABILITY = 1e-6


def prediction_moves(before: Tensor, now: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the images was unlearned and learned between two predictions.

    Args:
        before: probabilities, [N, C].
        now: probabilities, [N, C].
        labels: class indices, [N].

    Returns:
        Unlearned and learned, [N] each, not negative.
    """
    before, now = before.clamp_min(MIN_PROBABILITY), now.clamp_min(MIN_PROBABILITY)
    moves = (now - before) * (now / before).log()
    wrong = now > before  # of all classes but the label's
    rows = torch.arange(len(labels), device=labels.device)
    wrong[rows, labels] = now[rows, labels] < before[rows, labels]
    return (moves * wrong).sum(-1), (moves * ~wrong).sum(-1)


def difficulty(unlearned: Tensor, learned: Tensor, prior: float) -> Tensor:
    """`(c + unlearned) / (c + learned)`, both summed over the epochs; 1 for a image whose prediction never moved.

    Args:
        unlearned: [N].
        learned: [N].
        prior: c; the larger, the more alike all images are.

    Returns:
        [N], positive.
    """
    return (prior + unlearned) / (prior + learned)
