"""The paper's three views of a picture (Sec. VI-C): supervised, contrastive, evaluation.

Each takes an RGB PIL image and returns a normalised tensor [3, S, S]. Sizes are the published ones at 32 and 224 pixels
and scale with the input at others: padding S / 8, Cutout S / 2.
"""

from collections.abc import Callable
from typing import Any, Literal

import timm.data
import torch
from PIL import Image, ImageFilter
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms as T

View = Callable[[Image.Image], Tensor]

GREY = (128, 128, 128)


class Cutout:
    """Blacks out a square whose centre is anywhere in the picture (DeVries and Taylor 2017); [3, H, W] in 0..1."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """Change the tensor in place and return it."""
        _, height, width = image.shape
        top = int(torch.randint(height, ())) - self.size // 2
        left = int(torch.randint(width, ())) - self.size // 2
        image[:, max(0, top) : max(0, top + self.size), max(0, left) : max(0, left + self.size)] = 0.0
        return image


class GaussianBlur:
    """Blur with a standard deviation drawn from a range in pixels, as MoCo v2 does it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a blurred copy."""
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*self.sigma))))


def _flip(horizontal_flip: bool) -> list[Callable]:
    return [T.RandomHorizontalFlip()] if horizontal_flip else []


def supervised_view(
    data_config: dict[str, Any], augmentation: Literal["cifar", "imagenet"] = "cifar", horizontal_flip: bool = True
) -> View:
    """View for classification and contrastive queries.

    Args:
        data_config: timm data configuration: `input_size`, `mean`, `std`, `interpolation`.
        augmentation: "cifar": padded crop, CIFAR-10 AutoAugment policy, Cutout before normalising; "imagenet": resized
            crop, colour jitter 0.4, RandAugment n2 m10 mstd 0.5.
        horizontal_flip: mirror half of the pictures.
    """
    size = data_config["input_size"][-1]
    normalise = T.Normalize(data_config["mean"], data_config["std"])
    interpolation = str_to_interp_mode(data_config.get("interpolation", "bilinear"))
    if augmentation == "imagenet":
        return T.Compose(
            [
                T.RandomResizedCrop(size, interpolation=interpolation),
                *_flip(horizontal_flip),
                T.ColorJitter(0.4, 0.4, 0.4),
                rand_augment_transform("rand-m10-n2-mstd0.5", {"img_mean": GREY, "translate_const": int(0.45 * size)}),
                T.ToTensor(),
                normalise,
            ]
        )
    return T.Compose(
        [
            T.Resize(size, interpolation),
            T.CenterCrop(size),
            T.RandomCrop(size, padding=size // 8),
            *_flip(horizontal_flip),
            T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=GREY),
            T.ToTensor(),
            Cutout(size // 2),
            normalise,
        ]
    )


def contrastive_view(data_config: dict[str, Any], horizontal_flip: bool = True) -> View:
    """Second view of the contrastive task, in the manner of MoCo v2; arguments as for `supervised_view`."""
    size = data_config["input_size"][-1]
    interpolation = str_to_interp_mode(data_config.get("interpolation", "bilinear"))
    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=interpolation),
            *_flip(horizontal_flip),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
            T.ToTensor(),
            T.Normalize(data_config["mean"], data_config["std"]),
        ]
    )


def evaluation_view(data_config: dict[str, Any]) -> View:
    """The evaluation transform of timm: the same pixels as the published model's image processor makes."""
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=data_config), is_training=False)
