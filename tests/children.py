"""Trainings in processes of their own, which a test may kill, fill the disk of, or connect with each other.

They are forked from one process that has loaded the training script already, so that each takes a second and not ten.
"""

import importlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = 240

os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "training"), os.environ.get("PYTHONPATH", "")])
context = multiprocessing.get_context("forkserver")
AT_ITS_FIRST_USE = ["sklearn.datasets", "tensorboard", "torchmetrics", "matplotlib.pyplot", "docstring_parser"]
context.set_forkserver_preload(["tests.children", "tests.faults", "train", *AT_ITS_FIRST_USE])

TINY = [
    "--data.source=digits",
    "--data.max_count=20",
    "--data.imbalance_factor=5",
    "--data.horizontal_flip=false",
    "--model.architecture=resnet20_cifar",
    "--model.num_experts=2",
    "--model.image_size=8",
    "--batch_size=16",
    "--epochs=2",
    "--loss.queue_size=40",
    "--train.checkpoint_every=1",
]
"""A run of two epochs of 6 steps each, with a checkpoint after each epoch."""


def run(
    script: str,
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    fault: Callable[[], None] | None,
) -> None:
    """What a child does: its output goes to a file, its exit code is that of the script."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as it is outside of tests
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    torch.set_num_threads(1)
    if fault:
        fault()
    importlib.import_module(script).main(flags)


@dataclass
class Child:
    """A started training."""

    process: multiprocessing.Process
    log: Path

    def wait(self) -> int:
        """Its exit code, negative for a signal; one that hangs is killed and fails the test."""
        self.process.join(SLOW)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running: {self.said}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        """Its output."""
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        """Its lines that begin with error:."""
        return [line for line in self.said.replace("\r", "\n").splitlines() if line.startswith("error:")]


def start(
    folder: Path,
    *flags: str,
    fault: Callable[[], None] | None = None,
    log: Path | None = None,
    tiny: Sequence[str] = TINY,
    **environment: str,
) -> Child:
    """Begin a training in a process of its own; `tiny` are the flags before the others."""
    log = log or folder.with_name(f"{folder.name}_{environment.get('RANK', 0)}.log")
    return begin("train", [*tiny, f"--output_dir={folder}", *flags], log, environment, fault)


def begin(
    script: str,
    flags: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    fault: Callable[[], None] | None = None,
) -> Child:
    """Begin `main` of a module in a process of its own."""
    process = context.Process(target=run, args=(script, flags, log, environment, fault))
    process.start()
    return Child(process, log)


def start_connected(
    processes: int,
    folder: Path,
    *flags: str,
    faults: Mapping[int, Callable[[], None]] | None = None,
    tiny: Sequence[str] = TINY,
) -> list[Child]:
    """Begin processes that train together; `faults` by their ranks."""
    return [
        start(folder, *flags, fault=(faults or {}).get(rank), tiny=tiny, **environment)
        for rank, environment in enumerate(connections(processes))
    ]


def connections(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
