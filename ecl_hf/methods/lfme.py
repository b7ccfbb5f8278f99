"""LFME: learning from multiple experts (Xiang, Ding, Han, ECCV 2020).

`lfme_experts` trains one network for the many-shot classes, one for the medium and one for the few-shot ones, each on
the pictures of its group alone. `lfme` trains a single network from labels and from these three: the less the student
falls short of an expert, the less it learns from it, and pictures that are hard for their expert come in slowly.

Read: xiangly55/LFME@0a18a06 (run_network_LFME.py, data/dataloader_LFME.py, loss/DistillationLoss.py,
config/ImageNet_LT). The published code multiplies a picture's logits by its weight, which ends above 1; the paper
weights its loss. Readings: a class whose pictures are all equally hard has weights 1 (published: 0 / 0).

Published: for ImageNet-LT with ResNet-10 and Places-LT; nothing on CIFAR-LT.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ecl_hf import losses

MANY, FEW = 100, 20
"""Classes with more pictures than the first number are many-shot, with fewer than the second few-shot."""


def class_groups(class_counts: Tensor) -> Tensor:
    """Group of each class: 0 many-shot, 1 medium, 2 few-shot.

    Args:
        class_counts: training images of each class, [C].

    Returns:
        [C].
    """
    return 2 - (class_counts > MANY).long() - (class_counts >= FEW).long()


def lowest_weights(class_counts: Tensor) -> Tensor:
    """Weight of a class's hardest picture at the start: mean count of the few-shot classes by that of the own group.

    Published as 12 / 230 and 12 / 53 for ImageNet-LT, which these means are there.

    Args:
        class_counts: training images of each class, [C].

    Returns:
        [C], in (0, 1].
    """
    groups = class_groups(class_counts)
    means = torch.stack([class_counts[groups == group].double().mean() for group in range(3)])
    return (means[groups.max()] / means[groups]).clamp_max(1)


def picture_weights(confidences: Tensor, labels: Tensor, lowest: Tensor) -> Tensor:
    """Confidences scaled within each class to the range from its lowest weight to 1.

    Args:
        confidences: the group's expert's probability of the true class, [N].
        labels: class indices, [N].
        lowest: of each class, [C].

    Returns:
        [N]; 1 in a class whose confidences are all the same.
    """
    least, most = (
        torch.zeros_like(lowest, dtype=confidences.dtype).scatter_reduce(
            0, labels, confidences, how, include_self=False
        )
        for how in ("amin", "amax")
    )
    spread = (most - least)[labels]
    place = torch.where(spread > 0, (confidences - least[labels]) / spread, 1.0)
    return lowest[labels] + (1 - lowest[labels]) * place


def scheduled_weights(weights: Tensor, epoch: int, epochs: int) -> Tensor:
    """Weights of the pictures in an epoch, `w + (1 - w) 2 e / E`: all 1 in the middle of the training.

    Args:
        weights: w, [B].
        epoch: e, from 1.
        epochs: E.

    Returns:
        [B].
    """
    return weights + (1 - weights) * 2 * epoch / epochs


def group_factors(student: Tensor, expert: Tensor, threshold: float) -> Tensor:
    """How much the student learns from each expert: 1 while it is far behind, and nothing when it has come up.

    `min(1, (A_E - A_S) / A_E / (1 - t))`, at least 0.

    Args:
        student: its accuracy on the classes of each group, [G].
        expert: the experts' own, [G]; without a positive one there is nothing to learn.
        threshold: t, share of the expert's accuracy up to which the factor is 1.

    Returns:
        [G], in 0..1.
    """
    gap = (expert - student) / expert.clamp_min(torch.finfo(expert.dtype).tiny)
    return torch.where(expert > 0, (gap / (1 - threshold)).clamp(0, 1), 0.0)


def expert_losses(
    student: Tensor, experts: Tensor, groups: Tensor, factors: Sequence[float] | Tensor, temperature: float
) -> Tensor:
    """Divergence of the student from each expert over the classes of its group, without a factor `T^2`.

    `sum_g f_g KL(softmax(t_g / T) || softmax(z_[g] / T))`, for all pictures, whatever their class.

    Args:
        student: logits z, [B, C].
        experts: the experts' logits over all classes, [G, B, C]; those of other groups' classes are not read.
        groups: group of each class, [C].
        factors: f, [G]; a group without classes counts nothing.
        temperature: T.

    Returns:
        [B].
    """
    total = torch.zeros_like(student[:, 0])
    for group, (expert, factor) in enumerate(zip(experts.detach(), factors, strict=True)):
        own = groups == group
        if own.any():
            total = total + factor * losses.pairwise_kl(expert[None, :, own], student[None, :, own], temperature)[0, 0]
    return total
