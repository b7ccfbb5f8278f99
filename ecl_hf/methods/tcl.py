"""A reading of TCL: experts of different depth that learn from those that are right (Zhou and Luo, CVPR 2026).

Known from the paper's published description alone; there is no code. K experts learn by cross-entropy of
`z_k + delta_k log pi`; from each expert that is right on an image the others learn, more so on classes that are rarely
right; and all learn how the mean of the experts ranks what it confuses with the label.

Readings, for what the description leaves open: teachers carry no gradient; means over the batch; the class accuracies
are moving averages, once an epoch, with 0.9 of the old; temperature 1; raw logits in both distillations; images whose
label has the largest mean logit add nothing to the second. No result of this file is a reproduction of the paper.

Published: CIFAR-100-LT, imbalance 100: 58.7; ImageNet-LT, ResNet-50 / ResNeXt-50: 61.6 / 63.0; iNaturalist 2018: 76.9;
Places-LT: 44.2.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import full_precision, pairwise_kl, sum_over_pairs

LABEL_LOGIT = -30.0
"""Logit of the label where the experts learn about the wrong classes alone."""


def class_importance(accuracy: Tensor) -> Tensor:
    """Weights that are large for classes that are rarely right, `sqrt(1 - accuracy)` with mean 1; [C] -> [C].

    All weights are 1 where every class is always right.
    """
    weights = (1 - accuracy).clamp_min(0).sqrt()
    return torch.where(weights.sum() > 0, weights * len(weights) / weights.sum(), torch.ones_like(weights))


def knowledgeable_distillation(expert_logits: Tensor, labels: Tensor, importance: Tensor) -> Tensor:
    """Divergences of each expert from each other one that is right, times the importance of the label's class.

    Args:
        expert_logits: raw logits, [K, B, C].
        labels: class indices, [B].
        importance: `class_importance`, [C].

    Returns:
        Sum over ordered pairs, [B].
    """
    teachers = expert_logits.detach()
    right = (teachers.argmax(-1) == labels) * importance[labels]
    return sum_over_pairs(pairwise_kl(teachers, expert_logits) * right[:, None])


def confusion_calibration(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Divergences of the experts from their mean, in which the wrong classes above the label share one logit.

    The teacher is the mean logits with the average over these classes in place of each of them; in teacher and students
    the label has -30. An image without such classes adds 0.

    Args:
        expert_logits: raw logits, [K, B, C].
        labels: class indices, [B].

    Returns:
        Sum over experts, [B].
    """
    (expert_logits,) = full_precision(expert_logits)
    mean = expert_logits.detach().mean(0)
    label = F.one_hot(labels, mean.shape[-1]).bool()
    above = mean > mean.gather(-1, labels[:, None])
    count = above.sum(-1, keepdim=True)
    average = (mean * above).sum(-1, keepdim=True) / count.clamp_min(1)
    teacher = torch.where(above, average, mean).masked_fill(label, LABEL_LOGIT)
    students = expert_logits.masked_fill(label, LABEL_LOGIT)
    return pairwise_kl(teacher[None], students)[0].sum(0) * (count[:, 0] > 0)
