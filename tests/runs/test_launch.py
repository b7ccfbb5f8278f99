"""Launching: the files for Accelerate and Slurm, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from ecl_hf.runs.interruption import STOPPED
from ecl_hf.runs.launch import check_launch
from tests.children import TINY

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FILES = ROOT / "training" / "accelerate"
on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes are connected")


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("cpu", "NO", 1, 1),
        ("one_gpu", "NO", 1, 1),
        ("multi_gpu", "MULTI_GPU", -1, 1),
        ("multi_node", "MULTI_GPU", -1, 2),
    ],
)
def test_accelerate_reads_each_file(name, kind, processes, machines):
    config = load_config_from_file(str(FILES / f"{name}.yaml"))  # refuses unknown keys
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.use_cpu == (name == "cpu")
    assert {path.stem for path in FILES.glob("*.yaml")} == {"cpu", "one_gpu", "multi_gpu", "multi_node"}


def launch(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """`accelerate launch` with a tiny run of one step."""
    script = [str(ROOT / "training" / "train.py"), *TINY, "--train.max_steps=1", f"--output_dir={folder}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, *script]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


def test_one_process_on_the_cpu_trains(tmp_path):
    done = launch("--config_file", str(FILES / "cpu.yaml"), folder=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["steps"], results["machine"]["device"], results["machine"]["processes"]) == (1, "cpu", 1)


@on_cpus
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cpu", "--num_processes=2"], "several processes were asked for, but accelerate launch started one"),
        (
            ["--config_file", str(FILES / "multi_gpu.yaml"), "--num_processes=2"],
            "2 processes were launched, but each trains alone",
        ),
    ],
)
def test_launch_that_would_train_alone_is_refused(arguments, message, tmp_path):
    done = launch(*arguments, folder=tmp_path / "run")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["multi_gpu", "multi_node"])
def test_number_of_gpus_must_be_given(name, tmp_path):
    done = launch("--config_file", str(FILES / f"{name}.yaml"), folder=tmp_path / "run")
    assert done.returncode != 0
    assert "--num_processes" in done.stderr


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "host", "ACCELERATE_MIXED_PRECISION": "no"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
    ],
)
def test_launches_that_do_what_was_asked_for(environment, processes):
    check_launch(environment, processes)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "^FSDP shards the weights"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "^DeepSpeed shards the weights"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "^Megatron-LM shards the weights"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "^2 processes were launched"),
    ],
)
def test_launches_that_do_not(environment, message):
    with pytest.raises(ValueError, match=message):
        check_launch(environment, 1)


# Two tasks on this machine; with the file `stop` each gets SIGTERM once the first epoch is logged.
SRUN = """#!{python}
import os, pathlib, signal, subprocess, sys, time
here = pathlib.Path(__file__).parent
common = {{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}}
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | common | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(2)
]
if (here / "stop").exists():
    (here / "stop").unlink()
    while not (here / "run" / "metrics.jsonl").exists() and all(task.poll() is None for task in tasks):
        time.sleep(0.05)
    for task in tasks:
        task.send_signal(signal.SIGTERM)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!{python}
import pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.2")
else:
    (pathlib.Path(__file__).parent / "requeued").write_text(" ".join(sys.argv[1:]))
"""


def test_slurm_job_is_queued_again_and_continues(tmp_path):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [FILES / "slurm.sh", *TINY, "--epochs=6", f"--output_dir={tmp_path / 'run'}"]

    def job() -> subprocess.CompletedProcess:
        environment = os.environ | slurm | {"ACCELERATE_USE_CPU": "true"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    (tmp_path / "stop").touch()
    first = job()
    assert first.returncode == STOPPED, first.stderr
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}"
    (tmp_path / "requeued").unlink()
    second = job()
    assert second.returncode == 0, second.stderr
    assert "continuing after step" in second.stdout + second.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["finished"], results["machine"]["processes"]) == (True, 2)
    assert not (tmp_path / "requeued").exists()
