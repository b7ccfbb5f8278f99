"""No network, no progress bars, no GPU, one thread, and the same random numbers in every run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime's
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
# Runs that are compared bit for bit need CPUs, as do two processes; tests of GPUs need CUDA_VISIBLE_DEVICES=0
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # huggingface_hub and transformers
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch

import ecl_hf
from tests.hub_clients import connected
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]
ecl_hf.__path__.append(str(ROOT))  # ecl_hf.training and ecl_hf.hub_cards: this checkout's, wherever an editable one is
torch.set_num_threads(1)
PUBLISHED_VALUES = Path(__file__).with_name("published_values")


def pytest_addoption(parser):
    parser.addoption(
        "--published_values",
        type=Path,
        default=PUBLISHED_VALUES,
        metavar="DIR",
        help="folder with values of the methods' published code, see tests/published_values/README.md",
    )


@pytest.fixture
def published(pytestconfig):
    """Values of published code: `published("experts/ride")` is a dict of NumPy arrays."""
    folder = pytestconfig.getoption("published_values")

    def read(name):
        with np.load(folder / f"{name}.npz") as values:
            return dict(values)

    return read


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path):
    """A Hub on this machine, with every client library of this process pointed at it and its caches empty."""
    with HubServer(tmp_path / "hub") as server, connected(server):
        yield server
    assert server.problems == []
