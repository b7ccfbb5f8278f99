"""The three views: sizes, pixels against other implementations, and the random parts under known generators."""

import colorsys
import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T
from transformers import TimmWrapperImageProcessor

from ecl_hf.data import views
from ecl_hf.data.views import Cutout, GaussianBlur, agreement_view, contrastive_view, evaluation_view, supervised_view


def data_config(size, **more):
    base = {"input_size": (3, size, size), "mean": (0.49, 0.48, 0.45), "std": (0.2, 0.21, 0.22), "crop_mode": "center"}
    return {"interpolation": "bicubic", "crop_pct": 1.0, **base, **more}


UNCHANGED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def noise(width, height):
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8))


def normalised(image, config):
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (image - mean) / std


def pixels(view, image):
    """[H, W, 3] integers of a view that does not normalise."""
    return torch.round(view(image) * 255).int().permute(1, 2, 0)


def leave_out(monkeypatch, *names):
    """Replace transforms by ones that do nothing."""
    for name in names:
        monkeypatch.setattr(views if hasattr(views, name) else views.T, name, lambda *_, **__: lambda image: image)


@pytest.mark.parametrize("size", [16, 32, 224])
@pytest.mark.parametrize(
    "make",
    [
        supervised_view,
        lambda config: supervised_view(config, "imagenet"),
        lambda config: supervised_view(config, "plain"),
        lambda config: supervised_view(config, "cifar", False),
        contrastive_view,
        evaluation_view,
    ],
    ids=["cifar", "imagenet", "plain", "unflipped", "contrastive", "evaluation"],
)
@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (60, 41)])
def test_shapes(size, make, shape):
    view = make(data_config(size))
    for _ in range(3):
        out = view(noise(*shape))
        assert out.shape == (3, size, size)
        assert out.dtype == torch.float32
        assert out.isfinite().all()


@pytest.mark.parametrize("size", [16, 32])
def test_normalisation_of_a_grey_picture(size):
    config = data_config(size)
    grey = Image.new("RGB", (size, size), (128, 128, 128))
    for channel, mean, std in zip(evaluation_view(config)(grey), config["mean"], config["std"], strict=True):
        assert (channel == (torch.tensor(128.0) / 255 - mean) / std).all()
        assert channel[0, 0].item() == pytest.approx((128 / 255 - mean) / std, abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        data_config(16),
        data_config(32, interpolation="bilinear", crop_pct=0.95),
        data_config(224, crop_pct=0.875),
        data_config(64, crop_pct=0.9, crop_mode="squash"),
        data_config(64, crop_pct=0.9, crop_mode="border"),
    ],
    ids=lambda config: f"{config['input_size'][-1]}-{config['crop_mode']}",
)
@pytest.mark.parametrize("shape", [(32, 32), (60, 41), (300, 260)])
def test_evaluation_is_what_the_published_image_processor_does(config, shape):
    image = noise(*shape)
    ours = evaluation_view(config)(image)
    saved = json.loads(json.dumps(config))  # as it comes back from config.json
    theirs = TimmWrapperImageProcessor(pretrained_cfg=saved)(image)["pixel_values"]
    assert torch.equal(ours, theirs[0])
    assert torch.equal(ours, evaluation_view(saved)(image))


def test_evaluation_resizes_and_crops_the_centre():
    config = data_config(56, crop_pct=0.875)
    reference = T.Compose(
        [T.Resize(64, T.InterpolationMode.BICUBIC), T.CenterCrop(56), T.ToTensor(), T.Normalize(**_mean_std(config))]
    )
    image = noise(90, 70)
    assert torch.equal(evaluation_view(config)(image), reference(image))


def _mean_std(config):
    return {key: config[key] for key in ("mean", "std")}


def cutout_loop(image, size):
    _, height, width = image.shape
    y0, x0 = int(torch.randint(height, ())), int(torch.randint(width, ()))
    out = image.clone()
    for y in range(height):
        for x in range(width):
            if -(size // 2) <= y - y0 < size - size // 2 and -(size // 2) <= x - x0 < size - size // 2:
                out[:, y, x] = 0.0
    return out


@pytest.mark.parametrize(
    ("size", "height", "width"), [(8, 16, 16), (16, 32, 32), (5, 9, 7), (4, 3, 12), (1, 4, 4), (40, 8, 8)]
)
def test_cutout_against_a_loop(size, height, width):
    areas = set()
    for seed in range(40):
        image = torch.rand(3, height, width) + 0.1
        torch.manual_seed(seed)
        expected = cutout_loop(image, size)
        torch.manual_seed(seed)
        assert torch.equal(Cutout(size)(image.clone()), expected)
        areas.add(int((expected == 0).all(0).sum()))
    assert max(areas) <= size * size
    clipped = 1 < size < 2 * max(height, width)  # by the border, more or less; larger squares always cover everything
    assert (len(areas) > 1) == clipped


def test_cutout_centres_are_uniform_up_to_the_border():
    hits = torch.zeros(6, 6)
    for _ in range(3600):
        hits += 1 - Cutout(1)(torch.ones(1, 6, 6))[0]
    assert hits.sum() == 3600
    assert hits.min() >= 60  # 100 on average, standard deviation 10
    assert hits.max() <= 140


@pytest.mark.parametrize("size", [16, 32])
def test_cifar_view_blacks_out_half_the_side_before_normalising(size, monkeypatch):
    leave_out(monkeypatch, "AutoAugment", "RandomCrop")
    config = data_config(size)
    image = noise(size, size)
    view = supervised_view(config, "cifar", horizontal_flip=False)
    for seed in range(5):
        torch.manual_seed(seed)
        found = view(image)
        torch.manual_seed(seed)
        expected = cutout_loop(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, size // 2)
        assert torch.equal(found, normalised(expected, config))


@pytest.mark.parametrize("size", [16, 32])
def test_cifar_view_crops_out_of_a_black_margin(size, monkeypatch):
    leave_out(monkeypatch, "AutoAugment")
    monkeypatch.setattr(views, "Cutout", lambda _: lambda image: image)
    view = supervised_view(data_config(size, **UNCHANGED), "cifar", horizontal_flip=False)
    image, margin = noise(size, size), size // 8
    padded = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)))
    windows = {
        padded[y : y + size, x : x + size].tobytes(): (y, x)
        for y in range(2 * margin + 1)
        for x in range(2 * margin + 1)
    }
    seen = Counter(windows[pixels(view, image).numpy().astype(np.uint8).tobytes()] for _ in range(1000))
    assert len(windows) == (2 * margin + 1) ** 2
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(2 * margin + 1))


@pytest.mark.parametrize(
    ("make", "others"),
    [
        (lambda config, **flip: supervised_view(config, "cifar", **flip), ["RandomCrop", "AutoAugment"]),
        (lambda config, **flip: supervised_view(config, "imagenet", **flip), ["RandomResizedCrop", "ColorJitter"]),
        (contrastive_view, ["RandomResizedCrop", "RandomApply", "RandomGrayscale"]),
    ],
    ids=["cifar", "imagenet", "contrastive"],
)
def test_flip_mirrors_half_of_the_pictures_or_none(make, others, monkeypatch):
    leave_out(monkeypatch, *others)
    monkeypatch.setattr(views, "Cutout", lambda _: lambda image: image)
    monkeypatch.setattr(views, "rand_augment_transform", lambda *_: lambda image: image)
    image = noise(16, 16)
    upright = torch.from_numpy(np.array(image)).int()
    config = data_config(16, **UNCHANGED)

    def mirrored(view):
        found = [pixels(view, image) for _ in range(200)]
        assert all(torch.equal(out, upright) or torch.equal(out, upright.flip(1)) for out in found)
        return sum(torch.equal(out, upright.flip(1)) for out in found)

    assert mirrored(make(config, horizontal_flip=False)) == 0
    assert 65 <= mirrored(make(config, horizontal_flip=True)) <= 135
    assert 65 <= mirrored(make(config)) <= 135


def test_blur_draws_its_deviation_evenly_from_the_range(monkeypatch):
    drawn = []

    def record(radius):
        drawn.append(radius)
        return original(radius)

    original = views.ImageFilter.GaussianBlur
    monkeypatch.setattr(views.ImageFilter, "GaussianBlur", record)
    blur = GaussianBlur((0.1, 2.0))
    for _ in range(400):
        blur(Image.new("RGB", (4, 4)))
    assert 0.1 <= min(drawn) < 0.15
    assert 1.95 < max(drawn) <= 2.0
    assert np.mean(drawn) == pytest.approx(1.05, abs=0.12)  # standard error 0.027


@pytest.mark.parametrize("sigma", [1.0, 1.5, 3.0])
def test_blur_spreads_an_edge_by_the_deviation_in_pixels(sigma):
    step = np.zeros((9, 81, 3), np.uint8)
    step[:, 40:] = 255
    row = np.asarray(GaussianBlur((sigma, sigma))(Image.fromarray(step))).astype(float)[4, :, 0]
    weights, places = np.diff(row) / 255, np.arange(80)
    centre = (weights * places).sum()
    assert (weights * (places - centre) ** 2).sum() == pytest.approx(sigma**2, rel=0.1)


def test_blur_keeps_a_constant_picture_and_its_argument():
    constant = Image.new("RGB", (20, 20), (10, 200, 77))
    assert GaussianBlur((2.0, 2.0))(constant).tobytes() == constant.tobytes()
    image = noise(20, 20)
    before = image.tobytes()
    assert GaussianBlur((2.0, 2.0))(image).tobytes() != before
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("owner", "name", "arguments", "share"),
    [(views, "ColorJitter", (0.4, 0.4, 0.4, 0.1), 0.8), (views, "GaussianBlur", ((0.1, 2.0),), 0.5)],
    ids=["jitter", "blur"],
)
def test_contrastive_view_jitters_and_blurs_as_often_as_published(owner, name, arguments, share, monkeypatch):
    calls = []

    def stand_in(*given):
        assert given == arguments
        return lambda image: calls.append(name) or image

    monkeypatch.setattr(owner, name, stand_in)
    view = contrastive_view(data_config(16))
    for _ in range(400):
        view(noise(16, 16))
    assert len(calls) / 400 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 400))


def test_contrastive_view_makes_a_fifth_grey(monkeypatch):
    leave_out(monkeypatch, "RandomApply")
    view = contrastive_view(data_config(16, **UNCHANGED))
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    grey = sum(bool((out[0] == out[1]).all()) for out in (view(red) for _ in range(400)))
    assert grey / 400 == pytest.approx(0.2, abs=0.08)


def test_contrastive_view_crops_a_fifth_to_all_of_the_area(monkeypatch):
    leave_out(monkeypatch, "RandomApply", "RandomGrayscale")
    view = contrastive_view(data_config(32, **UNCHANGED))
    ramp = np.zeros((256, 256, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(256)[:, None]
    areas = []
    for _ in range(300):
        # 32 pixels of a crop: the outermost centres are 31/32 of its side apart
        (x0, x1), (y0, y1) = ((out.min().item(), out.max().item()) for out in view(Image.fromarray(ramp))[:2])
        areas.append((x1 - x0) * (y1 - y0) * (32 / 31) ** 2)
    assert 0.18 <= min(areas) < 0.3
    assert 0.9 < max(areas) <= 1.03
    assert np.mean(areas) == pytest.approx(0.6, abs=0.07)  # a little less: large crops of odd shape do not fit


@pytest.mark.parametrize(
    ("augmentation", "owner", "name", "arguments"),
    [
        ("cifar", views, "AutoAugment", (T.AutoAugmentPolicy.CIFAR10,)),
        ("imagenet", views, "ColorJitter", (0.4, 0.4, 0.4)),
        ("imagenet", views, "rand_augment_transform", ("rand-m10-n2-mstd0.5",)),
    ],
)
def test_supervised_view_uses_the_published_policies(augmentation, owner, name, arguments, monkeypatch):
    given = []
    monkeypatch.setattr(owner, name, lambda *args, **_: given.append(args) or (lambda image: image))
    supervised_view(data_config(32), augmentation)
    assert [args[: len(arguments)] for args in given] == [arguments]


@pytest.mark.parametrize("make", [supervised_view, contrastive_view])
def test_torch_generator_decides_the_view(make):
    view, image = make(data_config(32)), noise(32, 32)
    state = random.getstate(), np.random.get_state()
    outs = {}
    for seed in range(6):
        for other in (1, 2):
            random.seed(other)
            np.random.seed(other)
            torch.manual_seed(seed)
            outs[seed, other] = view(image)
    random.setstate(state[0])
    np.random.set_state(state[1])
    assert all(torch.equal(outs[seed, 1], outs[seed, 2]) for seed in range(6))
    assert not any(torch.equal(outs[0, 1], outs[seed, 1]) for seed in range(1, 6))


def test_source_picture_is_not_changed():
    image = noise(32, 32)
    before = image.tobytes()
    for make in (supervised_view, contrastive_view, evaluation_view):
        view = make(data_config(32))
        for _ in range(5):
            view(image)
    assert image.tobytes() == before


def published_views(config, augmentation):
    """The random views by torchvision alone."""
    size, interpolation = config["input_size"][-1], views.str_to_interp_mode(config["interpolation"])
    end = [T.ToTensor(), T.Normalize(**_mean_std(config))]
    if augmentation == "contrastive":
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=interpolation),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
                *end,
            ]
        )
    padded = [T.Resize(size, interpolation), T.CenterCrop(size), T.RandomCrop(size, padding=size // 8)]
    if augmentation == "agreement":
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        blur = T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.2)
        return T.Compose([*padded, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(p=0.2), blur, *end])
    resized = [T.RandomResizedCrop(size, interpolation=interpolation)]
    flip, jitter = T.RandomHorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.4)
    if augmentation == "cifar":
        policy = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=views.GREY)
        return T.Compose([*padded, flip, policy, end[0], Cutout(size // 2), end[1]])
    if augmentation == "rotated":
        return T.Compose([*padded, flip, T.RandomRotation(15), *end] if size <= 64 else [*resized, flip, jitter, *end])
    if augmentation == "mild":
        return T.Compose([T.RandomResizedCrop(size, (0.5, 1.0), interpolation=interpolation), flip, jitter, *end])
    if augmentation == "plain":
        return T.Compose([*padded, flip, *end] if size <= 64 else [*resized, flip, jitter, *end])
    options = {"img_mean": views.GREY, "translate_const": int(0.45 * size)}
    return T.Compose([*resized, flip, jitter, views.rand_augment_transform("rand-m10-n2-mstd0.5", options), *end])


@pytest.mark.parametrize(
    ("augmentation", "size"),
    [("cifar", 32), ("imagenet", 32), ("contrastive", 32), ("agreement", 32)]
    + [(name, size) for name in ("plain", "rotated", "mild") for size in (32, 96)],
)
def test_random_views_are_torchvisions_draw_by_draw(augmentation, size, monkeypatch):
    """Bit by bit the same, once both shift the hue in the same way."""
    config = data_config(size)
    expected = published_views(config, augmentation)
    make = {"contrastive": contrastive_view, "agreement": agreement_view}
    monkeypatch.setattr(T.functional, "adjust_hue", views.shift_hue)
    view = make[augmentation](config) if augmentation in make else supervised_view(config, augmentation)
    image = Image.fromarray(np.kron(np.array(noise(5, 6)), np.ones((8, 8, 1), np.uint8)))
    for seed in range(60):
        outs = []
        for transform in (expected, view):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            outs.append(transform(image))
        assert torch.equal(*outs)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.037, 0.1, 0.4])
def test_hue_is_turned_as_by_colorsys(turns):
    colours = np.array([*itertools.product(range(0, 256, 51), repeat=3), (1, 0, 0), (254, 255, 255)], np.uint8)
    found = np.asarray(views.shift_hue(Image.fromarray(colours[None]), turns))[0]
    for colour, ours in zip((colours / 255).tolist(), found, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
        assert ours == pytest.approx(np.array(expected) * 255, abs=0.501)
    assert turns != 0 or np.array_equal(found, colours)
