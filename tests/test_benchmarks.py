"""The benchmarks run from end to end on tiny sizes; what they measure is not looked at."""

import json
import math

import architectures
import feeding
import growth
import imports
import inference
import memory
import methods
import processes
import pytest
import torch
import training_step
from measuring import ratio, table

pytestmark = pytest.mark.slow
TINY = [
    "--architecture=resnet20_cifar",
    "--image_size=8",
    "--batch_size=4",
    "--num_experts=2",
    "--num_classes=5",
    "--rounds=1",
    "--warmup=0",
    "--device=cpu",
]


@pytest.fixture(autouse=True)
def children_find_the_benchmarks(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def numbers(tree):
    """All numbers of nested results."""
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(value)
    elif isinstance(tree, int | float):
        yield tree


SCRIPTS = {
    "training_step": (training_step, [*TINY, "--compile=false"]),
    "architectures": (architectures, [*TINY, "--methods=[ride,bbn,balpoe,ncl,mdcs]"]),
    "inference": (inference, [*TINY, "--compile=false", "--images=3"]),
    "memory": (memory, [*TINY, "--experts=[1]"]),
    "methods": (methods, [*TINY, "--methods=[paco,bcl,m2m]"]),
    "growth": (
        growth,
        [*TINY, "--batch_sizes=[2]", "--experts=[1]", "--classes=[7]", "--queues=[9]", "--test_images=[4]"],
    ),
    "feeding": (feeding, [*TINY, "--images=12", "--workers=[1]"]),
    "processes": (processes, [*TINY, "--repeats=1"]),
    "imports": (imports, ["--rounds=1", "--warmup=0"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_prints_and_writes_its_tables(script, tmp_path, capsys):
    module, flags = SCRIPTS[script]
    results = module.main([*flags, f"--results_dir={tmp_path}"])
    printed = capsys.readouterr().out
    [text] = tmp_path.glob("*.md")
    assert text.read_text().startswith(printed.rstrip())
    [data] = tmp_path.glob("*.json")
    assert data.stem == text.stem
    assert data.stem.startswith(script)
    written = json.loads(data.read_text())
    assert written["machine"]["device"] == "cpu"
    assert torch.__version__.startswith(written["versions"]["torch"])
    found = list(numbers(results))
    assert len(found) > 4
    assert all(math.isfinite(number) for number in found)
    for row in printed.splitlines():
        if row.startswith("|"):
            assert row.endswith("|")


def test_ratio_is_taken_within_rounds():
    assert ratio([2.0, 4.0, 60.0], [1.0, 2.0, 20.0]) == 2.0


def test_table_is_markdown():
    assert table("a | b", [(1, "x"), (2, "y")]) == "| a | b |\n|---|---|\n| 1 | x |\n| 2 | y |"
