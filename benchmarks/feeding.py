"""How many loading processes keep the training step fed.

    python benchmarks/feeding.py --threads 1           # leaves the other cores to the loading processes
    python benchmarks/feeding.py --architecture resnet50 --image_size 224 --batch_size 8 --images 256

The step takes made-up batches from the device; the loader gives batches of pictures that were made here, and nobody
computes meanwhile. Where cores are shared, both slow down when they run together: the last row of each number of
processes is measured so.
"""

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from loading import MEAN, STD, made_up_files
from measuring import add_sizes, build_task, finish, in_turn, made_up_batch, new_parser, optimiser_step, table
from tqdm import tqdm

from ecl_hf.data.loaders import ViewDataset, train_loader
from ecl_hf.data.views import contrastive_view, supervised_view


def pictures(count: int, image_size: int) -> datasets.Dataset:
    """Made-up pictures as they lie in a parquet file: PNG up to 64 pixels, else JPEG files of 500 x 375."""
    small = image_size <= 64
    files = made_up_files(count, *(image_size,) * 2, "png") if small else made_up_files(count, 500, 375, "jpeg")
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": [0] * count}
    return datasets.Dataset.from_dict(rows, columns)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the results."""
    parser = new_parser("feeding.py", __doc__)
    add_sizes(parser, rounds=9)
    parser.add_argument("--images", type=int, default=4096, help="Pictures that the loaders give in a round")
    parser.add_argument("--workers", type=list[int], default=[1, 2, 4], help="Numbers of loading processes")
    parser.add_argument("--threads", type=int | None, help="Of the training process on a CPU")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    datasets.disable_progress_bars()
    device = torch.device(args.device)
    batch = made_up_batch(args.batch_size, args.image_size, args.num_classes, device)
    step = optimiser_step(build_task(args.architecture, args.num_experts, args.num_classes, device), batch)
    seconds = in_turn({"step": step}, device, args.rounds, args.warmup)["step"]
    need = args.batch_size / statistics.median(seconds)

    config = {"input_size": (3, *(args.image_size,) * 2), "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    augmentation = "cifar" if args.image_size <= 64 else "imagenet"
    views = {"pixel_values": supervised_view(config, augmentation), "contrast_pixel_values": contrastive_view(config)}
    source = pictures(args.images, args.image_size)
    rows, speeds = [("step alone", f"{need:.0f}", "")], {}
    for workers in tqdm(args.workers, "workers", leave=False):
        loader = train_loader(ViewDataset(source, views), args.batch_size, num_workers=workers)
        speeds[workers] = images_per_second(loader), images_per_second(loader, step)
        rows.append((f"{workers} loading", f"{speeds[workers][0]:.0f}", f"{speeds[workers][0] / need:.2f}"))
        rows.append((f"{workers} loading, and step", f"{speeds[workers][1]:.0f}", f"{speeds[workers][1] / need:.2f}"))
    enough = [workers for workers, (alone, _) in speeds.items() if alone >= need]
    text = table("processes | images/s | / step alone", rows)
    text += f"\n\nFewest that keep the step fed: {min(enough, default=f'more than {max(args.workers)}')}"
    text += f", on {os.cpu_count()} cores"
    results = {"images_per_second": {"step": need, **speeds}, "fewest": min(enough, default=None)}
    name = f"feeding_{args.architecture}_{args.image_size}px"
    return finish(name, text, results, device, args.results_dir)


def images_per_second(loader: Any, step: Any = None) -> float:
    """Of an epoch after its first batch, for which the loading processes had to start."""
    batches = iter(loader)
    next(batches)
    started, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch["labels"])
        if step:
            step()
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
