"""Prior-LT: UniMix and the Bayias loss (Xu et al., NeurIPS 2021).

Read: XuZhengzhuo/Prior-LT@5f2298c core.py, utils.py, config. Bayias is the balanced cross-entropy of `bc`; UniMix mixes
a batch so that rare classes weigh more.

Published (ResNet-32, best test epoch), both together: imbalance 10 CIFAR-10-LT 89.66, CIFAR-100-LT 61.25; imbalance 100
CIFAR-100-LT 45.45.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.data.mixing import beta_draws, mix
from ecl_hf.methods.base import Experts, Method, MixingContext, Stage
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import BALANCED_CROSS_ENTROPY


@dataclass(kw_only=True)
class UniMixSettings(Settings):
    """Of UniMix; CIFAR-10-LT was published with a tau of -0.5."""

    alpha: float = 0.8
    """Shares are drawn from Beta(alpha, alpha), and then turned towards the rarer class."""
    tau: float = -0.1
    """Partners are drawn in proportion to the size of their class to this power."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, f"loss.alpha must be positive, got {self.alpha}")


def partner_probabilities(counts: Tensor, tau: float) -> Tensor:
    """Chance of each image of a batch to be the partner of any other, `~ n_y^tau`.

    Args:
        counts: training images of the class of each image, [B].
        tau: below 0 rare classes are partners more often.

    Returns:
        [B], with sum 1.
    """
    return (tau * counts.log()).softmax(0)


def unimix_shares(draws: Tensor, counts: Tensor, partner_counts: Tensor) -> Tensor:
    """Share of each image in its mixture with its partner: a Beta draw, turned on the circle by `n_j / (n_i + n_j)`.

    Draws near 0 and 1, the usual ones where the exponents of the Beta distribution are below 1, give the rarer image
    the larger share.

    Args:
        draws: from a symmetric Beta distribution, [B].
        counts: training images of the class of each image, [B].
        partner_counts: and of its partner's, [B].

    Returns:
        In [0, 1], [B].
    """
    shares = draws + partner_counts / (counts + partner_counts)
    return shares - (shares > 1).to(shares.dtype)


def unimix(batch: dict[str, Tensor], context: MixingContext) -> dict[str, Tensor]:
    """Mix each picture with a partner from the batch, drawn with replacement, by a share of its own."""
    settings, generator = context.settings, context.generator
    counts = context.class_counts.clamp_min(1).float()[batch["labels"].cpu()]
    partners = torch.multinomial(
        partner_probabilities(counts, settings.tau), len(counts), replacement=True, generator=generator
    )
    draws = beta_draws(settings.alpha, len(counts), generator)
    return mix(batch, partners, unimix_shares(draws, counts, counts[partners]))


METHODS = {
    "unimix_bayias": Method(
        (Stage((BALANCED_CROSS_ENTROPY,), mixing=unimix),), UniMixSettings, experts=Experts(1, most=1)
    )
}
