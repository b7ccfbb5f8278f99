"""NCL: nested collaborative learning (Li et al., CVPR 2022).

K whole networks learn by balanced cross-entropy, over all classes and over the hard ones, and from each other in both
ways; `ncl` has the contrastive branch, too.

Read: Bazinga699/NCL@f64fddb lib/loss/loss.py 6-113, lib/core/combiner.py 57-, lib/core/function.py 43-49, lib/net. As
there, the losses are sums over the experts.

Departures: the published logarithm of the distillation adds 1e-9 to each probability. The momentum branch is this
project's: there the key encoder starts elsewhere, its projector never moves, and the moving average runs K times a
step.

Published, best epoch of the ensemble on the test set, 400 epochs: CIFAR-100-LT, ResNet-32, imbalance 50/100: 58.2 /
54.2, CIFAR-10-LT 87.3 / 85.5; ImageNet-LT, ResNet-50 / ResNeXt-50: 59.5 / 60.5; iNaturalist 2018: 74.9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import full_precision, logit_distillation
from ecl_hf.methods.base import Method, Stage, TaskOutputs, Term
from ecl_hf.methods.ecl import CONTRASTIVE, ContrastiveSettings, LogitWeight

HARD_FRACTION = 0.3
"""Share of the classes that are mined as hard: 30 of 100, 300 of 1000, 2442 of 8142 in the published files."""


@dataclass(kw_only=True)
class NCLSettings(ContrastiveSettings, LogitWeight):
    """Weights of distillation and contrast, and constants of the latter."""


def hard_categories(logits: Tensor, labels: Tensor, num_hard: int) -> Tensor:
    """Hard category mining: the label and the classes with the largest logits, `num_hard` in all.

    Args:
        logits: raw logits, [B, C].
        labels: class indices, [B].
        num_hard: classes to keep, 1..C.

    Returns:
        Boolean mask, [B, C].
    """
    ranked = logits.detach().scatter(-1, labels[:, None], float("inf")).topk(num_hard, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ranked, True)


def nested_cross_entropy(cls_logits: Tensor, labels: Tensor, log_class_counts: Tensor, hard: Tensor) -> Tensor:
    """Individual learning: balanced cross-entropy over all classes plus over the hard ones, summed over experts.

    As published, the prior is the log of the raw class counts, and classes outside `hard` have the logit 0 (not -inf).

    Args:
        cls_logits: raw logits, [K, B, C].
        labels: class indices, [B].
        log_class_counts: [C].
        hard: mask of the hard classes, shared by all experts, [B, C].

    Returns:
        Sum over experts of the means over the batch, [].
    """
    (cls_logits,) = full_precision(cls_logits)
    adjusted = cls_logits + log_class_counts
    both = torch.stack([adjusted, adjusted * hard])
    return F.cross_entropy(both.flatten(0, 2), labels.repeat(2 * len(cls_logits)), reduction="sum") / len(labels)


def nested_distillation(cls_logits: Tensor, log_class_counts: Tensor, hard: Tensor) -> Tensor:
    """Nested online distillation over all classes and over the hard ones, on prior-adjusted logits.

    As published, summed over ordered pairs and divided by K - 1; gradient reaches both arguments.

    Args:
        cls_logits: raw logits, [K, B, C].
        log_class_counts: [C].
        hard: mask of the hard classes, [B, C].

    Returns:
        [].
    """
    (cls_logits,) = full_precision(cls_logits)
    adjusted = cls_logits + log_class_counts
    return len(cls_logits) * (logit_distillation(adjusted) + logit_distillation(adjusted * hard))


def _hard(out: TaskOutputs) -> Tensor:
    """The first expert mines the hard classes."""
    return hard_categories(out.cls_logits[0], out.labels, max(1, int(HARD_FRACTION * out.cls_logits.shape[-1])))


def _supervision(out: TaskOutputs, settings: LogitWeight) -> Tensor:  # noqa: ARG001
    return nested_cross_entropy(out.cls_logits, out.labels, out.log_class_counts, _hard(out))


def _distillation(out: TaskOutputs, settings: LogitWeight) -> Tensor:  # noqa: ARG001
    return nested_distillation(out.cls_logits, out.log_class_counts, _hard(out))


SUPERVISION = Term("supervision", _supervision)
DISTILLATION = Term("logit", _distillation, "alpha_logit")

METHODS = {
    "ncl_plain": Method((Stage((SUPERVISION, DISTILLATION)),), LogitWeight),
    "ncl": Method((Stage((SUPERVISION, DISTILLATION, CONTRASTIVE)),), NCLSettings),
}
