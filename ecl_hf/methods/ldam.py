"""LDAM, and LDAM with deferred re-weighting (Cao et al., NeurIPS 2019).

Read: kaidic/LDAM-DRW@2536330 losses.py, cifar_train.py, models/resnet_cifar.py.

Reading: re-weighting begins after four fifths of training, at the first drop of the published learning rate (epoch 160
of 200). The published code counts it in steps of 160 epochs into a list of two, and cannot train for more than 320.

Published (ResNet-32, imbalance 10/100, best test epoch) for LDAM-DRW: CIFAR-10-LT 88.16 / 77.03, CIFAR-100-LT
58.71 / 42.04.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.methods.base import Experts, HeadContext, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import DeferredSettings, Settings
from ecl_hf.methods.terms import deferred_weights


@dataclass(kw_only=True)
class LDAMSettings(Settings):
    """Of the label-distribution-aware margins."""

    max_margin: float = 0.5
    """Margin of the rarest class, as a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_margin >= 0, f"loss.max_margin must not be negative, got {self.max_margin}")


@dataclass(kw_only=True)
class LDAMDRWSettings(DeferredSettings, LDAMSettings):
    """Of LDAM with deferred re-weighting."""


def ldam_margins(class_counts: Tensor, max_margin: float) -> Tensor:
    """Margins `n_c^(-1/4)`, scaled so that the rarest class has `max_margin`; [C] -> [C]."""
    (counts,) = losses.full_precision(torch.as_tensor(class_counts))
    return max_margin * (counts.min() / counts) ** 0.25


def ldam_losses(cosines: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Cross-entropy of scaled cosines after the label's has lost its margin.

    Args:
        cosines: of feature and class weight, [B, C].
        labels: class indices, [B].
        margins: `ldam_margins`, [C].
        scale: of the logits.

    Returns:
        [B].
    """
    (cosines,) = losses.full_precision(cosines)
    return losses.cross_entropies(losses.margin_logits(cosines, labels, margins, scale), labels)


def unit_rows(head: nn.Linear, context: HeadContext) -> nn.Linear:  # noqa: ARG001
    """Give a new cosine head class weights of length 1, in directions drawn uniformly from a cube, as published."""
    with torch.no_grad():
        head.weight.copy_(F.normalize(head.weight.uniform_(-1, 1), dim=-1))
    return head


def _ldam(out: TaskOutputs, settings: LDAMSettings) -> PerImage:
    (logits,), scale = losses.full_precision(out.cls_logits[0]), out.heads[0].scale
    margins = ldam_margins(out.class_counts, settings.max_margin)
    return PerImage(ldam_losses(logits / scale, out.labels, margins, scale))


def _ldam_drw(out: TaskOutputs, settings: LDAMDRWSettings) -> PerImage:
    return replace(_ldam(out, settings), class_weights=deferred_weights(out, settings))


LDAM = Term("supervision", _ldam, two_labels=True)
LDAM_DRW = Term("supervision", _ldam_drw, two_labels=True)


def _method(term: Term, settings: type[LDAMSettings]) -> Method:
    head = HeadKind("cosine", scale=30.0, bias=False)
    return Method((Stage((term,), heads=unit_rows),), settings, head, Experts(1, most=1))


METHODS = {"ldam": _method(LDAM, LDAMSettings), "ldam_drw": _method(LDAM_DRW, LDAMDRWSettings)}
