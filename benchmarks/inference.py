"""Time, loading and pipeline of a saved ensemble and of one of its experts, side by side with plain timm models.

    python benchmarks/inference.py
    python benchmarks/inference.py --architecture resnet50 --image_size 224 --batch_size 8 --images 128

- forward: one expert, as `from_pretrained(..., experts=[0])` gives it, beside a bare timm model with a classifier; the
  ensemble beside K of them, one after the other; both compiled; and the ensemble with its experts batched by
  `torch.func.vmap`, which makes one grouped convolution of K.
- loading: `from_pretrained` for one expert beside all. What one expert reads is all that lies in the directory then.
- pipeline: pictures in, classes out, beside transformers' own wrapper of the same timm model.
"""

import copy
import shutil
import statistics
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
import transformers
from measuring import Step, add_sizes, finish, in_turn, new_parser, ratio, table
from PIL import Image
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from transformers import pipeline

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.publishing.hub import save_timm

Seconds = dict[str, list[float]]


def forwards(folder: Path, args: Any, device: torch.device) -> dict[str, Step]:
    """What is timed of the forward pass."""
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    create = timm.create_model
    plain = [create(args.architecture, num_classes=args.num_classes) for _ in range(args.num_experts)]
    ours = {
        "one expert": ECLForImageClassification.from_pretrained(folder, experts=[0]),
        "ensemble": ECLForImageClassification.from_pretrained(folder),
    }
    bare = {"bare timm model": plain[:1], f"{args.num_experts} bare timm models": plain}
    for model in (*plain, *ours.values()):
        model.to(device, memory_format=torch.channels_last).eval()
    steps = {name: lambda models=models: [model(images) for model in models] for name, models in bare.items()}
    steps |= {name: lambda model=model: model(images).logits for name, model in ours.items()}
    steps["ensemble, batched experts"] = batched(ours["ensemble"], images)
    if args.compile:
        together = torch.compile(lambda pixels: [model(pixels) for model in plain])
        steps[f"{args.num_experts} bare timm models, compiled"] = lambda: together(images)
        ensemble = torch.compile(lambda pixels: ours["ensemble"](pixels).logits)
        steps["ensemble, compiled"] = lambda: ensemble(images)
    return {name: torch.inference_mode()(step) for name, step in steps.items()}


def batched(model: ECLForImageClassification, images: Tensor) -> Step:
    """All experts in one call, with their weights stacked."""
    weights = stack_module_state(list(model.experts))
    expert = copy.deepcopy(model.experts[0]).to("meta")
    together = vmap(lambda *weights: functional_call(expert, weights, (images,))[1])

    def step() -> Tensor:
        with warnings.catch_warnings():  # of a pooling layer that is done expert by expert
            warnings.simplefilter("ignore", UserWarning)
            return together(*weights).mean(0)

    return step


def pipelines(folder: Path, args: Any, device: torch.device) -> dict[str, Step]:
    """What is timed of the way from pictures to classes."""
    exported, one = folder.with_name("timm"), folder.with_name("one")
    save_timm(ECLForImageClassification.from_pretrained(folder), 0, exported)
    ECLForImageClassification.from_pretrained(folder, experts=[0]).save_pretrained(one)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (args.images, args.image_size, args.image_size, 3), np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    models = {"TimmWrapper": exported, "one expert": one, "ensemble": folder}
    classify = {name: pipeline("image-classification", str(path), device=device) for name, path in models.items()}
    return {name: partial(way, pictures, batch_size=args.batch_size) for name, way in classify.items()}


def weight_bytes(folder: Path) -> int:
    """Size of all weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def without_others(folder: Path) -> Path:
    """A copy of the saved ensemble with the weights of its first expert alone."""
    first = folder.with_name("first")
    shutil.copytree(folder, first)
    for file in sorted(first.glob("model-*.safetensors"))[1:]:
        file.unlink()
    return first


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the results."""
    parser = new_parser("inference.py", __doc__)
    add_sizes(parser, rounds=25)
    parser.add_argument("--images", type=int, default=512, help="Pictures for the pipeline")
    parser.add_argument("--compile", type=bool, default=True, help="Also time compiled forwards")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device, k = torch.device(args.device), args.num_experts
    config = ECLConfig(architecture=args.architecture, num_experts=k, num_labels=args.num_classes)
    config.pretrained_cfg = {"input_size": (3, args.image_size, args.image_size), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    config.pretrained_cfg |= {"interpolation": "bilinear", "crop_pct": 1.0}
    with TemporaryDirectory() as directory:
        folder = Path(directory) / "ensemble"
        ECLForImageClassification(config).save_pretrained(folder)
        first = without_others(folder)
        loads = {
            "one expert": lambda: ECLForImageClassification.from_pretrained(first, experts=[0]),
            "ensemble": lambda: ECLForImageClassification.from_pretrained(folder),
        }
        read = {"one expert": weight_bytes(first), "ensemble": weight_bytes(folder)}
        forward = in_turn(forwards(folder, args, device), device, args.rounds, args.warmup)
        loading = in_turn(loads, device, args.rounds, args.warmup)
        piped = in_turn(pipelines(folder, args, device), device, max(1, args.rounds // 5), 1)

    floors = {"one": forward["bare timm model"], "ens": forward[f"{k} bare timm models"]}
    rows = []
    for name, seconds in forward.items():
        floor = floors["one" if name in ("one expert", "bare timm model") else "ens"]
        rows.append((name, *in_ms(seconds, args.batch_size), f"{ratio(seconds, floor):.3f}"))
    text = [table("forward | ms | images/s | time / bare timm", rows)]
    rows = []
    for name, seconds in loading.items():
        share = (f"{read[name] / read['ensemble']:.3f}", f"{ratio(seconds, loading['ensemble']):.3f}")
        rows.append((name, f"{read[name] / 1e6:.2f}", in_ms(seconds, 1)[0], *share))
    text.append(table("loading | MB | ms | MB / ensemble's | time / ensemble's", rows))
    rows = [
        (name, *in_ms(seconds, args.images), f"{ratio(piped['TimmWrapper'], seconds):.2f}")
        for name, seconds in piped.items()
    ]
    text.append(table("pipeline | ms | images/s | images/s / TimmWrapper's", rows))
    setting = {name: getattr(args, name) for name in ("architecture", "image_size", "batch_size", "num_experts")}
    results = {**setting, "images": args.images, "bytes": read}
    results |= {"forward_seconds": forward, "loading_seconds": loading, "pipeline_seconds": piped}
    name = f"inference_{args.architecture}_{args.image_size}px_batch{args.batch_size}"
    return finish(name, "\n\n".join(text), results, device, args.results_dir)


def in_ms(seconds: list[float], images: int) -> tuple[str, str]:
    """Median in milliseconds, and images per second."""
    median = statistics.median(seconds)
    return f"{1e3 * median:.1f}", f"{images / median:.0f}"


if __name__ == "__main__":
    main()
