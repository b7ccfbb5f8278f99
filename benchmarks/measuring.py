"""What the benchmarks share: the steps they time, alternatives in turn, tables and files.

Ratios compare what was timed within one round, so that a machine that is slow for a while is slow for all.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.finite import StepCheck
from ecl_hf.learning.memory import keep_freed_memory
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import ECLSettings
from ecl_hf.runs.folder import describe_environment, write_atomically

Batch = dict[str, Tensor]
Step = Callable[[], Any]


def new_parser(script: str, description: str) -> ArgumentParser:
    """A parser with the flags of all benchmarks."""
    parser = ArgumentParser(prog=script, description=description.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=str, default=default, help="cpu or cuda")
    parser.add_argument("--results_dir", type=Path | None, help="Directory for the table and a JSON file")
    return parser


def add_sizes(parser: ArgumentParser, rounds: int) -> None:
    """Flags of what is timed, with the paper's values for CIFAR-100-LT."""
    parser.add_argument("--architecture", type=str, default="resnet32_cifar", help="timm name of the encoders")
    parser.add_argument("--image_size", type=int, default=32, help="Side of the pictures")
    parser.add_argument("--batch_size", type=int, default=64, help="Pictures of a step")
    parser.add_argument("--num_experts", type=int, default=3, help="K")
    parser.add_argument("--num_classes", type=int, default=100, help="C")
    parser.add_argument("--rounds", type=int, default=rounds, help="Timed rounds")
    parser.add_argument("--warmup", type=int, default=3, help="Rounds before them")


def in_turn(
    alternatives: dict[str, Step],
    device: torch.device,
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each alternative in each round; freed memory stays with the process, as in training.

    Args:
        alternatives: by name.
        device: that they run on.
        rounds: that count.
        warmup: rounds before them.
        clock: `time.process_time` for seconds of the processor, which other programs hardly change.
    """
    if device.type == "cpu":
        keep_freed_memory()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in tqdm(range(warmup + rounds), "rounds", leave=False):
        for name, alternative in alternatives.items():
            synchronise(device)
            started = clock()
            alternative()
            synchronise(device)
            if number >= warmup:
                seconds[name].append(clock() - started)
    return seconds


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of one time divided by another."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(header: str, rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; `header` has its columns with | between them."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|" + "---|" * columns]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def finish(name: str, text: str, results: dict[str, Any], device: torch.device, folder: Path | None) -> dict[str, Any]:
    """Print the tables; write them and all numbers with machine and versions; return the latter."""
    print(text)
    results = {**results, **describe_environment(1, device), "processor": processor()}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
        machine = results["machine"]
        about = (
            f"{processor()}, {machine['device']}, {machine['threads_per_process']} threads, torch {torch.__version__}"
        )
        write_atomically(folder / f"{name}.md", f"{text}\n\n{about}\n")
    return results


def processor() -> str:
    """Its name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def made_up_batch(batch_size: int, image_size: int, num_classes: int, device: torch.device) -> Batch:
    """Two views and labels, on the device and in the memory order in which the loaders give them."""
    views = [torch.randn(batch_size, 3, image_size, image_size, device=device) for _ in range(2)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    labels = torch.randint(num_classes, (batch_size,), device=device)
    return {"pixel_values": views[0], "labels": labels, "contrast_pixel_values": views[1]}


def floor_step(architecture: str, num_experts: int, num_classes: int, batch: Batch, joint: bool = False) -> Step:
    """K bare models: forward and backward of one view, forward without gradient of the other.

    Args:
        architecture: timm name.
        num_experts: K.
        num_classes: C.
        batch: of `made_up_batch`.
        joint: one backward through all models, which a loss over all of them needs; else one after the other.
    """
    device = batch["labels"].device
    models = [timm.create_model(architecture, num_classes=num_classes) for _ in range(num_experts)]
    models = [model.to(device, memory_format=torch.channels_last).train() for model in models]
    keys = [copy.deepcopy(model).requires_grad_(False) for model in models]

    def step() -> None:
        losses = []
        for model, key in zip(models, keys, strict=True):
            losses.append(model(batch["pixel_values"]).mean())
            if not joint:
                losses.pop().backward()
            with torch.no_grad():
                key(batch["contrast_pixel_values"])
        if joint:
            torch.stack(losses).sum().backward()
        for model in models:
            model.zero_grad()

    return step


def long_tail(num_classes: int) -> list[int]:
    """Class counts that fall from 500 to 5, as those of CIFAR-100-LT."""
    return [max(1, int(500 * 0.01 ** (c / max(1, num_classes - 1)))) for c in range(num_classes)]


def build_task(
    architecture: str, num_experts: int, num_classes: int, device: torch.device, queue_size: int = 1024
) -> CollaborativeTask:
    """ECL with a long tail of classes, ready to train."""
    config = ECLConfig(architecture=architecture, num_experts=num_experts, class_counts=long_tail(num_classes))
    losses = ECLSettings(sup_reduction="sum", queue_size=queue_size)
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["ecl"], losses)
    return task.to(device, memory_format=torch.channels_last).train()


def optimiser_step(
    task: CollaborativeTask,
    batch: Batch,
    wrapped: Callable[..., dict[str, Any]] | None = None,
    gather: Callable[[Tensor], Tensor] = lambda keys: keys,
    reduce: Callable[[Tensor], Tensor] = lambda flags: flags,
    around_backward: Callable = nullcontext,
) -> Step:
    """What `training/train.py` does with a batch: forward, backward, check, SGD, queues, key encoders.

    Args:
        task: of `build_task`, for instance.
        batch: of `made_up_batch`.
        wrapped: the task as it is called, by several processes or in mixed precision.
        gather: keys of all processes.
        reduce: sum over all processes.
        around_backward: makes a context manager for the backward pass.
    """
    parameters = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-3, fused=True)
    check = StepCheck(task, reduce)
    positions = torch.arange(len(batch["labels"]))

    def step() -> None:
        out = (wrapped or task)(**batch)
        with around_backward():
            out["loss"].backward()
        keys = None if out["keys"] is None else (gather(out["keys"]), gather(batch["labels"]))
        check.add(out, keys, positions)
        finite, _ = check.judge()
        if not finite:
            raise FloatingPointError("the made-up batch has led to numbers that are not finite")
        optimizer.step()
        optimizer.zero_grad()
        if check.keys:
            task.enqueue(torch.cat(check.keys), torch.cat(check.labels))
        task.follow()
        check.begin()

    return step
