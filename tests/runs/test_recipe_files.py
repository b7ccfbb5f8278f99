"""Recipes by name: from any folder, and with flags that override them."""

import shutil

import pytest
import train
from jsonargparse import ArgumentParser

from ecl_hf.runs.recipe import Recipe, settings_of
from ecl_hf.runs.recipe_files import RecipeFile, find_recipe, recipe_folder


def parse(*flags):
    parser = ArgumentParser()
    parser.add_argument("--recipe", action=RecipeFile)
    Recipe.add_arguments(parser)
    return Recipe.from_arguments(parser, parser.parse_args(flags))


def test_a_name_stands_for_the_file_in_any_folder(tmp_path, monkeypatch):
    by_path = parse(f"--recipe={recipe_folder() / 'quickstart.yaml'}", "--epochs=3")
    monkeypatch.chdir(tmp_path)
    by_name = parse("--recipe", "quickstart", "--epochs", "3")
    assert by_name == by_path
    assert (by_name.data.source, by_name.epochs) == ("digits", 3)


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    shutil.copyfile(recipe_folder() / "cifar10_lt.yaml", tmp_path / "quickstart")
    monkeypatch.chdir(tmp_path)
    assert parse("--recipe=quickstart").data.source == "uoft-cs/cifar10"


def test_an_unknown_name_is_answered_with_the_known_ones(capsys):
    with pytest.raises(FileNotFoundError, match=r"recipe nope is neither a file nor one of .*cifar100_lt.*quickstart"):
        find_recipe("nope")
    with pytest.raises(SystemExit, match="2"):
        parse("--recipe=nope")
    assert "recipe nope is neither a file nor one of" in capsys.readouterr().err


def test_a_recipe_by_name_with_changes_is_that_of_the_flags(tmp_path):
    flags = ["--recipe=quickstart", "--method=bc_ensemble", "--optim.lr=0.5", f"--data.path={tmp_path}", "--seed=3"]
    changes = {"method": "bc_ensemble", "optim": {"lr": 0.5}, "data": {"path": tmp_path}, "seed": 3}
    by_flags, _ = train.parse([*flags, "--output_dir=x"])
    assert Recipe.named("quickstart", **changes) == by_flags
    assert by_flags.optim.weight_decay == 0.005  # the file's


def test_flags_override_a_recipe_that_comes_after_them(tmp_path):
    flags = ["--method=bc", "--optim.lr=0.5", "--data.path", str(tmp_path), "--output_dir=x"]
    after, _ = train.parse(["--recipe", "quickstart", *flags])
    assert (after.method, after.optim.lr) == ("bc", 0.5)
    assert train.parse([*flags, "--recipe", "quickstart"])[0] == after
    assert train.parse([*flags, "--recipe=quickstart"])[0] == after


def test_a_recipe_for_another_method_leaves_out_what_that_does_not_have():
    assert Recipe.named("cifar100_lt_printed", method="ce").loss == settings_of("ce")()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epoch": 3}, "epoch"),
        ({"optim": {"rate": 3}}, "rate"),
        ({"epochs": "many"}, "epochs"),
        ({"optim": {"lr": -1}}, "optim.lr"),
        ({"method": "elc"}, "elc.*ecl"),
        ({"method": "ce", "loss": {"alpha_logit": 1.0}}, "alpha_logit is no setting of ce"),
        ({"data": {"path": object()}}, "object"),
    ],
)
def test_a_change_that_does_not_fit_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        Recipe.named("quickstart", **changes)


def test_a_mistake_in_a_recipe_names_its_key(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("epoch: 3\n")
    with pytest.raises(SystemExit, match="2"):
        parse(f"--recipe={tmp_path / 'mine.yaml'}")
    assert "epoch" in capsys.readouterr().err
