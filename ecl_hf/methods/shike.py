"""SHIKE: experts of different depth that teach each other what they confuse with the label (Jin et al., CVPR 2023).

Read: jinyan-06/SHIKE@2b04b62 cifarTrain.py 67-275, networks.py 86-225, utils.py 46-110. First all is trained by
cross-entropy, mutual distillation, and distillation from the hardest wrong class; then second cosine heads, on the
frozen rest, by balanced cross-entropy. Only the second heads are published.

As in the code, both divergences are means over images *and classes* (a factor 1/C), summed over experts or ordered
pairs, and gradient reaches teacher and student. The hard target gives the label the logit 0; the students have -30.

Departures: what the second stage freezes stays as it is. In the code its BatchNorm statistics move on, and with old
versions of torch also its weights, by momentum and weight decay.

Published, best test epoch on CIFAR: CIFAR-100-LT, ResNet-32, 200 epochs with AutoAugment and Cutout, imbalance 100/50:
56.3 / 59.8; ImageNet-LT, ResNet-50 / ResNeXt-50: 59.7 / 59.6; iNaturalist 2018: 75.4; Places-LT: 41.9.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import full_precision, pairwise_kl, sum_over_pairs

LABEL_LOGIT = -30.0
"""Logit of the label where the students learn about the wrong classes alone."""


def hard_target(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Logits that teach the hardest wrong class.

    It is the wrong class with the largest mean logit, and keeps this mean; the label has 0; every other class has the
    largest of the experts' logits.

    Args:
        expert_logits: raw logits, [K, B, C].
        labels: class indices, [B].

    Returns:
        [B, C].
    """
    (expert_logits,) = full_precision(expert_logits)
    label = F.one_hot(labels, expert_logits.shape[-1]).bool()
    mean = expert_logits.mean(0)
    hardest = mean.detach().masked_fill(label, -torch.inf).argmax(-1)
    hard = F.one_hot(hardest, expert_logits.shape[-1]).bool()
    return torch.where(hard, mean, expert_logits.amax(0)).masked_fill(label, 0.0)


def hard_negative_distillation(expert_logits: Tensor, labels: Tensor) -> Tensor:
    """Divergence of each expert from `hard_target`, its label's logit set to -30: mean over classes, sum over experts.

    Args:
        expert_logits: raw logits, [K, B, C].
        labels: class indices, [B].

    Returns:
        [B].
    """
    (expert_logits,) = full_precision(expert_logits)
    label = F.one_hot(labels, expert_logits.shape[-1]).bool()
    students = expert_logits.masked_fill(label, LABEL_LOGIT)
    return pairwise_kl(hard_target(expert_logits, labels)[None], students)[0].sum(0) / expert_logits.shape[-1]


def mutual_distillation(expert_logits: Tensor) -> Tensor:
    """Divergence of each expert from each other one: mean over classes, sum over ordered pairs; [K, B, C] -> [B]."""
    return sum_over_pairs(pairwise_kl(expert_logits, expert_logits)) / expert_logits.shape[-1]
