"""SHIKE: experts that teach each other what they confuse with the label (Jin et al., CVPR 2023).

Read: jinyan-06/SHIKE@2b04b62 cifarTrain.py 67-275, networks.py 86-225, utils.py 46-110. First all is trained by
cross-entropy, mutual distillation, and distillation from the hardest wrong class; then second cosine heads, on the
frozen rest, by balanced cross-entropy. Only the second heads are published.

As in the code, both divergences are means over images *and classes* (a factor 1/C), summed over experts or ordered
pairs, and gradient reaches teacher and student. The hard target gives the label the logit 0; the students have -30.

Departures: all experts have the recipe's architecture, whereas the paper's multiply their last map with a shallow
branch from an earlier one, which differs from expert to expert: without it, no result of this file is a reproduction.
What the second stage freezes stays as it is; in the code its BatchNorm statistics move on, and with old versions of
torch also its weights, by momentum and weight decay.

Published, best test epoch on CIFAR: CIFAR-100-LT, ResNet-32, 200 epochs with AutoAugment and Cutout, imbalance 100/50:
56.3 / 59.8; ImageNet-LT, ResNet-50 / ResNeXt-50: 59.7 / 59.6; iNaturalist 2018: 75.4; Places-LT: 41.9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.losses import cross_entropies, full_precision, pairwise_kl, sum_over_pairs
from ecl_hf.methods.base import HEADS, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class SHIKESettings(Settings):
    """Of what the experts learn from each other."""

    hard_negatives: float = 10.0
    """Weight of the divergence from the hardest wrong class."""
    mutual: float = 1.0
    """Weight of the divergence from the other experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hard_negatives", "mutual"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


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


def _supervision(out: TaskOutputs, settings: SHIKESettings) -> PerImage:  # noqa: ARG001
    return PerImage(cross_entropies(out.cls_logits, out.labels).sum(0))


def _hard_negatives(out: TaskOutputs, settings: SHIKESettings) -> PerImage:  # noqa: ARG001
    return PerImage(hard_negative_distillation(out.cls_logits, out.labels))


def _mutual(out: TaskOutputs, settings: SHIKESettings) -> PerImage:  # noqa: ARG001
    return PerImage(mutual_distillation(out.cls_logits))


def _balanced(out: TaskOutputs, settings: SHIKESettings) -> PerImage:  # noqa: ARG001
    return PerImage(cross_entropies(out.cls_logits, out.labels, out.log_prior_shift).sum(0))


SUPERVISION = Term("supervision", _supervision, two_labels=True)
HARD_NEGATIVES = Term("hard_negatives", _hard_negatives, "hard_negatives")
MUTUAL = Term("mutual", _mutual, "mutual")
BALANCED = Term("supervision", _balanced, two_labels=True)

METHODS = {
    "shike": Method(
        (
            Stage((SUPERVISION, HARD_NEGATIVES, MUTUAL), "experts", heads=unit_rows, share=0.9),
            Stage((BALANCED,), "second heads", heads=unit_rows, trains=HEADS, share=0.1, lr=2 / 3),
        ),
        SHIKESettings,
        head=HeadKind("cosine", scale=30.0, bias=False),
    )
}
