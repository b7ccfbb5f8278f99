"""SHIKE: experts that teach each other what they confuse with the label (Jin et al., CVPR 2023).

Read: jinyan-06/SHIKE@2b04b62 cifarTrain.py 67-275, networks.py 86-225, utils.py 46-110. First all is trained by
cross-entropy, mutual distillation, and distillation from the hardest wrong class; then second cosine heads, on the
frozen rest, by balanced cross-entropy. Only the second heads are published.

As in the code, both divergences are means over images *and classes* (a factor 1/C), summed over experts or ordered
pairs, and gradient reaches teacher and student. The hard target gives the label the logit 0; the students have -30.

The experts share all stages but the last, and each multiplies its last map with what a branch of its own makes of a
shared stage's map: the first expert takes the first stage's, the second the second's, and so on in turn. This is the
published network for CIFAR but for its shortcuts, which are convolutions there (option B); for other encoders it is a
reading. Where nothing is shared, as with an encoder that can't be cut, there are no branches.

Departure: what the second stage freezes stays as it is; in the code its BatchNorm statistics move on, and with old
versions of torch also its weights, by momentum and weight decay.

Published, best test epoch on CIFAR: CIFAR-100-LT, ResNet-32, 200 epochs with AutoAugment and Cutout, imbalance 100/50:
56.3 / 59.8; ImageNet-LT, ResNet-50 / ResNeXt-50: 59.7 / 59.6; iNaturalist 2018: 75.4; Places-LT: 41.9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.backbones import stage_names
from ecl_hf.checks import require
from ecl_hf.losses import cross_entropies, full_precision, pairwise_kl, sum_over_pairs
from ecl_hf.methods.base import HEADS, Experts, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
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


def all_but_the_last_stage(encoder: nn.Module) -> tuple[int, int]:
    """Stages that the experts share: 2 of 3 of a CIFAR ResNet, 3 of 4 of others; none elsewhere."""
    stages = len(stage_names(encoder))
    return (stages - 1 if stages in (3, 4) and hasattr(encoder, "forward_intermediates") else 0), 0


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

SIDE_BRANCHES = Experts(shared=all_but_the_last_stage, side_branches=True)

METHODS = {
    "shike": Method(
        (
            Stage((SUPERVISION, HARD_NEGATIVES, MUTUAL), "experts", heads=unit_rows, share=0.9),
            Stage((BALANCED,), "second heads", heads=unit_rows, trains=HEADS, share=0.1, lr=2 / 3),
        ),
        SHIKESettings,
        head=HeadKind("cosine", scale=30.0, bias=False),
        experts=SIDE_BRANCHES,
    )
}
