"""Training from Python: the same run as that of the script, and errors that a notebook can show."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from train import main

from ecl_hf.runs.recipe import Recipe
from ecl_hf.training import Run, train
from tests.made_up_runs import make_run

CHANGES = {"method": "bc", "epochs": 1, "model": {"image_size": 8}, "train": {"max_steps": 3}}
FLAGS = ["--recipe=quickstart", "--method=bc", "--epochs=1", "--model.image_size=8", "--train.max_steps=3"]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def test_the_run_is_that_of_the_script(tmp_path, capsys):
    script = Run(main([*FLAGS, f"--output_dir={tmp_path / 'script'}"]))
    recipe = Recipe.named("quickstart", **CHANGES)
    before = asdict(recipe)
    run = train(recipe, tmp_path / "python")  # a second one in the same process
    assert asdict(recipe) == before
    said = capsys.readouterr().out
    assert said.count("epoch 1/1") == 2  # no terminal: a line for each epoch
    assert run.results["test"] == script.results["test"] == json.loads((run.path / "results.json").read_text())["test"]
    assert [epoch["loss"] for epoch in run.epochs] == [epoch["loss"] for epoch in script.epochs]
    files = sorted((script.path / "model").glob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(run.path / "model" / file.name), load_file(file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert run.model().config.class_counts == run.results["class_counts"]


def test_a_run_that_can_not_begin_is_an_error_and_silences_nobody(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    with pytest.raises(RuntimeError, match="holds a run already; continue it with --resume") as error:
        train(Recipe.named("quickstart", **CHANGES), tmp_path / "run")
    assert isinstance(error.value.__cause__, FileExistsError)
    assert transformers.utils.logging.get_verbosity() == transformers.logging.WARNING
    transformers.utils.logging.set_verbosity(before)


@pytest.mark.parametrize("end", [None, "\nerror: \x1b[31mno"])
def test_output_that_nobody_takes_ends_no_run_and_commands_reach_no_terminal(end, tmp_path, monkeypatch, capsys):
    """The run itself is a made-up one."""

    def run_recipe(*_):
        sys.stdout.write("\x1b[31mfirst\n" * 9999)
        sys.stderr.write("\x1b[31msecond\n")
        if end:
            sys.exit(end)
        return tmp_path / "run"

    monkeypatch.setattr("ecl_hf.training.script.run_recipe", run_recipe)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        if end:
            with pytest.raises(RuntimeError, match=r"^\ufffd\[31mno$"):
                train(Recipe(), tmp_path / "run")
        else:
            assert train(Recipe(), tmp_path / "run").path == tmp_path / "run"
        monkeypatch.undo()
    assert capsys.readouterr().err == "\N{REPLACEMENT CHARACTER}[31msecond\n"


def test_report_of_a_run_is_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ecl_hf.training.figures.save", lambda *_: "")  # which takes seconds
    run = Run(make_run(tmp_path / "run"))
    page = run.report()
    assert page == run.path / "figures" / "report.html"
    assert "Worst classes" in page.read_text()
    assert str(page) in capsys.readouterr().out


def test_report_of_no_run_is_an_error_of_python(tmp_path):
    with pytest.raises(RuntimeError, match="nowhere is neither a run folder") as error:
        Run(tmp_path / "nowhere").report()
    assert isinstance(error.value.__cause__, FileNotFoundError)


def test_report_evaluates_a_run_that_was_not_evaluated(tmp_path, monkeypatch):
    run = Run(make_run(tmp_path / "run"))
    (run.path / "model").mkdir()
    evaluation, asked = (run.path / "evaluation.json").read_text(), []
    (run.path / "evaluation.json").unlink()

    def evaluate(command):
        asked.append(command[1:])
        (run.path / "evaluation.json").write_text(evaluation)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("ecl_hf.training.figures.subprocess.run", evaluate)
    monkeypatch.setattr("ecl_hf.training.figures.save", lambda *_: "")
    assert run.report().is_file()
    [[script, *flags]] = asked
    assert script.name == "evaluate.py"
    assert f"--run={run.path}" in "=".join(flags)
    assert flags[-1] == "--landscape_images=0"  # hundreds of passes over each


def test_an_interrupted_run_says_so_and_goes_on(tmp_path, monkeypatch):
    recipe = Recipe.named("quickstart", **CHANGES)
    follow = "ecl_hf.learning.task.CollaborativeTask.follow"
    monkeypatch.setattr(follow, lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    assert train(recipe, tmp_path / "run", resume=True).results["steps"] == 3
