"""What the architectures and steps of methods with several experts cost, against one network.

    python benchmarks/architectures.py                            # ResNet-32, 32 px, batch 64
    python benchmarks/architectures.py --methods '[ce,ride,bbn]'

Every model is built as a training builds it: with the method's own number of experts (K where it is free), sharing and
heads. Multiply-adds are those of convolutions and matrix products, counted by PyTorch: of the published model on one
picture, and of a training step (its first stage, forward and backward) by pictures of the batch. Steps of all methods
are timed in turn, round after round, in one process; data lie on the device. What happens once an epoch is not counted.

A second table has the published costs of RIDE's reduced experts beside those of ours; nothing is timed there.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from measuring import (
    Batch,
    add_sizes,
    finish,
    in_turn,
    long_tail,
    made_up_batch,
    new_parser,
    optimiser_step,
    ratio,
    table,
)
from torch.utils.flop_counter import FlopCounterMode

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.learning.stages import begin_heads
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.base import MixingContext, Time
from ecl_hf.runs.folder import describe_model

ONE = "ce"
"""One plain network, with which all are compared."""
REDUCED = {"ride": [16, 24, 48], "sade": [16, 24, 48], "mdcs": [16, 24, 48]}
"""Widths of a CIFAR ResNet's stages, where a method was published with narrower ones."""
BEGINNING = Time()
NAMES = {"bc_ensemble": "bc_ensemble, nothing shared"}
COMPARED = [ONE, "bc_ensemble", "ride", "sade", "balpoe", "lgla", "mdcs", "bbn", "ace", "reslt", "shike", "tcl"]
COMPARED += ["ncl_plain", "ncl", "ecl"]
PUBLISHED = {
    "resnet32_cifar": ({"widths": [16, 24, 48]}, 1, 100, 0.07, 0.11),
    "resnet50": ({"channels": [64, 128, 192, 384]}, 2, 1000, 4.14, 5.80),
    "resnext50_32x4d": ({"channels": [64, 128, 192, 384]}, 2, 1000, 4.26, 6.08),
}
"""By architecture: RIDE's arguments, shared stages, classes; billions of multiply-adds of one network and of three
experts as the README of Vanint/SADE-AgnosticLT@cba11b8 has them."""


def build(name: str, architecture: str, image_size: int, num_experts: int, class_counts: list[int]) -> tuple:
    """Task in the first stage of a method, with its teacher if it has one, and the size of its published model."""
    method = METHODS[name]
    settings = method.settings()
    widths = REDUCED.get(name) if architecture.endswith("_cifar") else None
    config = ModelConfig(
        architecture=architecture,
        image_size=image_size,
        args={"widths": widths} if widths else None,
        num_experts=num_experts if method.experts.most is None else method.experts.most,
    )
    names = [str(c) for c in range(len(class_counts))]
    model = initialise_model(config, method, class_counts, names, settings)
    size = describe_model(model)
    begin_heads(model, method.stages[0], settings)
    teacher = build(method.teacher, architecture, image_size, 1, class_counts)[0].model if method.teacher else None
    return CollaborativeTask(model, method, settings, teacher=teacher), size


def batch_for(task: CollaborativeTask, batch: Batch) -> Batch:
    """Of a made-up batch, what a task takes: its views and streams."""
    stage, pixels = task.stage, batch["contrast_pixel_values"]
    needed = {name: batch[name] for name in ("pixel_values", "labels")}
    needed |= {f"view_{n}": pixels for n in range(len(stage.views))}
    if "momentum" in stage.needs:
        needed["contrast_pixel_values"] = pixels
    if stage.partners:
        needed |= {"partner_pixel_values": pixels, "partner_labels": batch["labels"].flip(0)}
    return needed | {"indices": torch.arange(len(pixels), device=pixels.device)}


def step_of(task: CollaborativeTask, batch: Batch, time: Time = BEGINNING) -> Any:
    """A training step with the stage's mixing, as far as the stage has come."""
    counts = torch.tensor(task.model.config.class_counts)
    context = MixingContext(task.settings, time, torch.Generator().manual_seed(0), task, counts)
    mixing = task.stage.mixing
    return optimiser_step(task, batch, (lambda **given: task(**mixing(given, context))) if mixing else None)


def compare_with_published() -> list[tuple[str, ...]]:
    """Rows of the second table; networks without numbers in them, for only their shapes matter."""
    rows = []
    for architecture, (args, stages, classes, *published) in PUBLISHED.items():
        found = []
        for experts, model_args, shared in ((1, None, 0), (3, args, stages)):
            config = ECLConfig(
                architecture=architecture,
                num_experts=experts,
                share_stages=shared,
                model_args=model_args,
                num_labels=classes,
            )
            with torch.device("meta"):
                model = ECLForImageClassification(config)
            found.append(describe_model(model))
        sizes = [f"{size['parameters'] / 1e6:.2f}" for size in found]
        costs = [f"{size['macs'] / 1e9:.3f} ({theirs:.2f})" for size, theirs in zip(found, published, strict=True)]
        rows.append((architecture, model.config.pretrained_cfg["input_size"][-1], *sizes, *costs))
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Count and measure, print the tables, write the results."""
    parser = new_parser("architectures.py", __doc__)
    add_sizes(parser, rounds=11)
    parser.add_argument("--methods", type=list[str], default=COMPARED, help=f"To compare with {ONE}")
    parser.add_argument("--processor_time", type=bool, default=False, help="Of one thread; beside other programs")
    args = parser.parse_args(argv)
    if absent := [name for name in args.methods if name not in METHODS or METHODS[name].teacher]:
        parser.error(f"methods: {', '.join(absent)} are unknown, or learn from a teacher")
    device = torch.device(args.device)
    torch.manual_seed(0)
    batch = made_up_batch(args.batch_size, args.image_size, args.num_classes, device)
    steps, sizes = {}, {}
    for name in dict.fromkeys([ONE, *args.methods]):
        task, sizes[name] = build(
            name, args.architecture, args.image_size, args.num_experts, long_tail(args.num_classes)
        )
        task = task.to(device, memory_format=torch.channels_last).train()
        steps[name] = step_of(task, batch_for(task, batch))
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        experts = len(task.model.experts)
        sizes[name] |= {"experts": experts, "macs_of_step": counter.get_total_flops() // 2 // args.batch_size}
    clock = time.process_time if args.processor_time else time.perf_counter
    seconds = in_turn(steps, device, args.rounds, args.warmup, clock)

    one, rows = sizes[ONE], []
    for name, size in sizes.items():
        macs = [f"{size[key] / 1e6:.0f} ({size[key] / one[key]:.2f})" for key in ("macs", "macs_of_step")]
        median = 1e3 * statistics.median(seconds[name])
        times = f"{median:.0f} ({ratio(seconds[name], seconds[ONE]):.2f})"
        parameters = f"{size['parameters'] / 1e6:.2f} ({size['parameters'] / one['parameters']:.2f})"
        rows.append((NAMES.get(name, name), size["experts"], parameters, *macs, times))
    text = table(
        "method | K | million parameters (times one network's) | million multiply-adds of a picture "
        f"| of a training step, by picture | step, ms{' of the processor' if args.processor_time else ''}",
        rows,
    )
    header = (
        "architecture | pixels | million parameters | of RIDE's 3 experts "
        "| billion multiply-adds (published) | of RIDE's 3 experts (published)"
    )
    text += "\n\n" + table(header, compare_with_published())
    setting = {name: getattr(args, name) for name in ("architecture", "image_size", "batch_size", "num_experts")}
    setting |= {"num_classes": args.num_classes, "rounds": args.rounds, "processor_time": args.processor_time}
    results = {**setting, "sizes": sizes, "seconds": seconds}
    return finish(f"architectures_{args.architecture}_{args.image_size}px", text, results, device, args.results_dir)


if __name__ == "__main__":
    main()
