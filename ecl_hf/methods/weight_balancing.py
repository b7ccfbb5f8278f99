"""Weight balancing (LTR-WD; Alshammari et al., CVPR 2022).

Stage 1 is cross-entropy with a weight decay ten times the usual one, which alone keeps the rows of the classifier from
growing with their classes. Stage 2 trains the classifier on with a class-balanced loss, a very strong weight decay and
MaxNorm: after each epoch the rows are cut to a length that was fixed before.

Read: ShadeAlsha/LTR-weight-balancing@e89f292 (utils/regularizers.py, utils/trainval.py, utils/class_balanced_loss.py,
both notebooks).

The loss of stage 2 is the published one: binary cross-entropy of softmax probabilities, about 1 / C as large as
cross-entropy, so that the weight decay of 0.1 has the upper hand. It comes from a port of Cui et al.'s "softmax" loss,
which is another. Weight decay and length belong to the method: stage 1 takes `optim.weight_decay` (published 0.005 for
CIFAR-100-LT, the default), stage 2 its own. As published, the BatchNorm layers of the frozen encoder go on counting;
`shift_statistics` turns it off. The second stage has a twentieth of all epochs (published: 320 and 10).

Published top-1 on CIFAR-100-LT with an imbalance factor of 100 (the notebooks' best test epoch): 53.1, and 47.9 after
stage 1. The network, called ResNet-32 there, is a ResNet-34 of 21 million parameters, 46 times as large as ResNet-32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.losses import effective_number_weights, full_precision
from ecl_hf.methods.base import EpochContext, Method, Part, PartsContext, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.decoupling import HEADS_ALONE, ONE_LINEAR, FrozenEncoderSettings, representation


def softmax_binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each class's softmax probability with 1 for the label and 0 for the others.

    Args:
        logits: [B, C].
        labels: class indices, [B].

    Returns:
        Mean over the classes, [B].
    """
    (logits,) = full_precision(logits)
    target = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    return F.binary_cross_entropy(logits.softmax(-1), target, reduction="none").mean(-1)


def norm_limit(weight: Tensor, share: float) -> Tensor:
    """The length that MaxNorm allows, `min_c |w_c| + share * (max_c |w_c| - min_c |w_c|)`.

    Args:
        weight: rows of the classifier before stage 2, [C, D].
        share: in 0..1; 1 allows all that there is.

    Returns:
        [].
    """
    norms = weight.norm(dim=-1)
    return torch.lerp(norms.min(), norms.max(), share)


def limit_norms(weight: Tensor, limit: Tensor | float) -> Tensor:
    """MaxNorm: rows that are longer than the limit, cut to it, `w_c min(1, limit / |w_c|)`.

    Args:
        weight: [C, D].
        limit: a length.

    Returns:
        [C, D].
    """
    return weight * (limit / weight.norm(dim=-1, keepdim=True)).clamp_max(1)


@dataclass(kw_only=True)
class WeightBalancingSettings(FrozenEncoderSettings):
    """Of the second stage of weight balancing."""

    beta: float = 0.9999
    """Of the effective number of images, which weighs the classes."""
    head_weight_decay: float = 0.1
    """Weight decay of the classifier."""
    norm_share: float = 0.1
    """Length of the longest rows: this share of the way from the shortest row of the first stage to its longest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta < 1, f"loss.beta must lie in [0, 1), got {self.beta}")
        require(
            self.head_weight_decay >= 0, f"loss.head_weight_decay must not be negative, got {self.head_weight_decay}"
        )
        require(0 <= self.norm_share <= 1, f"loss.norm_share must lie in 0..1, got {self.norm_share}")


class MaxNorm(Part):
    """Cuts the rows of the classifiers after each epoch to a length that is fixed when the stage begins."""

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        limits = [norm_limit(e.head.weight.detach(), context.settings.norm_share) for e in context.model.experts]
        self.register_buffer("limits", torch.stack(limits))

    @torch.no_grad()
    def after_epoch(self, context: EpochContext) -> None:
        """Cut what is longer."""
        for limit, expert in zip(self.limits, context.model.experts, strict=True):
            expert.head.weight.copy_(limit_norms(expert.head.weight, limit))


def _balanced(out: TaskOutputs, settings: WeightBalancingSettings) -> PerImage:
    losses = torch.stack([softmax_binary_cross_entropy(z, out.labels) for z in out.cls_logits]).mean(0)
    weights = effective_number_weights(out.class_counts, settings.beta)
    return PerImage(weights[out.labels] * losses)


METHODS = {
    "weight_balancing": Method(
        (
            representation(0.95),
            Stage(
                (Term("supervision", _balanced, part=MaxNorm, two_labels=True),),
                "classifier",
                trains=HEADS_ALONE,
                share=0.05,
                schedule="cosine",
                weight_decay=lambda settings: settings.head_weight_decay,
            ),
        ),
        WeightBalancingSettings,
        **ONE_LINEAR,
    )
}
