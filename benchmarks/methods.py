"""Peak memory and time of a step of methods with a queue, more views or translated pictures, against cross-entropy.

    python benchmarks/methods.py                                  # ResNet-32, 32 px, batch 64
    python benchmarks/methods.py --methods '[kcl,hybrid_sc]'

One network each, with the method's own settings. The step is one near the end of training, when M2m translates
pictures; of a made-up batch, in which all classes are equally likely. Steps are timed in turn, round after round, in
one process; each peak is of a process of its own, as in memory.py.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import ONE, batch_for, build, step_of
from measuring import Step, add_sizes, finish, in_turn, long_tail, made_up_batch, new_parser, ratio, table
from memory import STEPS, in_fresh_process, resident

from ecl_hf.methods import METHODS
from ecl_hf.methods.base import Time

LATE = Time(9, 10)
COMPARED = ["paco", "bcl", "m2m"]


def late_step(
    method: str, architecture: str, image_size: int, batch_size: int, num_classes: int, device: torch.device
) -> Step:
    """A step of a method's first stage in the last tenth of its epochs."""
    task, _ = build(method, architecture, image_size, 1, long_tail(num_classes))
    task = task.to(device, memory_format=torch.channels_last).train()
    task.time = LATE
    batch = made_up_batch(batch_size, image_size, num_classes, device)
    return step_of(task, batch_for(task, batch), LATE)


def peak_of_late_step(*sizes: Any) -> int:
    """Bytes that a few steps need at most, beyond those of the libraries; for a fresh process."""
    *sizes, name = sizes
    device = torch.device(name)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = resident()
    step = late_step(*sizes, device)
    for _ in range(STEPS):
        step()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident(peak=True) - before


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the results."""
    parser = new_parser("methods.py", __doc__)
    add_sizes(parser, rounds=11)
    parser.add_argument("--methods", type=list[str], default=COMPARED, help=f"To compare with {ONE}")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"methods: {', '.join(unknown)} are unknown")
    device, names = torch.device(args.device), list(dict.fromkeys([ONE, *args.methods]))
    sizes = (args.architecture, args.image_size, args.batch_size, args.num_classes)
    peaks = {name: in_fresh_process(peak_of_late_step, name, *sizes, args.device) for name in names}
    torch.manual_seed(0)
    seconds = in_turn({name: late_step(name, *sizes, device) for name in names}, device, args.rounds, args.warmup)

    rows = []
    for name in names:
        memory = f"{peaks[name] / 2**20:.0f} ({peaks[name] / peaks[ONE]:.2f})"
        time = f"{1e3 * statistics.median(seconds[name]):.0f} ({ratio(seconds[name], seconds[ONE]):.2f})"
        rows.append((name, memory, time))
    text = table(f"method | peak memory, MiB (times {ONE}'s) | step, ms (times {ONE}'s)", rows)
    setting = {name: getattr(args, name) for name in ("architecture", "image_size", "batch_size", "num_classes")}
    results = {**setting, "rounds": args.rounds, "peak_bytes": peaks, "seconds": seconds}
    return finish(f"methods_{args.architecture}_{args.image_size}px", text, results, device, args.results_dir)


if __name__ == "__main__":
    main()
