"""Views of a picture: the paper's supervised, contrastive and evaluation view (Sec. VI-C), and those of other methods.

Each takes an RGB PIL image and returns a normalised tensor [3, S, S]. Sizes are the published ones at 32 and 224 pixels
and scale with the input at others: padding S / 8, Cutout S / 2.

The random views draw what torchvision's transforms draw, in the same order, and differ from them where those are slow:
tables that are made once, pixels that stay 8-bit integers until the end (the same result), and the hue.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import timm.data
import torch
from PIL import Image, ImageFilter
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import functional

View = Callable[[Image.Image], Tensor]

GREY = (128, 128, 128)

SMALL = 64
"""Largest side in pixels at which the plain view crops as on CIFAR, and not as on ImageNet."""


class Cutout:
    """Blacks out a square whose centre is anywhere in the picture, [3, H, W] (DeVries and Taylor 2017)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """Change the tensor in place and return it."""
        _, height, width = image.shape
        top = int(torch.randint(height, ())) - self.size // 2
        left = int(torch.randint(width, ())) - self.size // 2
        image[:, max(0, top) : max(0, top + self.size), max(0, left) : max(0, left + self.size)] = 0
        return image


class GaussianBlur:
    """Blur with a standard deviation drawn from a range in pixels, as MoCo v2 does it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return a blurred copy."""
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*self.sigma))))


class RandomCrop(T.RandomCrop):
    """torchvision's with a black margin, which PIL adds to a crop that reaches beyond the picture."""

    def forward(self, img: Image.Image) -> Image.Image:
        """A square out of the picture, which is as large, and its margin."""
        size = self.size[0]
        top, left = (int(torch.randint(2 * self.padding + 1, (1,))) - self.padding for _ in range(2))
        return img.crop((left, top, left + size, top + size))


class CenterCrop(T.CenterCrop):
    """torchvision's, which copies also those pictures that have the size."""

    def forward(self, img: Image.Image) -> Image.Image:
        """The middle of the picture."""
        return img if img.size == tuple(self.size) else super().forward(img)


class AutoAugment(T.AutoAugment):
    """torchvision's, whose table of magnitudes is made once for a size, and not for each picture."""

    def _augmentation_space(self, num_bins: int, image_size: tuple[int, int]) -> dict[str, tuple[Tensor, bool]]:
        return _augmentation_space(num_bins, tuple(image_size))


@cache
def _augmentation_space(num_bins: int, image_size: tuple[int, int]) -> dict[str, tuple[Tensor, bool]]:
    return T.AutoAugment()._augmentation_space(num_bins, image_size)


class ColorJitter(T.ColorJitter):
    """torchvision's, with a faster shift of the hue that does not round hue and saturation to 8 bits."""

    def forward(self, img: Image.Image) -> Image.Image:
        """Jitter in random order."""
        order, brightness, contrast, saturation, hue = self.get_params(
            self.brightness, self.contrast, self.saturation, self.hue
        )
        steps = (
            (functional.adjust_brightness, brightness),
            (adjust_contrast, contrast),
            (functional.adjust_saturation, saturation),
            (shift_hue, hue),
        )
        for i in order.tolist():
            adjust, amount = steps[i]
            if amount is not None:
                img = adjust(img, amount)
        return img


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Blend with the picture's mean grey, as torchvision does; numpy finds the mean faster than a histogram."""
    grey = int(np.asarray(image.convert("L")).mean() + 0.5)
    return Image.blend(Image.new("RGB", image.size, (grey, grey, grey)), image, factor)


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Move the hue of all pixels by a part of the colour circle, -0.5..0.5; their HSV saturation and value stay."""
    red, green, blue = (np.asarray(band, np.float32) for band in image.split())
    value = np.maximum(np.maximum(red, green), blue)
    lowest = np.minimum(np.minimum(red, green), blue)
    chroma = value - lowest
    scale = 1 / np.maximum(chroma, 1)
    hue = np.where(
        value == red,
        (green - blue) * scale,
        np.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue += 6 * turns
    hue -= 6 * np.floor(hue * (1 / 6))
    pixels = np.empty((*hue.shape, 3), np.uint8)
    # Each channel is a trapezium over the circle: red is full around 0, green around 2, blue around 4
    for channel, share in enumerate((np.abs(hue - 3) - 1, 2 - np.abs(hue - 2), 2 - np.abs(hue - 4))):
        np.clip(share, 0, 1, out=share)
        share *= chroma
        share += lowest
        share += 0.5
        pixels[..., channel] = share
    return Image.fromarray(pixels)


def to_pixels(image: Image.Image) -> Tensor:
    """8-bit integers, [3, H, W]; in memory the three channels of a pixel lie together."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class RandomView:
    """A view in two parts, so that loaders normalise whole batches.

    Args:
        steps: transforms whose last gives 8-bit integers as `to_pixels` does, [3, S, S].
        data_config: timm data configuration: `mean` and `std` of colours in 0..1.
    """

    def __init__(self, steps: Sequence[Callable], data_config: dict[str, Any]) -> None:
        self.pixels = T.Compose(steps)
        self.mean, self.std = (torch.tensor(data_config[key]) for key in ("mean", "std"))

    def __call__(self, image: Image.Image) -> Tensor:
        """Normalised colours, [3, S, S]."""
        return self.normalise([self.pixels(image)])[0]

    def normalise(self, pictures: Sequence[Tensor]) -> Tensor:
        """Stack pixels to what `ToTensor` and `Normalize` of torchvision give, [B, 3, S, S] in channels-last order."""
        side = pictures[0].shape[-1]
        # Whole rows at a time, since arithmetic over a last dimension of three is slow; and picture by picture, since
        # a batch is larger than the processor's cache.
        mean, std = self.mean.repeat(side), self.std.repeat(side)
        batch = torch.empty(len(pictures), side, 3 * side)
        for values, pixels in zip(batch, pictures, strict=True):
            values.copy_(pixels.permute(1, 2, 0).flatten(1)).div_(255).sub_(mean).div_(std)
        return batch.view(len(pictures), side, side, 3).permute(0, 3, 1, 2)


def _flip(horizontal_flip: bool) -> list[Callable]:
    return [T.RandomHorizontalFlip()] if horizontal_flip else []


def _padded_crop(data_config: dict[str, Any], horizontal_flip: bool) -> list[Callable]:
    size = data_config["input_size"][-1]
    interpolation = str_to_interp_mode(data_config.get("interpolation", "bilinear"))
    return [
        T.Resize(size, interpolation),
        CenterCrop(size),
        RandomCrop(size, padding=size // 8),
        *_flip(horizontal_flip),
    ]


def supervised_view(
    data_config: dict[str, Any],
    augmentation: Literal["cifar", "imagenet", "plain", "rotated", "mild"] = "cifar",
    horizontal_flip: bool = True,
) -> View:
    """View for classification and contrastive queries.

    Args:
        data_config: timm data configuration: `input_size`, `mean`, `std`, `interpolation`.
        augmentation: "cifar": padded crop, CIFAR-10 AutoAugment policy, Cutout before normalising; "imagenet": resized
            crop, colour jitter 0.4, RandAugment n2 m10 mstd 0.5; "plain": what most methods before AutoAugment were
            published with, padded crop up to 64 pixels, resized crop and colour jitter 0.4 above; "rotated": RIDE's and
            its successors', as plain, and up to 64 pixels turned by up to 15 degrees; "mild": resized crop of half the
            picture at least and colour jitter 0.4, which pretrained encoders learn from in few epochs.
        horizontal_flip: mirror half of the pictures.
    """
    size = data_config["input_size"][-1]
    interpolation = str_to_interp_mode(data_config.get("interpolation", "bilinear"))
    flip = _flip(horizontal_flip)
    padded_crop = _padded_crop(data_config, horizontal_flip)
    area = (0.5 if augmentation == "mild" else 0.08, 1.0)
    resized_crop = [T.RandomResizedCrop(size, area, interpolation=interpolation), *flip, ColorJitter(0.4, 0.4, 0.4)]
    if augmentation == "cifar":
        policy = AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=GREY)
        steps = [*padded_crop, policy, to_pixels, Cutout(size // 2)]
    elif augmentation == "imagenet":
        options = {"img_mean": GREY, "translate_const": int(0.45 * size)}
        steps = [*resized_crop, rand_augment_transform("rand-m10-n2-mstd0.5", options), to_pixels]
    elif size > SMALL or augmentation == "mild":
        steps = [*resized_crop, to_pixels]
    else:
        steps = [*padded_crop, *([T.RandomRotation(15)] if augmentation == "rotated" else []), to_pixels]
    return RandomView(steps, data_config)


def contrastive_view(data_config: dict[str, Any], horizontal_flip: bool = True) -> View:
    """Second view of the contrastive task, in the manner of MoCo v2; arguments as for `supervised_view`."""
    size = data_config["input_size"][-1]
    interpolation = str_to_interp_mode(data_config.get("interpolation", "bilinear"))
    return RandomView(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=interpolation),
            *_flip(horizontal_flip),
            T.RandomApply([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
            to_pixels,
        ],
        data_config,
    )


def agreement_view(data_config: dict[str, Any], horizontal_flip: bool = True) -> View:
    """View by which SADE weighs experts: padded crop, jitter, grey and blur up to 64 pixels, `contrastive_view` above.

    Arguments are those of `supervised_view`.
    """
    size = data_config["input_size"][-1]
    if size > SMALL:
        return contrastive_view(data_config, horizontal_flip)
    return RandomView(
        [
            *_padded_crop(data_config, horizontal_flip),
            T.RandomApply([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.2),
            to_pixels,
        ],
        data_config,
    )


def evaluation_view(data_config: dict[str, Any]) -> View:
    """The evaluation transform of timm: the same pixels as the published model's image processor makes."""
    return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=data_config), is_training=False)
