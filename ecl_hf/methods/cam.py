"""CAM-based sampling, and the bag of tricks for long-tailed recognition (Zhang et al., AAAI 2021).

After training on the natural distribution, pictures are made of rare classes until all classes have equally many: the
foreground, where the class activation map is high, is rotated and scaled, shifted or mirrored, and pasted over the
picture it came from. Training goes on with class-balanced draws (deferred re-sampling).

Read: zhangyongshun/BagofTricks-LT@ce7859a lib/utils/cam_based_sampling.py, lib/net/network.py, lib/core/combiner.py,
lib/dataset/cao_cifar.py, main/train.py, configs, documents/trick_gallery.md. Departures: a picture is made when it is
drawn, of its crop, by the finished first stage, so that nothing is kept on disk (there: once, of whole pictures, as
JPEG); map and picture are the same view (there: the map of an augmented copy lies over the plain picture); the box
around the foreground is the true one (there: two pixels from its first corner); black pixels of the foreground are
kept. The recipe with mixup and a last stage is in the repository for ImageNet-LT alone; reading: the same for CIFAR.

Published top-1 (their gallery, ResNet-32, 200 epochs, crop and flip, imbalance 100/50): deferred re-sampling
CIFAR-10-LT 75.07/80.73, CIFAR-100-LT 40.64/45.42; with CAM 76.90/80.72, 41.95/46.73. The full recipe, as ECL quotes it:
80.0/83.6, 47.8/51.7.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.data.mixing import mixup
from ecl_hf.data.samplers import class_balanced
from ecl_hf.losses import full_precision
from ecl_hf.methods.base import Experts, HeadKind, Method, MixingContext, Part, PartsContext, Stage, Trains
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY
from ecl_hf.modeling_ecl import ECLForImageClassification

FOREGROUND = 0.75
"""A pixel is foreground where the map is at least this share of its mean."""


@dataclass(kw_only=True)
class CAMSettings(Settings):
    """Of CAM-based sampling."""

    most_for_rare: int | None = None
    """Make pictures of classes with fewer than this alone, and no more than this: 100 on ImageNet-LT. When not given,
    all classes get as many as make them equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.most_for_rare
        require(most is None or most > 0, f"loss.most_for_rare must be positive, got {most}")


@dataclass(kw_only=True)
class TricksSettings(CAMSettings):
    """Of the bag of tricks: mixup and CAM-based sampling."""

    mixup: float = 1.0
    """Both parameters of the Beta distribution that mixup draws from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mixup > 0, f"loss.mixup must be positive, got {self.mixup}")


def pictures_to_make(class_counts: Tensor, threshold: int | None = None) -> Tensor:
    """How many pictures of each class are made: as many as give each class `n_max + n_min`.

    Args:
        class_counts: [C].
        threshold: only for classes with fewer pictures than this, and no more than this.

    Returns:
        [C].
    """
    missing = class_counts.max() + class_counts.min() - class_counts
    if threshold is None:
        return missing
    return torch.where(class_counts < threshold, missing.clamp_max(threshold), 0)


def class_activation_map(feature_maps: Tensor, weights: Tensor) -> Tensor:
    """Where a linear classifier sees a class: weighted sum of the channels, from 0 to 255 within each picture.

    Args:
        feature_maps: before pooling, [B, D, h, w].
        weights: the classifier's rows of the pictures' classes, [B, D].

    Returns:
        Whole numbers as floats, [B, h, w]; 0 where a map is constant.
    """
    feature_maps, weights = full_precision(feature_maps, weights)
    activation = torch.einsum("bdhw,bd->bhw", feature_maps, weights)
    activation = activation - activation.amin((1, 2), keepdim=True)
    highest = activation.amax((1, 2), keepdim=True)
    return (255 * activation / torch.where(highest > 0, highest, 1)).floor()


def foreground(activation: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels where the map, enlarged to the picture, is at least 0.75 of its mean; all of them if it is constant.

    Args:
        activation: [B, h, w].
        size: height and width of the pictures.

    Returns:
        Mask, [B, H, W].
    """
    if activation.shape[1:] != size:
        activation = F.interpolate(activation[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return activation >= FOREGROUND * activation.mean((1, 2), keepdim=True)


def bounding_boxes(masks: Tensor) -> Tensor:
    """Smallest boxes around masks that are not empty: top, bottom, left, right, ends exclusive; [B, H, W] -> [B, 4]."""
    sides = []
    for occupied in (masks.any(2), masks.any(1)):
        first = occupied.int().argmax(1)
        sides += [first, occupied.shape[1] - occupied.flip(1).int().argmax(1)]
    return torch.stack(sides, dim=1)


def rotation(angles: Tensor, scales: Tensor, centres: Tensor) -> Tensor:
    """Maps from a pixel of the result to one of the source, for pictures rotated and scaled about a point.

    Args:
        angles: counterclockwise, in degrees, [B].
        scales: above 1 enlarges, [B].
        centres: row and column, in pixels from the picture's middle, [B, 2].

    Returns:
        Affine maps of (x, y), in pixels from the picture's middle, [B, 2, 3].
    """
    radians = angles * math.pi / 180
    cosine, sine = radians.cos() / scales, radians.sin() / scales
    linear = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    centres = centres.flip(1)[..., None]
    return torch.cat([linear, centres - linear @ centres], dim=2)


def translation(shifts: Tensor) -> Tensor:
    """Maps from a pixel of the result to one of the source, for pictures shifted down, right; [B, 2] -> [B, 2, 3]."""
    return torch.cat([torch.eye(2, device=shifts.device).expand(len(shifts), 2, 2), -shifts.flip(1)[..., None]], dim=2)


def mirror(pictures: int, device: torch.device) -> Tensor:
    """Maps from a pixel of the result to one of the source, for mirrored pictures; [B, 2, 3]."""
    return torch.tensor([[-1.0, 0, 0], [0, 1, 0]], device=device).expand(pictures, 2, 3)


def paste_foreground(pictures: Tensor, masks: Tensor, maps: Tensor) -> Tensor:
    """Move the foreground of each picture and paste it over the picture.

    Args:
        pictures: [B, 3, H, W].
        masks: foreground, boolean, [B, H, W].
        maps: of (x, y), from the result to the source, in pixels from the middle, [B, 2, 3].

    Returns:
        [B, 3, H, W].
    """
    height, width = pictures.shape[-2:]
    half = torch.tensor([width / 2, height / 2], device=pictures.device)
    linear = maps[..., :2] * half / half[:, None]
    theta = torch.cat([linear, maps[..., 2:] / half[:, None]], dim=2).to(pictures.dtype)
    grid = F.affine_grid(theta, pictures.shape, align_corners=False)
    moved = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    cover = F.grid_sample(masks[:, None].to(pictures.dtype), grid, mode="nearest", align_corners=False) > 0.5
    return torch.where(cover, moved, pictures)


def draw_moves(masks: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One of three moves for each foreground, each with probability 1/3.

    A rotation by -45 to 44 degrees with a scale of 0.80 to 1.19, about the middle of the foreground's box; a shift that
    keeps the box within the picture; a mirrored picture.

    Args:
        masks: foreground, not empty, [B, H, W].
        generator: on the CPU; torch's own if None.

    Returns:
        Maps for `paste_foreground`, [B, 2, 3].
    """
    count, device = len(masks), masks.device
    boxes = bounding_boxes(masks).to(torch.get_default_dtype())
    size = torch.tensor(masks.shape[1:], device=device)
    first, last = boxes[:, ::2], boxes[:, 1::2]

    def uniform(low: Tensor | float, high: Tensor | float, columns: int = 1) -> Tensor:
        """Whole numbers, the upper end exclusive, [B, columns]."""
        drawn = torch.rand(count, columns, generator=generator).to(device)
        return (low + (high - low) * drawn).floor()

    turned = rotation(uniform(-45, 45)[:, 0], uniform(80, 120)[:, 0] / 100, (first + last) / 2 - size / 2)
    moves = torch.stack([turned, translation(uniform(-first, size - last + 1, 2)), mirror(count, device)])
    return moves[uniform(0, 3)[:, 0].long(), torch.arange(count, device=device)]


def feature_maps(model: ECLForImageClassification, pixel_values: Tensor) -> Tensor:
    """What the first expert's encoder pools; [B, 3, H, W] -> [B, D, h, w].

    Raises:
        ValueError: the encoder has no such map.
    """
    expert = model.experts[0]
    maps = expert.backbone.forward_features(pixel_values if model.trunk is None else model.trunk(pixel_values))
    if maps.ndim != 4 or maps.shape[1] != expert.head.in_features:
        raise ValueError(
            f"{model.config.architecture} does not pool a feature map [{expert.head.in_features}, h, w], so it has no "
            "class activation maps; take a ResNet, for instance"
        )
    return maps


class MapProbe(Part):
    """Finds out before the first stage whether the encoder has class activation maps."""

    def __init__(self, model: ECLForImageClassification) -> None:
        super().__init__()
        side, training = model.config.pretrained_cfg["input_size"][-1], model.training
        model.eval()
        with torch.no_grad():
            feature_maps(model, torch.zeros(1, 3, side, side))
        model.train(training)


class FinishedStage(Part):
    """The network as the stage before left it; it stays as it is."""

    def __init__(self, model: ECLForImageClassification) -> None:
        super().__init__()
        self.network = copy.deepcopy(model)

    def train(self, mode: bool = True) -> "FinishedStage":  # noqa: ARG002
        """Evaluation mode whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """Foregrounds of pictures [B, 3, H, W] of classes [B] -> [B, H, W]."""
        activation = class_activation_map(
            feature_maps(self.network, pixel_values), self.network.experts[0].head.weight[labels]
        )
        return foreground(activation, pixel_values.shape[-2:])


def _probe(context: PartsContext) -> MapProbe:
    return MapProbe(context.model)


def _finished_stage(context: PartsContext) -> FinishedStage:
    return FinishedStage(context.model)


def make_pictures(batch: dict[str, Tensor], context: MixingContext) -> dict[str, Tensor]:
    """Make a picture of the one that was drawn, as often as a made picture would be drawn in its class."""
    pixels, labels = batch["pixel_values"], batch["labels"]
    made = pictures_to_make(context.class_counts, context.settings.most_for_rare)
    chances = (made / (made + context.class_counts)).to(labels.device)[labels]
    chosen = torch.rand(len(labels), generator=context.generator).to(labels.device) < chances
    if not chosen.any():
        return batch
    masks = context.task.parts["supervision"](pixels[chosen], labels[chosen])
    pixels = pixels.clone()
    pixels[chosen] = paste_foreground(pixels[chosen], masks, draw_moves(masks, context.generator))
    return batch | {"pixel_values": pixels}


mix_up = mixup(lambda settings: settings.mixup)


def make_and_mix_up(batch: dict[str, Tensor], context: MixingContext) -> dict[str, Tensor]:
    """Mixup of pictures some of which are made."""
    return mix_up(make_pictures(batch, context), context)


PROBED = replace(CROSS_ENTROPY, part=_probe)
CLASSIFIED = replace(CROSS_ENTROPY, part=_finished_stage)
NETWORK = Trains(lambda name: not name.startswith("parts."))
"""All but the network that makes pictures."""

BALANCED = Stage((CROSS_ENTROPY,), "balanced", sampler=class_balanced(), lr=0.01, share=0.2)
MADE = replace(BALANCED, terms=(CLASSIFIED,), trains=NETWORK, mixing=make_pictures)


def _method(settings: type[Settings], *stages: Stage) -> Method:
    return Method(stages, settings, head=HeadKind("linear"), experts=Experts(1, most=1))


METHODS = {
    "drs": _method(Settings, Stage((CROSS_ENTROPY,), "natural", share=0.8), BALANCED),
    "cam_drs": _method(CAMSettings, Stage((PROBED,), "natural", share=0.8), MADE),
    "cam": _method(
        TricksSettings,
        Stage((PROBED,), "natural", mixing=mix_up, share=8 / 11),
        replace(MADE, mixing=make_and_mix_up, share=2 / 11),
        replace(BALANCED, name="balanced without mixup", share=1 / 11),
    ),
}
