"""Images per second and core of two-view loading, side by side with the plain pipeline of PIL and torchvision.

    python benchmarks/loading.py
    python benchmarks/loading.py --path DIR --results_dir benchmarks/results     # DIR: CIFAR-100's parquet files

- plain: a `Dataset` that opens the file with PIL each time, converts it to RGB, and gives it to one torchvision
  `Compose` for each view, ending in `ToTensor` and `Normalize`; the default `DataLoader`.
- ours: `ViewDataset` and `train_loader`, which seed every picture; pictures decoded as they come.
- ours, kept: the same for sets that fit into memory, after they were decoded once.

All load in the main process with one thread, in turn, round after round; times are the processor's, so that other
programs count little. The augmentations are the same: the supervised and the contrastive view of `ecl_hf.data.views`.
Without --path the pictures are made here: textures with noise, PNG of 32 pixels and JPEG of 500 x 375.
"""

import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

from ecl_hf.data.config import DataConfig
from ecl_hf.data.loaders import ViewDataset, train_loader
from ecl_hf.data.sources import read_source
from ecl_hf.data.views import GREY, Cutout, GaussianBlur, contrastive_view, supervised_view
from ecl_hf.runs.folder import describe_environment, write_atomically

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainPictures(Dataset):
    """What a user writes first.

    Args:
        files: content of picture files.
        labels: of each.
        views: one `Compose` for each.
    """

    def __init__(self, files: list[bytes], labels: list[int], views: list[Callable]) -> None:
        self.files, self.labels, self.views = files, labels, views

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple:
        image = Image.open(io.BytesIO(self.files[index])).convert("RGB")
        return (*(view(image) for view in self.views), self.labels[index])


def plain_views(size: int, augmentation: str) -> list[T.Compose]:
    """The supervised and the contrastive view by torchvision (RandAugment by timm)."""
    bilinear, end = InterpolationMode.BILINEAR, [T.ToTensor(), T.Normalize(MEAN, STD)]
    if augmentation == "cifar":
        policy = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10, fill=GREY)
        steps = [T.RandomCrop(size, padding=size // 8), T.RandomHorizontalFlip(), policy]
        supervised = [*steps, end[0], Cutout(size // 2), end[1]]
    else:
        policy = rand_augment_transform("rand-m10-n2-mstd0.5", {"img_mean": GREY, "translate_const": int(0.45 * size)})
        crop = T.RandomResizedCrop(size, interpolation=bilinear)
        supervised = [crop, T.RandomHorizontalFlip(), T.ColorJitter(0.4, 0.4, 0.4), policy, *end]
    contrastive = [
        T.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=bilinear),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
        *end,
    ]
    return [T.Compose(supervised), T.Compose(contrastive)]


def made_up_files(count: int, width: int, height: int, kind: str) -> list[bytes]:
    """Smooth colours with a fine noise on them, about as large in a file as photographs are."""
    random, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + random.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "jpeg" else {}))
        files.append(file.getvalue())
    return files


def cifar_files(path: str, count: int) -> list[bytes]:
    """The first training pictures of CIFAR's parquet files, as they are stored."""
    config = DataConfig(path=path, profile="as_is", label_column="fine_label")
    pictures = read_source(config).train.cast_column("image", datasets.Image(decode=False))
    return [record["bytes"] for record in pictures.select(range(count))["image"]]


def loaders(files: list[bytes], size: int, augmentation: str) -> dict[str, DataLoader]:
    """The pipelines to compare, over the same files."""
    config = {"input_size": (3, size, size), "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    views = {"pixel_values": supervised_view(config, augmentation), "contrast_pixel_values": contrastive_view(config)}
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [0] * len(files)}
    ours = datasets.Dataset.from_dict(rows, columns)
    plain = PlainPictures(files, rows["label"], plain_views(size, augmentation))
    return {
        "plain": DataLoader(plain, BATCH, shuffle=True, drop_last=True),
        "ours": train_loader(ViewDataset(ours, views), BATCH),
        "ours, kept": train_loader(ViewDataset(ours, views, keep=True), BATCH),
    }


def measure(pipelines: dict[str, DataLoader], rounds: int) -> dict[str, list[float]]:
    """Images per second of processor time of each pipeline in each round, after one that does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in tqdm(range(rounds + 1), leave=False):
        for name, loader in pipelines.items():
            started = time.process_time()
            images = BATCH * sum(1 for _ in loader)
            if number:
                speeds[name].append(images / (time.process_time() - started))
    return speeds


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the results."""
    parser = ArgumentParser(prog="loading.py", description=__doc__.split("\n")[0])
    parser.add_argument("--path", type=str | None, help="Directory with CIFAR-100's parquet files, for 32 pixels")
    parser.add_argument("--images", type=int, default=1024, help="Pictures of 32 pixels; an eighth as many JPEG files")
    parser.add_argument("--rounds", type=int, default=7, help="Timed rounds")
    parser.add_argument("--results_dir", type=Path | None, help="Directory for loading.json and loading.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    small = cifar_files(args.path, args.images) if args.path else made_up_files(args.images, 32, 32, "png")
    large = made_up_files(max(BATCH, args.images // 8), 500, 375, "jpeg")
    cases = {
        "CIFAR-100, PNG, 32 px" if args.path else "made-up PNG, 32 px": (small, 32, "cifar"),
        "made-up JPEG of 500 x 375, 224 px": (large, 224, "imagenet"),
    }
    lines = ["| pictures | pipeline | images/s per core | against plain |", "|---|---|---|---|"]
    results = {"rounds": args.rounds, "batch_size": BATCH, "cases": {}}
    for case, (files, size, augmentation) in cases.items():
        speeds = measure(loaders(files, size, augmentation), args.rounds)
        median = {name: statistics.median(values) for name, values in speeds.items()}
        results["cases"][case] = {"images": len(files), "median": median, "images_per_second": speeds}
        lines += [
            f"| {case} | {name} | {value:.0f} | {value / median['plain']:.2f} |" for name, value in median.items()
        ]
    table = "\n".join(lines)
    print(table)
    results |= describe_environment(1, torch.device("cpu"))
    if args.results_dir:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(args.results_dir / "loading.json", json.dumps(results, indent=1) + "\n")
        write_atomically(args.results_dir / "loading.md", table + "\n")
    return results


if __name__ == "__main__":
    main()
