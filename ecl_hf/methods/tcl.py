"""A reading of TCL: experts that learn from those that are right (Zhou and Luo, CVPR 2026).

Known from the paper's published description alone; there is no code. K experts learn by cross-entropy of
`z_k + delta_k log pi`; from each expert that is right on an image the others learn, more so on classes that are rarely
right; and all learn how the mean of the experts ranks what it confuses with the label.

Readings, for what the description leaves open: teachers carry no gradient; means over the batch; the class accuracies
are those of the mean logits on the training set in the evaluation view, in moving averages with 0.9 of the old, once an
epoch; temperature 1; raw logits in both distillations; images whose label has the largest mean logit add nothing to the
second; the architecture is SHIKE's, which it is said to resemble. No result of this file is a reproduction of the
paper.

Published: CIFAR-100-LT, imbalance 100: 58.7; ImageNet-LT, ResNet-50 / ResNeXt-50: 61.6 / 63.0; iNaturalist 2018: 76.9;
Places-LT: 44.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.losses import (
    carried_log_prior,
    full_precision,
    pairwise_kl,
    prior_shifts,
    shifted_cross_entropy,
    spread,
    sum_over_pairs,
)
from ecl_hf.methods.base import EpochContext, HeadKind, Method, Part, PartsContext, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.shike import SIDE_BRANCHES

LABEL_LOGIT = -30.0
"""Logit of the label where the experts learn about the wrong classes alone."""


@dataclass(kw_only=True)
class TCLSettings(Settings):
    """Of the experts' shares of the prior, and of what they learn from each other."""

    least_tau: float = 0.9
    """Strength of the class prior in the first expert's cross-entropy."""
    most_tau: float = 1.1
    """The same of the last one; the others lie between at equal distances."""
    calibration: float = 0.02
    """Weight of the divergence from the mean's ranking of the wrong classes."""
    accuracy_decay: float = 0.9
    """Of the moving average of the class accuracies, once an epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = f"{self.least_tau} and {self.most_tau}"
        require(self.least_tau <= self.most_tau, f"loss.least_tau must not exceed loss.most_tau, got {limits}")
        require(self.calibration >= 0, f"loss.calibration must not be negative, got {self.calibration}")
        require(0 <= self.accuracy_decay <= 1, f"loss.accuracy_decay must lie in 0..1, got {self.accuracy_decay}")


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


class ClassAccuracy(Part):
    """Moving average of the accuracy of each class on the training set, [C]."""

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        self.register_buffer("accuracy", torch.zeros(len(context.class_counts)))

    def after_epoch(self, context: EpochContext) -> None:
        """Look at all training pictures once."""
        labels, logits, _ = context.predict()
        labels, logits = labels[labels >= 0], logits[labels >= 0]
        right = logits.mean(1).argmax(-1) == labels
        pictures = torch.bincount(labels, minlength=len(self.accuracy))
        found = torch.bincount(labels[right], minlength=len(self.accuracy)) / pictures.clamp_min(1)
        self.accuracy.lerp_(found.to(self.accuracy), 1 - context.settings.accuracy_decay)


def tcl_shifts(class_counts: Tensor, settings: TCLSettings, num_experts: int) -> Tensor:
    """Added to the logits of the experts: `delta_k log pi`; [C] -> [K, C]."""
    return prior_shifts(class_counts, spread(settings.least_tau, settings.most_tau, num_experts))


def _supervision(out: TaskOutputs, settings: TCLSettings) -> PerImage:
    shifts = tcl_shifts(out.class_counts, settings, len(out.cls_logits))
    return PerImage(shifted_cross_entropy(out.cls_logits, out.labels, shifts).sum(0))


def _knowledge(out: TaskOutputs, settings: TCLSettings) -> PerImage:  # noqa: ARG001
    importance = class_importance(out.parts["knowledge"].accuracy)
    return PerImage(knowledgeable_distillation(out.cls_logits, out.labels, importance))


def _calibration(out: TaskOutputs, settings: TCLSettings) -> PerImage:  # noqa: ARG001
    return PerImage(confusion_calibration(out.cls_logits, out.labels))


def _carried(class_counts: Tensor, settings: TCLSettings, num_experts: int) -> Tensor:
    return carried_log_prior(class_counts, tcl_shifts(class_counts, settings, num_experts))


SUPERVISION = Term("supervision", _supervision, two_labels=True)
KNOWLEDGE = Term("knowledge", _knowledge, part=ClassAccuracy)
CALIBRATION = Term("calibration", _calibration, "calibration")

METHODS = {
    "tcl": Method(
        (Stage((SUPERVISION, KNOWLEDGE, CALIBRATION), heads=unit_rows),),
        TCLSettings,
        head=HeadKind("cosine", scale=30.0, bias=False),
        experts=SIDE_BRANCHES,
        logit_prior=_carried,
    )
}
