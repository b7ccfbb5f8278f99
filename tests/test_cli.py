"""The command `ecl-hf`: which script gets which arguments, and what goes to the launcher."""

import importlib
import sys
from pathlib import Path

import accelerate.commands.launch
import pytest
import torch

import ecl_hf
from ecl_hf import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ecl-hf"])


@pytest.fixture
def launched(monkeypatch):
    """What Accelerate would start."""
    calls = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", calls.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    return calls


def test_every_script_is_a_command():
    assert set(cli.COMMANDS) == {path.stem for path in (ROOT / "training").glob("[!_]*.py")}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_hands_its_arguments_to_the_script(command, monkeypatch, launched):
    seen = []
    monkeypatch.setattr(importlib.import_module(f"ecl_hf.training.{command}"), "main", seen.append)
    cli.main([command, "--output", "x", "--", "--help"])
    assert seen == [["--output", "x", "--", "--help"]]
    assert launched == []


@pytest.mark.parametrize("package", ["sklearn", "matplotlib.figure"])
def test_packages_that_figures_alone_need_are_named(package, monkeypatch):
    monkeypatch.delitem(sys.modules, "ecl_hf.training.figures", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=r"^error: figures need pip install 'ecl-hf\[figures\]'"):
        cli.main(["figures", "--run=x"])


def test_launch_flags_go_to_accelerate_and_the_rest_to_the_script(launched):
    cli.main(
        ["train", "--recipe", "photos", "--num_processes", "4", "--epochs=3", "--mixed_precision=bf16", "--resume"]
    )
    [args] = launched
    assert (args.num_processes, args.mixed_precision, args.num_machines) == (4, "bf16", 1)
    assert Path(args.training_script) == ROOT / "training" / "train.py"
    assert args.training_script_args == ["--recipe", "photos", "--epochs=3", "--resume"]


def test_several_processes_on_cpus_are_connected(launched, monkeypatch):
    cli.main(["evaluate", "--cpu", "--num_processes=2", "--run", "x"])
    assert launched[0].multi_gpu  # Accelerate's name for: by torchrun
    assert not launched[0].cpu
    assert cli.os.environ["ACCELERATE_USE_CPU"] == "true"


def test_one_process_on_the_cpu(launched):
    cli.main(["train", "--cpu", "--seed=1"])
    assert launched[0].cpu
    assert (launched[0].num_processes, launched[0].multi_gpu) == (1, False)


def test_launch_configurations_by_name(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "--config_file=one_gpu"])
    assert Path(launched[0].config_file) == ROOT / "training" / "accelerate" / "one_gpu.yaml"
    (tmp_path / "one_gpu").touch()
    assert cli.find_launch_file("one_gpu") == "one_gpu"
    assert cli.find_launch_file("mine.yaml") == "mine.yaml"


def test_only_what_can_share_work_is_launched(launched, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["predict", "--num_processes=2"])
    assert launched == []
    assert "num_processes" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "said"), [([], "COMMAND"), (["fit"], "'fit' (choose from")])
def test_a_wrong_command_is_answered_with_the_known_ones(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert said in capsys.readouterr().err


def test_help_and_version(capsys):
    for flag, said in (("--help", "--num_processes"), ("--version", f"ecl-hf {ecl_hf.__version__}")):
        with pytest.raises(SystemExit, match="0"):
            cli.main([flag])
        assert said in capsys.readouterr().out
