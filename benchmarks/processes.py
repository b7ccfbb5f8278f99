"""Several processes on one machine: images per second beside one process, and bytes that a step sends.

    python benchmarks/processes.py                       # 2 processes of one thread each

Weak scaling: every process has `batch_size` pictures, as many as the single one. On a CPU each has one thread, and the
processes are connected by gloo; on GPUs one each, and NCCL.
"""

import multiprocessing
import socket
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from measuring import add_sizes, build_task, finish, in_turn, made_up_batch, new_parser, optimiser_step, table
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from ecl_hf.session import keep_own_buffers


def train(rank: int, processes: int, port: int, sizes: dict[str, Any], answers: Any) -> None:
    """What each process does; the first one puts seconds and bytes of its steps into `answers`."""
    torch.set_num_threads(1)
    device = torch.device(sizes["device"], rank) if sizes["device"] == "cuda" else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    torch.manual_seed(0)
    batch = made_up_batch(sizes["batch_size"], sizes["image_size"], sizes["num_classes"], device)
    task = build_task(sizes["architecture"], sizes["num_experts"], sizes["num_classes"], device)
    wrapped, sent = task, {"gradients": 0, "keys": 0, "checks": 0}
    if processes > 1:
        wrapped = DistributedDataParallel(task)
        keep_own_buffers(wrapped)

        def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            sent["gradients"] += bucket.buffer().nbytes
            return allreduce_hook(None, bucket)

        wrapped.register_comm_hook(None, count)

    def gather(keys: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(keys) for _ in range(processes)]
        dist.all_gather(parts, keys.contiguous())
        sent["keys"] += keys.nbytes
        return torch.cat(parts)

    def reduce(flags: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(flags)
        sent["checks"] += flags.nbytes
        return flags

    step = optimiser_step(task, batch, wrapped, gather, reduce)
    for _ in range(sizes["warmup"]):
        step()
    sent.update(dict.fromkeys(sent, 0))
    seconds = in_turn({"step": step}, device, sizes["rounds"], warmup=0)["step"]
    if rank == 0:
        answers.put((seconds, {name: value // sizes["rounds"] for name, value in sent.items()}))
    dist.destroy_process_group()


def measure(processes: int, sizes: dict[str, Any]) -> tuple[list[float], dict[str, int]]:
    """Seconds of each step and bytes of one step that each process hands to the others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "transformers.modeling_utils", "ecl_hf.learning.task"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    children = [context.Process(target=train, args=(r, processes, port, sizes, answers)) for r in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        if child.exitcode:
            raise RuntimeError(f"a process ended with exit code {child.exitcode}")
    return answers.get()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the results."""
    parser = new_parser("processes.py", __doc__)
    add_sizes(parser, rounds=10)
    parser.add_argument("--processes", type=int, default=2, help="To compare with one")
    parser.add_argument("--repeats", type=int, default=3, help="Of one and several, in turn")
    args = parser.parse_args(argv)
    sizes = {k: v for k, v in vars(args).items() if k not in ("results_dir", "processes", "repeats")}
    seconds: dict[int, list[float]] = {1: [], args.processes: []}
    for _ in range(args.repeats):
        for processes, values in seconds.items():
            more, sent = measure(processes, sizes)
            values += more
    speed = {n: n * args.batch_size / statistics.median(values) for n, values in seconds.items()}
    rows = []
    for n, value in speed.items():
        efficiency = f"{100 * value / (n * speed[1]):.0f}"
        rows.append((n, f"{1e3 * n * args.batch_size / value:.0f}", f"{value:.0f}", efficiency))
    text = table("processes | ms | images/s | efficiency, %", rows)
    text += "\n\n" + table("sent in a step | kB", [(name, f"{value / 1e3:.2f}") for name, value in sent.items()])
    results = {**sizes, "seconds": seconds, "bytes_per_step": sent}
    return finish("processes", text, results, torch.device(args.device), args.results_dir)


if __name__ == "__main__":
    main()
