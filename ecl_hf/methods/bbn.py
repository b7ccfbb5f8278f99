"""BBN: bilateral-branch network with cumulative learning (Zhou et al., CVPR 2020).

Two experts share everything but their last block. The first sees the pictures as they come, the second those of a
sampler that prefers rare classes; one linear classifier reads the features of both, whose shares change over the
training.

Read: Megvii-Nanjing/BBN@7992e90 (lib/core/combiner.py, lib/backbone, lib/net/network.py, lib/dataset, configs).

Published (200 epochs, crop and flip, best epoch on the test set): CIFAR-100-LT 59.1, 47.0 and 42.6 for imbalance 10, 50
and 100, CIFAR-10-LT 88.3, 82.2 and 79.8; iNaturalist 2018 66.3 after 90 epochs, 69.6 after 180.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf import losses


def conventional_share(epoch: int, decay_epochs: int) -> float:
    """Share of the branch that sees the pictures as they come, `1 - (e / E)^2`.

    Args:
        epoch: e, from 0.
        decay_epochs: E, after which it would be 0.
    """
    return 1 - (epoch / decay_epochs) ** 2


def joint_logits(conventional: Tensor, rebalancing: Tensor, weight: Tensor, bias: Tensor, share: float) -> Tensor:
    """Logits of one classifier on both branches' features, `W [2 a f_c; 2 (1 - a) f_r] + b`.

    Args:
        conventional: features f_c, [B, D].
        rebalancing: features f_r, [B, D].
        weight: [C, 2 D]; its first half reads the conventional branch.
        bias: [C].
        share: a.

    Returns:
        [B, C].
    """
    both = torch.cat([2 * share * conventional, 2 * (1 - share) * rebalancing], dim=-1)
    return F.linear(both, weight, bias)


def joint_losses(logits: Tensor, labels: Tensor, other_labels: Tensor, share: float) -> Tensor:
    """Cross-entropy with the labels of both branches' pictures, `a CE(z, y_c) + (1 - a) CE(z, y_r)`.

    Args:
        logits: z, [B, C].
        labels: y_c, [B].
        other_labels: y_r, [B].
        share: a.

    Returns:
        [B].
    """
    one, other = (losses.cross_entropies(logits, each) for each in (labels, other_labels))
    return share * one + (1 - share) * other


def split_classifier(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of two classifiers whose mean logits are those of the joint one at the share 1/2, with the same bias.

    Args:
        weight: of the joint classifier, [C, 2 D].

    Returns:
        [C, D] each.
    """
    first, second = (2 * weight).chunk(2, dim=1)
    return first, second
