"""Prior-LT: UniMix and the Bayias loss (Xu et al., NeurIPS 2021).

Read: XuZhengzhuo/Prior-LT@5f2298c core.py, utils.py, config. Bayias is the balanced cross-entropy of `bc`; UniMix mixes
a batch so that rare classes weigh more.

Published (ResNet-32, best test epoch), both together: imbalance 10 CIFAR-10-LT 89.66, CIFAR-100-LT 61.25; imbalance 100
CIFAR-100-LT 45.45.
"""

from torch import Tensor


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
