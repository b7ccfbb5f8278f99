"""GCL: Gaussian clouded logits (Li et al., CVPR 2022).

Read: Keke921/GCLLoss@c2a6233 losses.py, cifar_train_backbone.py, cifar_train_classifier.py, sampler.py.

Readings: with classes of equal size, where the code divides 0 by 0, there is no cloud. The sampler of the second stage
is the code's default, by 1/n; the paper's is by an effective number of each class's own.

Published: ImageNet-LT (ResNet-50) 54.88, 52.93 before the second stage; iNaturalist 2018 72.0, 70.3 before; both stages
chosen on the test set.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.data.mixing import mixup
from ecl_hf.data.samplers import class_balanced
from ecl_hf.methods.base import HEADS, Experts, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.settings import Settings

NOISE = 1 / 3
"""Standard deviation of the noise, which is cut off at -1 and 1."""


@dataclass(kw_only=True)
class GCLSettings(Settings):
    """Of the Gaussian clouded logits; Places-LT was published with a scale of 15 and clouds of strength 1."""

    strength: float = 0.5
    """Of the clouds."""
    scale: float = 30.0
    """Of the logits in the first stage; in the second it is that of the published head, 20."""
    margin: float = 0.1
    """Margin of every class in the second stage, as a cosine."""
    gamma: float = 1.0
    """Exponent of the focal modulator in the second stage."""
    mixup_alpha: float = 1.0
    """Mixup in both stages draws shares from Beta(alpha, alpha)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "margin", "gamma"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")
        for name in ("scale", "mixup_alpha"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")


def cloud_sizes(class_counts: Tensor) -> Tensor:
    """`log(n_max / n_c) / log(n_max / n_min)`: 0 for the largest class, 1 for the rarest; [C] -> [C]."""
    (counts,) = losses.full_precision(torch.as_tensor(class_counts))
    sizes = (counts.max() / counts).log()
    return sizes / sizes.max().clamp_min(torch.finfo(sizes.dtype).tiny)


def clouded_cosines(cosines: Tensor, noise: Tensor, sizes: Tensor, strength: float) -> Tensor:
    """Cosines, each lowered by its class's cloud: `cos_ic - k d_c |e_ic|`.

    Args:
        cosines: of feature and class weight, [B, C].
        noise: normal with standard deviation 1/3; cut off at -1 and 1 here; [B, C].
        sizes: `cloud_sizes`, [C].
        strength: k.

    Returns:
        [B, C].
    """
    return cosines - strength * sizes * noise.abs().clamp_max(1)


def gcl_losses(
    cosines: Tensor, labels: Tensor, noise: Tensor, sizes: Tensor, *, strength: float, margin: float, scale: float
) -> Tensor:
    """Cross-entropy of scaled clouded cosines after the label's has lost a margin.

    Args:
        cosines: [B, C].
        labels: class indices, [B].
        noise: as in `clouded_cosines`, [B, C].
        sizes: `cloud_sizes`, [C].
        strength: of the clouds.
        margin: of every class.
        scale: of the logits.

    Returns:
        [B].
    """
    cosines, noise = losses.full_precision(cosines, noise)
    clouded = clouded_cosines(cosines, noise, sizes, strength)
    margins = torch.full_like(sizes, margin)
    return losses.cross_entropies(losses.margin_logits(clouded, labels, margins, scale), labels)


def _clouded(out: TaskOutputs, settings: GCLSettings, margin: float, scale: float) -> Tensor:
    """Losses of the images under noise of their own, [B]; a mixed picture has other noise for its other label."""
    (logits,) = losses.full_precision(out.cls_logits[0])
    cosines = logits / out.heads[0].scale
    noise, sizes = NOISE * torch.randn_like(cosines), cloud_sizes(out.class_counts)
    return gcl_losses(cosines, out.labels, noise, sizes, strength=settings.strength, margin=margin, scale=scale)


def _first(out: TaskOutputs, settings: GCLSettings) -> PerImage:
    return PerImage(_clouded(out, settings, 0.0, settings.scale))


def _second(out: TaskOutputs, settings: GCLSettings) -> PerImage:
    images = _clouded(out, settings, settings.margin, out.heads[0].scale)
    return PerImage(losses.focal_losses(images, settings.gamma, detach_modulator=True))


CLOUDED = Term("supervision", _first, two_labels=True)
CLOUDED_FOCAL = Term("supervision", _second, two_labels=True)
MIXUP = mixup(lambda settings: settings.mixup_alpha)

METHODS = {
    "gcl": Method(
        (
            Stage((CLOUDED,), "features", mixing=MIXUP, heads=unit_rows, share=200 / 230),
            Stage(
                (CLOUDED_FOCAL,),
                "classifier",
                class_balanced(1),
                mixing=MIXUP,
                trains=HEADS,
                share=30 / 230,
                lr=0.02,
                schedule="cosine",
            ),
        ),
        GCLSettings,
        HeadKind("cosine", scale=20.0, bias=False),
        Experts(1, most=1),
    )
}
