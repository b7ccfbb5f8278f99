"""LFME: learning from multiple experts (Xiang, Ding, Han, ECCV 2020).

`lfme_experts` trains one network for the many-shot classes, one for the medium and one for the few-shot ones, each on
the pictures of its group alone. `lfme` trains a single network from labels and from these three: the less the student
falls short of an expert, the less it learns from it, and pictures that are hard for their expert come in slowly.

Read: xiangly55/LFME@0a18a06 (run_network_LFME.py, data/dataloader_LFME.py, loss/DistillationLoss.py,
config/ImageNet_LT). The published code multiplies a picture's logits by its weight, which ends above 1; the paper
weights its loss. Readings: a class whose pictures are all equally hard has weights 1 (published: 0 / 0). The three
experts are one run, each on its group's pictures of every batch (published: three runs); accuracies are those on the
training pictures, since a run need not have others; no layer lies before the heads (published for ResNet-10: one).

Published: for ImageNet-LT with ResNet-10 and Places-LT; nothing on CIFAR-LT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.data.samplers import class_aware
from ecl_hf.methods.base import (
    EpochContext,
    Experts,
    FinishContext,
    HeadKind,
    Method,
    Part,
    PartsContext,
    PerImage,
    Stage,
    TaskOutputs,
    Term,
)
from ecl_hf.methods.settings import Settings

MANY, FEW = 100, 20
"""Classes with more pictures than the first number are many-shot, with fewer than the second few-shot."""
GROUPS = 3
FOREIGN = -30.0
"""Logit of an expert for the classes of the others."""


@dataclass(kw_only=True)
class LFMESettings(Settings):
    """Of the student of three experts."""

    temperature: float = 2.0
    """Temperature of the experts' and the student's probabilities."""
    threshold: float = 0.3
    """Share of an expert's accuracy up to which the student learns from it with full weight."""
    weigh: Literal["logits", "loss"] = "logits"
    """What the weight of a picture is a factor on: its logits, as in the published code, or its cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"loss.temperature must be positive, got {self.temperature}")
        require(0 <= self.threshold < 1, f"loss.threshold must lie in [0, 1), got {self.threshold}")


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


def within_groups(logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Logits of the experts in whose groups the images are, over the classes of these groups alone.

    Args:
        logits: [G, B, C].
        labels: class indices, [B].
        groups: group of each class, [C].

    Returns:
        [B, C]; `-inf` for classes of other groups.
    """
    group = groups[labels]
    own = logits[group, torch.arange(len(labels), device=labels.device)]
    return own.masked_fill(groups != group[:, None], -torch.inf)


class Curriculum(Part):
    """Weights of the pictures, by how hard they are for their expert, and weights of the experts, by who is better."""

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        self.register_buffer("weights", torch.ones(len(context.labels)))
        self.register_buffer("expert_accuracy", torch.zeros(GROUPS))
        self.register_buffer("factors", torch.ones(GROUPS))

    def before_epoch(self, context: EpochContext) -> None:
        """Ask the experts before the first epoch, and the student before each later one."""
        groups = class_groups(context.class_counts)
        labels, logits, _ = context.predict() if context.time.epoch else context.teacher()
        known = labels >= 0
        labels, logits = labels[known], logits[known].transpose(0, 1).float()
        if context.time.epoch == 0:
            require(
                len(logits) == GROUPS,
                f"model.teacher has {len(logits)} experts; a run of lfme_experts makes a fitting one",
            )
            own = within_groups(logits, labels, groups)
            confidences = own.softmax(-1).gather(1, labels[:, None])[:, 0]
            lowest = lowest_weights(context.class_counts).to(confidences)
            self.weights[known.to(self.weights.device)] = picture_weights(confidences, labels, lowest).to(self.weights)
            self.expert_accuracy.copy_(_accuracy(own, labels, groups))
        else:
            student = _accuracy(logits.mean(0), labels, groups).to(self.factors)
            self.factors.copy_(group_factors(student, self.expert_accuracy, context.settings.threshold))

    def scheduled(self, out: TaskOutputs) -> Tensor:
        """Weights of the batch's pictures in the running epoch, [B]."""
        return scheduled_weights(self.weights[out.indices], out.time.epoch + 1, out.time.epochs)


def _accuracy(logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Share of right images of each group, [G]; 0 for a group without images."""
    right, group = (logits.argmax(-1) == labels).float(), groups[labels]
    return torch.stack([right[group == g].sum() / (group == g).sum().clamp_min(1) for g in range(GROUPS)])


def _by_experts(out: TaskOutputs, _: Any) -> PerImage:
    """Each expert's cross-entropy is a mean over its group's images: they weigh N / N_g."""
    counts = out.class_counts
    groups = class_groups(counts)
    of_groups = counts.new_zeros(GROUPS).index_add_(0, groups, counts)
    logits = within_groups(*losses.full_precision(out.cls_logits), out.labels, groups)
    return PerImage(losses.cross_entropies(logits, out.labels) * counts.sum() / of_groups[groups[out.labels]])


@torch.no_grad()
def _keep_to_groups(context: FinishContext) -> None:
    """Let each expert answer with the classes of its group alone, and the ensemble ask for each class its expert."""
    groups = class_groups(context.class_counts)
    for group, expert in enumerate(context.model.experts):
        foreign = groups.to(expert.head.weight.device) != group
        expert.head.weight[foreign] = 0
        expert.head.bias[foreign] = FOREIGN
    context.model.config.aggregation = [(groups == group).float().tolist() for group in range(GROUPS)]


def _student_logits(out: TaskOutputs, settings: LFMESettings) -> tuple[Tensor, Tensor]:
    """Logits of the student, and weights of its cross-entropies."""
    weights = out.parts["supervision"].scheduled(out)
    if settings.weigh == "logits":
        return weights[:, None] * out.cls_logits[0], torch.ones_like(weights)
    return out.cls_logits[0], weights


def _supervision(out: TaskOutputs, settings: LFMESettings) -> PerImage:
    logits, weights = _student_logits(out, settings)
    return PerImage(weights * losses.cross_entropies(logits, out.labels))


def _experts(out: TaskOutputs, settings: LFMESettings) -> PerImage:
    logits, _ = _student_logits(out, settings)
    factors = out.parts["supervision"].factors
    groups = class_groups(out.class_counts)
    return PerImage(expert_losses(logits, out.teacher.logits, groups, factors, settings.temperature))


METHODS = {
    "lfme_experts": Method(
        (Stage((Term("supervision", _by_experts),)),),
        head=HeadKind("linear"),
        experts=Experts(GROUPS, least=GROUPS, most=GROUPS),
        finish=(_keep_to_groups,),
    ),
    "lfme": Method(
        (
            Stage(
                (
                    Term("supervision", _supervision, part=Curriculum),
                    Term("experts", _experts, needs=frozenset({"teacher"})),
                ),
                sampler=class_aware(4),
            ),
        ),
        LFMESettings,
        head=HeadKind("linear"),
        experts=Experts(1, most=1),
        teacher="lfme_experts",
    ),
}
