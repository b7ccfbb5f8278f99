"""MiSLAS: mixup, label-aware smoothing and shifted statistics (Zhong et al., CVPR 2021).

Stage 1 is cross-entropy with mixup. Stage 2 sees class-balanced batches: it trains the classifier, at a smaller
learning rate, and one scale of the logits for each class (LWS of `decoupling`), with labels that are smoothed the more,
the more images their class has. The encoder is frozen; where its BatchNorm statistics shift, they follow the balanced
batches.

Read: dvlab-research/MiSLAS@0fc381e (methods.py, train_stage1.py, train_stage2.py, datasets, config).

Reading: the smoothed label as in the code, `1 - eps + eps / C` for the true class; the paper has 1 - eps, and
eps / (C - 1) for the others. Equal counts, a division by zero there, mean the head's smoothing for all classes here.
The second stage has a twentieth of all epochs (published: 200 and 10, or 180 and 10).

Defaults are those of CIFAR-100-LT with an imbalance factor of 100. Published top-1 (README; the best test epoch of both
stages): CIFAR-10-LT 90.0, 85.7, 82.5 and CIFAR-100-LT 63.2, 52.3, 47.0 for imbalance factors of 10, 50, 100;
ImageNet-LT 52.7 and iNaturalist 2018 71.6 with ResNet-50.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.data.mixing import mixup
from ecl_hf.data.samplers import class_aware
from ecl_hf.losses import full_precision
from ecl_hf.methods.base import Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.decoupling import HEADS_ALONE, ONE_LINEAR, FrozenEncoderSettings, with_scales
from ecl_hf.methods.terms import CROSS_ENTROPY

Shape = Literal["concave", "linear", "convex", "power"]


def smoothing_factors(
    class_counts: Tensor, head: float, tail: float, shape: Shape = "concave", power: float = 2.0
) -> Tensor:
    """How much the label of each class is smoothed: `head` for the largest class, `tail` for the smallest.

    With `r = (n_c - n_min) / (n_max - n_min)` the shapes between them are

        concave  tail + (head - tail) sin(pi r / 2)
        linear   tail + (head - tail) r
        convex   head + (head - tail) sin(3 pi / 2 + pi r / 2)
        power    tail + (head - tail) r^power

    Args:
        class_counts: training images of each class, [C].
        head: in 0..1.
        tail: in 0..1.
        shape: one of the four.
        power: of the last shape.

    Returns:
        [C]; `head` everywhere where all classes are equally large.
    """
    least, most = class_counts.min(), class_counts.max()
    rank = (class_counts - least) / (most - least) if most > least else torch.ones_like(class_counts)
    if shape == "convex":
        return head + (head - tail) * torch.sin(math.pi / 2 * (3 + rank))
    rise = {"concave": torch.sin(math.pi / 2 * rank), "linear": rank, "power": rank**power}[shape]
    return tail + (head - tail) * rise


def label_aware_smoothing(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Cross-entropy with a label that is smoothed as its class says, `(1 - eps_y) CE_y + eps_y mean_j CE_j`.

    Args:
        logits: [B, C].
        labels: class indices, [B].
        smoothing: eps, `smoothing_factors`, [C].

    Returns:
        [B].
    """
    (logits,) = full_precision(logits)
    surprise = -logits.log_softmax(-1)
    eps = smoothing[labels].to(logits.dtype)
    return (1 - eps) * surprise.gather(-1, labels[:, None])[:, 0] + eps * surprise.mean(-1)


@dataclass(kw_only=True)
class MiSLASSettings(FrozenEncoderSettings):
    """Of MiSLAS."""

    mixup_alpha: float = 1.0
    """Of the Beta distribution that the first stage's mixup draws from."""
    smooth_head: float = 0.4
    """Smoothing of the label of the largest class."""
    smooth_tail: float = 0.1
    """Smoothing of the label of the smallest class."""
    smooth_shape: Shape = "concave"
    """How the smoothing grows between them with the size of a class."""
    smooth_power: float = 2.0
    """Power of the shape `power`."""
    classifier_lr: float = 0.2
    """Factor on the learning rate of the classifier in the second stage; the scales have 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("smooth_head", "smooth_tail"):
            require(0 <= getattr(self, name) <= 1, f"loss.{name} must lie in 0..1, got {getattr(self, name)}")
        for name in ("mixup_alpha", "smooth_power"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
        require(self.classifier_lr >= 0, f"loss.classifier_lr must not be negative, got {self.classifier_lr}")


def _smoothed(out: TaskOutputs, settings: MiSLASSettings) -> PerImage:
    smoothing = smoothing_factors(
        out.class_counts, settings.smooth_head, settings.smooth_tail, settings.smooth_shape, settings.smooth_power
    )
    return PerImage(torch.stack([label_aware_smoothing(z, out.labels, smoothing) for z in out.cls_logits]).mean(0))


def _lr_factor(name: str, settings: MiSLASSettings, _: Any) -> float:
    return 1.0 if name.endswith(".scales") else settings.classifier_lr


METHODS = {
    "mislas": Method(
        (
            Stage((CROSS_ENTROPY,), "representation", mixing=mixup(lambda settings: settings.mixup_alpha), share=0.95),
            Stage(
                (Term("supervision", _smoothed, two_labels=True),),
                "classifier",
                class_aware(4),
                trains=HEADS_ALONE,
                heads=with_scales,
                share=0.05,
                schedule="cosine",
                lr_factor=_lr_factor,
            ),
        ),
        MiSLASSettings,
        **ONE_LINEAR,
    )
}
