"""A reading of ACE: ally complementary experts, each for a smaller set of rarer classes (Cai et al., ICCV 2021).

There is no code; this follows the paper's description where it could be read, and readings elsewhere. The first expert
learns all classes, each further one a smaller set of the rarest. An image teaches the experts whose set has its
class, by cross-entropy over all classes; there the other classes' logits are pulled to zero. Only the first expert
teaches the shared stages, and a further expert's learning rate is in proportion to its share of the images. A class is
scored by the mean over the experts that know it, after all were brought to the scale of the first one's weights.

Readings: the pull is the sum of squares with weight 1; sets are cut at equal numbers of classes; the scale is the ratio
of the weight matrices' Frobenius norms; average pooling, where the paper has a learnt one. No result of this file is a
reproduction of the paper.

Published, 4 experts, 400 epochs: CIFAR-100-LT, imbalance 50/100: 51.9 / 49.6; CIFAR-10-LT: 84.9 / 81.4; ImageNet-LT,
ResNet-50 / ResNeXt-50: 54.7 / 56.6; iNaturalist 2018: 72.9.
"""

import torch
from torch import Tensor

from ecl_hf.losses import cross_entropies, full_precision


def nested_class_sets(class_counts: Tensor, num_experts: int) -> Tensor:
    """Classes of each expert: all for the first, of the rest each `C / K` of the most frequent ones fewer.

    Args:
        class_counts: training images of each class, [C].
        num_experts: K.

    Returns:
        Boolean [K, C]; each set holds the next.
    """
    rank = class_counts.argsort(descending=True, stable=True).argsort()
    starts = [len(rank) * k // num_experts for k in range(num_experts)]
    return torch.stack([rank >= start for start in starts])


def complementary_losses(expert_logits: Tensor, labels: Tensor, class_sets: Tensor) -> Tensor:
    """Cross-entropy plus the squares of the logits of classes that the expert does not know.

    Args:
        expert_logits: raw logits, [K, B, C].
        labels: class indices, [B].
        class_sets: classes that each expert knows, boolean [K, C].

    Returns:
        [K, B]; 0 where the expert does not know the label.
    """
    (expert_logits,) = full_precision(expert_logits)
    cross_entropy = cross_entropies(expert_logits, labels)
    pull = (expert_logits.square() * ~class_sets[:, None]).sum(-1)
    return (cross_entropy + pull) * class_sets[:, labels]


def mean_over_known(losses: Tensor, class_sets: Tensor, labels: Tensor) -> Tensor:
    """Each expert's mean over the images that it knows, summed over the experts; [K, B], [K, C], [B] -> [].

    An expert without an image in the batch adds 0.
    """
    return (losses.sum(-1) / class_sets[:, labels].sum(-1).clamp_min(1)).sum()
