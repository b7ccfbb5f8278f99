"""Peak memory of a training step with each way to save some, over the number of experts; and the time it takes.

    python benchmarks/memory.py
    python benchmarks/memory.py --architecture resnet50 --image_size 224 --batch_size 8

- floor: K bare timm models and their key encoders, one backward through all of them; no loss worth the name, no
  optimiser.
- ECL: a whole step, with losses, queues, moving averages and SGD.
- blocks: `train.gradient_checkpointing`. One by one: `train.experts_one_by_one`.

Each peak is of a process of its own: what it holds beyond what it held before the models were built. On a CPU that is
its resident memory (Linux), with freed memory given back at once; on a GPU what PyTorch has allocated.
"""

import multiprocessing
import os
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Step,
    add_sizes,
    build_task,
    finish,
    floor_step,
    in_turn,
    made_up_batch,
    new_parser,
    optimiser_step,
    ratio,
    table,
)

from ecl_hf.learning.memory import checkpoint_blocks, checkpoint_experts, counted_once
from ecl_hf.modeling_ecl import ECLForImageClassification

Saving = tuple[Callable[[ECLForImageClassification], None], ...]

MODES: dict[str, Saving] = {
    "ECL": (),
    "blocks": (checkpoint_blocks,),
    "one by one": (checkpoint_experts,),
    "both": (checkpoint_blocks, checkpoint_experts),
}
STEPS = 3


def saving_step(sizes: tuple[str, int, int], batch: dict[str, torch.Tensor], mode: str, queue_size: int = 1024) -> Step:
    """A step of ECL in one of the modes, or the floor."""
    if mode == "floor":
        return floor_step(*sizes, batch, joint=True)
    task = build_task(*sizes, batch["labels"].device, queue_size)
    for save in MODES[mode]:
        save(task.model)
    return optimiser_step(task, batch, around_backward=partial(counted_once, task) if MODES[mode] else nullcontext)


def resident(peak: bool = False) -> int:
    """Bytes of this process, now or at most since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status)[1])


def peak_of_step(
    architecture: str,
    num_experts: int,
    num_classes: int,
    batch_size: int,
    image_size: int,
    queue_size: int,
    mode: str,
    device: str,
) -> int:
    """Bytes that a few steps need at most, beyond those of the libraries; for a fresh process."""
    device = torch.device(device)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = resident()
    batch = made_up_batch(batch_size, image_size, num_classes, device)
    step = saving_step((architecture, num_experts, num_classes), batch, mode, queue_size)
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident(peak=True) - before


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Result of a function of this directory, called in a process that does nothing else."""
    # Else the C library would hold back what was freed, and blur the peak
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "transformers.modeling_utils", "ecl_hf.learning.task"])
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the results."""
    parser = new_parser("memory.py", __doc__)
    add_sizes(parser, rounds=7)
    parser.add_argument("--experts", type=list[int], default=[1, 2, 3, 4, 5, 6], help="K of the rows of memory")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    pictures = (args.batch_size, args.image_size)
    peaks = {
        k: {
            mode: in_fresh_process(
                peak_of_step, args.architecture, k, args.num_classes, *pictures, 1024, mode, args.device
            )
            for mode in ("floor", *MODES)
        }
        for k in args.experts
    }
    rows = []
    for k, peak in peaks.items():
        rows.append((k, *(f"{value / 2**20:.0f} ({value / peak['floor']:.2f})" for value in peak.values())))
    memory = table(f"K | {' | '.join(f'{mode}, MiB' for mode in ('floor', *MODES))}", rows)

    batch = made_up_batch(*pictures, args.num_classes, device)
    sizes = (args.architecture, args.num_experts, args.num_classes)
    seconds = in_turn({mode: saving_step(sizes, batch, mode) for mode in MODES}, device, args.rounds, args.warmup)
    times = table(
        f"K = {args.num_experts} | ms | time / ECL",
        [(m, f"{1e3 * statistics.median(s):.0f}", f"{ratio(s, seconds['ECL']):.2f}") for m, s in seconds.items()],
    )
    setting = {name: getattr(args, name) for name in ("architecture", "image_size", "batch_size", "num_classes")}
    results = {**setting, "peak_bytes": peaks, "num_experts": args.num_experts, "seconds": seconds}
    text = f"Peak memory of a step (times the floor's):\n\n{memory}\n\n{times}"
    return finish(f"memory_{args.architecture}_{args.image_size}px", text, results, device, args.results_dir)


if __name__ == "__main__":
    main()
