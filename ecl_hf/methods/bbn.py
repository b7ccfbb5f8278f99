"""BBN: bilateral-branch network with cumulative learning (Zhou et al., CVPR 2020).

Two experts share everything but their last block. The first sees the pictures as they come, the second those of a
sampler that prefers rare classes; one linear classifier reads the features of both, whose shares change over the
training.

Read: Megvii-Nanjing/BBN@7992e90 (lib/core/combiner.py, lib/backbone, lib/net/network.py, lib/dataset, configs).

The published model has the shares 1/2 for ever, which is the mean of two experts with the halves of the classifier. As
published, the shared part sees one stream after the other, so that its BatchNorm counts both. Reading: the logits carry
a uniform prior.

Published (200 epochs, crop and flip, best epoch on the test set): CIFAR-100-LT 59.1, 47.0 and 42.6 for imbalance 10, 50
and 100, CIFAR-10-LT 88.3, 82.2 and 79.8; iNaturalist 2018 66.3 after 90 epochs, 69.6 after 180.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf import losses
from ecl_hf.backbones import all_but_the_last_block
from ecl_hf.checks import require
from ecl_hf.data.samplers import reversed_classes
from ecl_hf.methods.base import (
    Experts,
    HeadKind,
    Method,
    Part,
    PartsContext,
    PerImage,
    Stage,
    TaskOutputs,
    Term,
    Trains,
)
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class BBNSettings(Settings):
    """Of cumulative learning."""

    decay_epochs: int | None = None
    """Epochs after which the branch that sees the pictures as they come would count nothing; the run's own number when
    not given. Published: 100 for 90 epochs, 200 for 180."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.decay_epochs is None or self.decay_epochs >= 1
        require(least, f"loss.decay_epochs must be at least 1, got {self.decay_epochs}")


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


class JointClassifier(Part):
    """The linear classifier on both branches' features; the experts' heads are its halves after each step."""

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * context.width, len(context.class_counts))
        self.heads = [expert.head for expert in context.model.experts]  # a list: no modules of the part

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the experts' heads up to date."""
        for head, weight in zip(self.heads, split_classifier(self.linear.weight), strict=True):
            head.weight.copy_(weight)
            head.bias.copy_(self.linear.bias)


def _cumulative(out: TaskOutputs, settings: BBNSettings) -> PerImage:
    share = conventional_share(out.time.epoch, settings.decay_epochs or out.time.epochs)
    linear = out.parts["supervision"].linear
    features = losses.full_precision(*out.features)
    logits = joint_logits(*features, linear.weight, linear.bias, share)
    return PerImage(joint_losses(logits, out.labels, out.partner_labels, share))


METHODS = {
    "bbn": Method(
        (
            Stage(
                (Term("supervision", _cumulative, part=JointClassifier),),
                partners=reversed_classes,
                apart=True,
                trains=Trains(lambda name: ".head." not in name),
            ),
        ),
        BBNSettings,
        head=HeadKind("linear"),
        experts=Experts(2, least=2, most=2, shared=all_but_the_last_block),
    )
}
