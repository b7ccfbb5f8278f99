"""Training on class folders by `train.py`, side by side with `transformers.Trainer` and with kept features.

    python benchmarks/trainer.py --results_dir benchmarks/results
    python benchmarks/trainer.py --pretrained lite0.safetensors        # see lite0_weights.py

All train the same timm encoder on the same JPEG files of 500 x 375 pixels with the same views (resized crop, flip,
colours), AdamW and batch, for the same number of epochs, in turn in one process, without loading processes:

- trainer: `datasets`' image folder, torchvision's transforms, `transformers.Trainer`.
- ours: `train.py --method ce`.
- ours, kept features: the same with `model.tune head`, with the time that the features take.

Images/s are those of whole epochs after the first, which is the one in which pictures are decoded that fit into
memory; the times of whole runs have the first, too.
"""

import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from loading import MEAN, STD, made_up_files
from measuring import finish, new_parser, table
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms as T
from transformers import Trainer, TrainerCallback, TrainingArguments

from ecl_hf.learning.memory import keep_freed_memory
from ecl_hf.training.train import main as train

CLASSES = 10


class Classifier(nn.Module):
    """A timm model as `Trainer` wants it: its loss comes out of `forward`."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.model = timm.create_model(architecture, num_classes=CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] and labels [B] -> `loss` and `logits` [B, C]."""
        logits = self.model(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class EpochTimes(TrainerCallback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Read it."""
        self.seconds.append(time.perf_counter() - self.started)


def write_pictures(folder: Path, images: int) -> None:
    """Class folders below `train` and, with a tenth of the pictures, below `test`."""
    for n, file in enumerate(made_up_files(images + max(images // 10, CLASSES), 500, 375, "jpeg")):
        place = folder / ("train" if n < images else "test") / f"class{n % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.jpg").write_bytes(file)


def by_trainer(args: Any, pictures: Path, output: Path) -> list[float]:
    """Seconds of each epoch."""
    crop = T.RandomResizedCrop(args.image_size, interpolation=T.InterpolationMode.BILINEAR)
    colours = T.ColorJitter(0.4, 0.4, 0.4)
    view = T.Compose([crop, T.RandomHorizontalFlip(), colours, T.ToTensor(), T.Normalize(MEAN, STD)])
    data = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
    data = data.with_transform(
        lambda rows: {"pixel_values": [view(image.convert("RGB")) for image in rows["image"]], "labels": rows["label"]}
    )
    times = EpochTimes()
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
    )
    Trainer(Classifier(args.architecture), arguments, train_dataset=data, callbacks=[times]).train()
    return times.seconds


def by_us(args: Any, pictures: Path, output: Path, *flags: str) -> list[float]:
    """Seconds of each epoch by the run's log."""
    run = train(
        [
            "--method=ce",
            f"--data.path={pictures}",
            "--data.profile=as_is",
            "--data.augmentation=plain",
            "--data.num_workers=0",
            f"--model.architecture={args.architecture}",
            f"--model.image_size={args.image_size}",
            f"--model.pretrained={args.pretrained or 'false'}",
            "--optim.name=adamw",
            "--optim.lr=0.001",
            f"--batch_size={args.batch_size}",
            f"--epochs={args.epochs}",
            f"--output_dir={output}",
            *flags,
        ]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    images = args.images // args.batch_size * args.batch_size
    return [images / line["images_per_second"] for line in lines]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Time all in turn and print one table."""
    parser = new_parser("trainer.py", __doc__)
    parser.add_argument("--architecture", type=str, default="tf_efficientnet_lite0", help="timm name of the encoder")
    parser.add_argument("--pretrained", type=Path | None, help="Its weights; kept features are timed where it is given")
    parser.add_argument("--image_size", type=int, default=96, help="Side of the views")
    parser.add_argument("--images", type=int, default=256, help="Training pictures")
    parser.add_argument("--batch_size", type=int, default=32, help="Pictures of a step")
    parser.add_argument("--epochs", type=int, default=3, help="Of each run")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    keep_freed_memory()
    ways = {"trainer": lambda *where: by_trainer(args, *where), "ours": lambda *where: by_us(args, *where)}
    if args.pretrained:
        ways["ours, kept features"] = lambda *where: by_us(args, *where, "--model.tune=head")
    epochs: dict[str, list[float]] = {name: [] for name in ways}
    runs: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        write_pictures(pictures, args.images)
        for number in range(args.rounds):
            for name, way in random.Random(number).sample(sorted(ways.items()), len(ways)):
                started = time.perf_counter()
                seconds = way(pictures, Path(folder) / f"{name}{number}")
                runs[name].append(time.perf_counter() - started)
                epochs[name].append(statistics.median(seconds[1:] or seconds))
    images = args.images // args.batch_size * args.batch_size
    rows = []
    for name in ways:
        faster = statistics.median(a / b for a, b in zip(epochs["trainer"], epochs[name], strict=True))
        whole = statistics.median(a / b for a, b in zip(runs["trainer"], runs[name], strict=True))
        speed = images / statistics.median(epochs[name])
        rows.append([name, f"{speed:.0f}", f"{faster:.2f}", f"{statistics.median(runs[name]):.1f}", f"{whole:.2f}"])
    text = table("way | images/s | times the trainer's | s of a whole run | times faster", rows)
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "results_dir"}
    results = {"setting": setting, "seconds_of_an_epoch": epochs, "seconds_of_a_run": runs}
    return finish("trainer", text, results, device, args.results_dir)


if __name__ == "__main__":
    main()
