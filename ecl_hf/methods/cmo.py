"""CMO: context-rich minority oversampling (Park et al., CVPR 2022).

A box of a picture from a class-balanced second stream is pasted on a picture of the usual stream: rare objects in the
rich surroundings of frequent ones. The loss is shared between both labels by area.

Read: naver-ai/cmo@10d2d09 cifar_train.py, imagenet_train.py, imbalance_cifar.py, opts.py. As there, half of the batches
are mixed, and none in the first and last few epochs. CMO with RIDE is not in that repository; reading: RIDE's own
settings without its distillation and routing. Left out: a deferred switch that never comes on iNaturalist 2018, since
its epoch is that of CIFAR.

Published top-1, best test epoch: with RIDE of 3 experts (ECL prints 4) CIFAR-100-LT at imbalance 10/50/100
60.2/53.0/50.0, ImageNet-LT 56.2, iNaturalist 2018 72.8; with balanced softmax ImageNet-LT 52.3 (ResNet-50, 100 epochs),
58.0 (400 epochs), iNaturalist 2018 74.0 (400 epochs).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.data.samplers import class_balanced
from ecl_hf.losses import cross_entropies
from ecl_hf.methods import ride
from ecl_hf.methods.base import Experts, Method, MixingContext, PerImage, Stage, TaskOutputs, Term, Time
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.settings import DeferredSettings, Settings
from ecl_hf.methods.terms import BALANCED_CROSS_ENTROPY, deferred_weights


@dataclass(kw_only=True)
class CMOSettings(Settings):
    """Of context-rich minority oversampling."""

    mixed_batches: float = 0.5
    """Share of the batches that are mixed."""
    power: float = 1.0
    """Exponent q of the second stream's weights 1 / n^q: 1 makes the classes of what is pasted equally likely."""
    unmixed_first: int = 4
    """Epochs at the start without mixing."""
    unmixed_last: int = 3
    """Epochs at the end without mixing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mixed_batches <= 1, f"loss.mixed_batches must lie in 0..1, got {self.mixed_batches}")
        for name in ("power", "unmixed_first", "unmixed_last"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


@dataclass(kw_only=True)
class ReweightedSettings(DeferredSettings, CMOSettings):
    """Of CMO with deferred re-weighting of the classes."""


@dataclass(kw_only=True)
class CMORIDESettings(ride.RIDESettings, CMOSettings):
    """Of CMO with RIDE's experts."""


def pasted_box(height: int, width: int, share: float, row: int, column: int) -> tuple[slice, slice]:
    """The box that is pasted: of the picture's shape, `1 - share` of its area, cut off at the picture's border.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        share: of the area that the background is to keep, 0..1.
        row: of the box's centre, 0..height-1.
        column: of the box's centre, 0..width-1.

    Returns:
        Rows and columns.
    """

    def side(length: int, centre: int) -> slice:
        half = int(length * math.sqrt(1 - share)) // 2
        return slice(max(0, centre - half), min(length, centre + half))

    return side(height, row), side(width, column)


def background_share(height: int, width: int, box: tuple[slice, slice]) -> float:
    """Share of the area outside a box, which is the weight of the background's label."""
    rows, columns = box
    return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def mixes(time: Time, settings: CMOSettings) -> bool:
    """Whether batches of this epoch are mixed."""
    return settings.unmixed_first <= time.epoch < time.epochs - settings.unmixed_last


def paste_partners(batch: dict[str, Tensor], context: MixingContext) -> dict[str, Tensor]:
    """Paste one box of the second stream's pictures, the same for all, in some of the batches; labels share by area."""
    rest = {name: value for name, value in batch.items() if not name.startswith("partner_")}
    mixed, share, row, column = torch.rand(4, generator=context.generator).tolist()
    if not mixes(context.time, context.settings) or mixed >= context.settings.mixed_batches:
        return rest
    pixels = batch["pixel_values"].clone()
    height, width = pixels.shape[-2:]
    box = pasted_box(height, width, share, int(height * row), int(width * column))
    pixels[..., box[0], box[1]] = batch["partner_pixel_values"][..., box[0], box[1]]
    share = torch.tensor(background_share(height, width, box), device=pixels.device)
    return rest | {"pixel_values": pixels, "mixed_labels": batch["partner_labels"], "share": share}


def _reweighted(out: TaskOutputs, settings: ReweightedSettings) -> PerImage:
    return PerImage(cross_entropies(out.cls_logits, out.labels).mean(0), deferred_weights(out, settings))


def mixed_stage(*terms: Term) -> Stage:
    """A stage whose batches CMO mixes."""
    return Stage(terms, partners=class_balanced(lambda settings: settings.power), mixing=paste_partners)


REWEIGHTED = Term("supervision", _reweighted, two_labels=True)
DIVERSITY = replace(ride.DIVERSITY, two_labels=True)
"""RIDE's knows no label, so it is the same for both."""

METHODS = {
    "cmo": Method((mixed_stage(REWEIGHTED),), ReweightedSettings, experts=Experts(1, most=1)),
    "cmo_bc": Method((mixed_stage(BALANCED_CROSS_ENTROPY),), CMOSettings, experts=Experts(1, most=1)),
    "cmo_ride": Method(
        (replace(mixed_stage(ride.SUPERVISION, DIVERSITY), heads=unit_rows),), CMORIDESettings, head=ride.HEAD
    ),
}
