"""Train a tiny set for many epochs twice: undisturbed, and killed or asked to stop at random moments until it is done.

    python benchmarks/soak.py --results_dir benchmarks/results                # two processes, 200 epochs

Both runs must end with the same weights, bit for bit. Of the undisturbed one, memory and open files of each training
process are taken once a second: they must not grow.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from safetensors.torch import load_file

from ecl_hf.runs.folder import RunFolder, describe_environment, write_atomically

SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
FLAGS = [
    "--method=ecl",
    "--data.source=digits",
    "--data.max_count=20",
    "--data.imbalance_factor=5",
    "--data.horizontal_flip=false",
    "--data.num_workers=1",
    "--model.architecture=resnet20_cifar",
    "--model.num_experts=2",
    "--model.image_size=8",
    "--batch_size=32",
    "--loss.queue_size=40",
    "--train.checkpoint_every=1",
]
KINDS = ("SIGKILL to all", "SIGKILL to one process", "SIGTERM to the launcher")


def launch(folder: Path, processes: int, epochs: int) -> subprocess.Popen:
    """Start or continue a training in a process group of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*torchrun, SCRIPT, *FLAGS, f"--epochs={epochs}", f"--output_dir={folder}", "--resume"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def trainings(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if str(SCRIPT) in Path(f"/proc/{child}/cmdline").read_text()]


def usage(process: int) -> tuple[float, int]:
    """Resident memory in MB and open files of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(list(Path(f"/proc/{process}/fd").iterdir()))


def undisturbed(folder: Path, processes: int, epochs: int) -> dict[str, Any]:
    """Train in one go; memory and files of each process, as medians of the second and of the last quarter."""
    samples: list[list[tuple[float, int]]] = []
    started = time.monotonic()
    launcher = launch(folder, processes, epochs)
    while launcher.poll() is None:
        try:
            # Before the first epoch is logged, and when the last one is, memory is not that of training
            if 1 <= epochs_done(folder) < epochs and len(found := trainings(launcher.pid)) == processes:
                samples.append([usage(process) for process in found])
        except (OSError, IndexError):  # one has just ended
            pass
        time.sleep(1)
    if launcher.returncode:
        raise SystemExit(f"error: the undisturbed run failed, see {folder.with_suffix('.log')}")
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]

    def median(part: list[list[tuple[float, int]]], column: int) -> list[float]:
        return [round(statistics.median(sample[rank][column] for sample in part), 1) for rank in range(processes)]

    return {
        "seconds": round(time.monotonic() - started),
        "samples": len(samples),
        "memory_mb": {"second_quarter": median(early, 0), "last_quarter": median(late, 0)},
        "open_files": {"second_quarter": median(early, 1), "last_quarter": median(late, 1)},
    }


def epochs_done(folder: Path) -> int:
    """Lines in a run's metrics."""
    file = RunFolder(folder).metrics_file
    return len(file.read_text().splitlines()) if file.exists() else 0


def disturb(folder: Path, processes: int, epochs: int, kills: int, seed: int) -> list[dict[str, Any]]:
    """Train until the end; every launch but the last is ended at a random moment of a random part of the run."""
    draw, events = random.Random(seed), []
    while True:
        launcher = launch(folder, processes, epochs)
        if len(events) < kills:
            aim = epochs_done(folder) + draw.randint(0, 2 * epochs // (kills + 1) - 1)
            while launcher.poll() is None and epochs_done(folder) < aim:
                time.sleep(0.05)
            time.sleep(draw.uniform(0, 2))
        kind = KINDS[len(events) % len(KINDS)]
        if len(events) < kills and launcher.poll() is None:
            found = trainings(launcher.pid)
            if kind == "SIGTERM to the launcher":
                os.kill(launcher.pid, signal.SIGTERM)
            elif kind == "SIGKILL to one process" and found:
                os.kill(draw.choice(found), signal.SIGKILL)
            else:
                os.killpg(launcher.pid, signal.SIGKILL)
                for process in found:  # the launcher gave each a session of its own
                    os.kill(process, signal.SIGKILL)
            launcher.wait()
            newest = RunFolder(folder).resumable_checkpoint()
            events.append({"what": kind, "epochs_done": epochs_done(folder), "checkpoint": newest and newest.name})
            continue
        if launcher.wait() != 0:
            raise SystemExit(f"error: the disturbed run failed, see {folder.with_suffix('.log')}")
        return events


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, running statistics, momentum encoders and queues, as one process holds them."""
    return load_file(RunFolder(folder).newest_checkpoint() / "model.safetensors")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run both, compare, and return what goes to the JSON file."""
    parser = ArgumentParser(prog="soak.py", description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=200, help="Epochs of each run")
    parser.add_argument("--processes", type=int, default=2, help="Training processes on this machine's CPU")
    parser.add_argument("--kills", type=int, default=12, help="Times that the disturbed run is ended")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the moments")
    parser.add_argument("--results_dir", type=Path | None, help="Directory for soak.json")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        whole, parts = Path(directory) / "whole", Path(directory) / "parts"
        resources = undisturbed(whole, args.processes, args.epochs)
        events = disturb(parts, args.processes, args.epochs, args.kills, args.seed)
        ours, theirs = final_state(whole), final_state(parts)
        tests = [json.loads(RunFolder(run).results_file.read_text())["test"] for run in (whole, parts)]
    results = {
        "epochs": args.epochs,
        "processes": args.processes,
        "undisturbed": resources,
        "disturbances": events,
        "tensors": len(ours),
        "tensors_that_differ": sum(not torch.equal(ours[name], theirs[name]) for name in ours),
        "test_metrics_equal": tests[0] == tests[1],
        **describe_environment(args.processes, torch.device("cpu")),
    }
    print(json.dumps(results, indent=1))
    if args.results_dir:
        args.results_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(args.results_dir / "soak.json", json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
