"""TDE + IDR: causal norm, sampled by the difficulty of each image (Yu et al., CVPR 2022).

A reading from the paper's idea, not checked against its text or any code (none is public); no result of it reproduces a
published one. A image is hard when its predictions unlearn more than they learn. From one epoch to the next, class j's
probability moves by `D_j = (q_j - q'_j) log(q_j / q'_j)`, which is never negative. It is unlearned where the label's
probability falls or another's rises, and learned otherwise. The next epoch draws images in proportion to

    (c + all that was unlearned) / (c + all that was learned)

Readings: all images are looked at once after each epoch, in the evaluation view, so that those not drawn have a
prediction too; before the first epoch every class has the probability 1 / C; c = 1; probabilities are at least 1e-6.
The model is that of `tde`. What is remembered takes 4 N C bytes, 4 MB for CIFAR-100-LT and 14 GB for iNaturalist 2018.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.data.samplers import by_weights
from ecl_hf.methods.base import EpochContext, Experts, Method, Part, PartsContext, Stage
from ecl_hf.methods.tde import TWO_CHUNKS, TDESettings, causal_norm
from ecl_hf.methods.terms import CROSS_ENTROPY

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


@dataclass(kw_only=True)
class TDEIDRSettings(TDESettings):
    """Of causal norm with instance difficulty."""

    difficulty_prior: float = 1.0
    """What is added to all that was learned and unlearned of an image; the larger, the more alike all images are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.difficulty_prior > 0, f"loss.difficulty_prior must be positive, got {self.difficulty_prior}")


class Difficulty(Part):
    """Follows the predictions of all training images, and weighs the images by their difficulty."""

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        images, classes = len(context.labels), len(context.class_counts)
        self.prior = context.settings.difficulty_prior
        self.register_buffer("probabilities", torch.full((images, classes), 1 / classes))
        self.register_buffer("unlearned", torch.zeros(images))
        self.register_buffer("learned", torch.zeros(images))

    @property
    def picture_weights(self) -> Tensor:
        """Difficulty of each image, [N]."""
        return difficulty(self.unlearned, self.learned, self.prior)

    @torch.no_grad()
    def after_epoch(self, context: EpochContext) -> None:
        """Look at all images once."""
        labels, logits, _ = context.predict()
        labels, now = labels.to(self.learned.device), logits.to(self.learned).mean(1).softmax(-1)
        seen = labels >= 0
        unlearned, learned = prediction_moves(self.probabilities[seen], now[seen], labels[seen])
        self.unlearned[seen] += unlearned
        self.learned[seen] += learned
        self.probabilities[seen] = now[seen]


METHODS = {
    "tde_idr": Method(
        (Stage((replace(CROSS_ENTROPY, part=Difficulty),), sampler=by_weights, heads=causal_norm),),
        TDEIDRSettings,
        head=TWO_CHUNKS,
        experts=Experts(1, most=1),
    )
}
