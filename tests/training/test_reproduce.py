"""The grid of each table, its runs, and what is rendered of them."""

import csv
import json
import re
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import reproduce
from accelerate.state import AcceleratorState, PartialState
from jsonargparse import ArgumentParser
from train import main as train

from ecl_hf.evidence import tables
from ecl_hf.methods import METHODS
from ecl_hf.runs.checkpoints import seal
from ecl_hf.runs.folder import RunFolder
from ecl_hf.runs.interruption import STOPPED
from ecl_hf.runs.recipe import Recipe
from tests.children import begin

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--data.source digits --data.max_count 20 --data.imbalance_factor 5 --data.horizontal_flip false "
    "--model.architecture resnet20_cifar --model.image_size 8 --batch_size 16 --epochs 1"
)


def read(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def made_up(seed=0, top1=0.5, experts=(0.4, 0.3), few=None, **recipe):
    """A `results.json` with these scores, everywhere the same apart from the flip, which is worth 0.01."""

    def score(value):
        return {"top1": value, "many": value, "medium": value, "few": few, "ece": 0.1}

    def test(gain):
        scores = [score(value + gain) for value in experts]
        return {
            "ensemble": score(top1 + gain),
            "experts": scores,
            "expert_mean": score(statistics.mean(experts) + gain),
        }

    settings = {"method": "ecl", "seed": seed, "epochs": 4, "batch_size": 10, "model": {"num_experts": len(experts)}}
    return {
        **{"method": "ecl", "seed": seed, "finished": True, "steps": 8, "training_seconds": 7200.0},
        **{"test": {"plain": test(0.0), "flip": test(0.01)}, "test_images": 100, "class_counts": [18, 2]},
        **{"shot_groups": {"many": 0, "medium": 0, "few": 2}, "commit": "abc", "parameters": 2e6, "macs": 4e6},
        **{"parameters_per_expert": 1e6, "macs_per_expert": 2e6},
        "machine": {"platform": "here", "device": "cpu", "threads_per_process": 1},
        "versions": {"torch": "1", "timm": "2", "transformers": "3"},
        "recipe": settings | recipe,
    }


def place(folder, cell, result):
    """Put a result where another machine's would lie."""
    file = folder / cell / f"seed{result['seed']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))


@pytest.fixture
def tiny(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("epochs: 4\nbatch_size: 10\n")
    return ["--recipes", str(recipe), f"--runs_dir={tmp_path / 'runs'}", f"--results_dir={tmp_path}"]


def test_published_numbers_are_those_of_the_paper():
    """Spot checks against what the specification and the recipes say of the tables."""
    one, three = reproduce.PUBLISHED["table1"], reproduce.PUBLISHED["table3"]
    assert list(one["cifar100_lt"]["ecl"].items()) == [(10, 67.3), (50, 59.9), (100, 56.3), (200, 51.4)]
    assert list(one["cifar10_lt"]["ecl"].values()) == [91.8, 88.9, 86.5, 83.6]
    assert list(three["cifar100_lt"].values()) == [52.2, 53.7, 54.7, 54.2, 54.9, 55.8, 56.3]
    assert three["cifar100_lt"]["ecl"] == one["cifar100_lt"]["ecl"][100]
    assert three["imagenet_lt_resnet50"]["ecl"] == reproduce.PUBLISHED["table2"]["imagenet_lt_resnet50"]["ecl"] == 60.6
    assert one["cifar100_lt"]["ncl"][100] == pytest.approx(one["cifar100_lt"]["ecl"][100] - 2.1)  # Sec. VI-E


@pytest.mark.parametrize("target", [target for target in reproduce.NOTES if target != "methods"])
def test_every_cell_is_a_valid_recipe_with_a_name_of_its_own(target):
    recipe = Recipe()
    rows = reproduce.plan(target, recipe, "sum")
    cells = {cell.name: cell for cell, _ in rows}
    assert len({tuple(cell.flags) for cell in cells.values()}) == len(cells)
    for cell in cells.values():
        assert cell.method in METHODS
        parser = ArgumentParser(exit_on_error=False)
        Recipe.add_arguments(parser, cell.method)
        Recipe.from_arguments(parser, parser.parse_args(cell.flags))


def test_cells_of_the_recipe_itself_are_shared_by_all_tables():
    names = {target: {cell.name for cell, _ in reproduce.plan(target, Recipe(), "mean")} for target in reproduce.NOTES}
    for target in ("table1", "table2", "table3", "table4", "fig4", "fig5", "comparison"):
        assert "ecl-mean" in names[target]
    assert {"ecl-mean-gamma50", "ce-gamma10"} < names["table1"]
    assert {"ecl-mean-k1", "ecl-mean-k5"} < names["fig4"]
    assert {"ecl-mean-alpha0.2", "ecl-mean-beta0.5"} < names["fig5"]
    assert {"kd-mean", "reference_only-mean", "ecl_shuffled-mean"} < names["table3"]
    alpha = next(cell for cell, _ in reproduce.plan("fig5", Recipe(), "mean") if cell.name.endswith("alpha0.2"))
    assert {"--loss.alpha_logit=0.2", "--loss.alpha_feature=0.2"} < set(alpha.flags)


def test_table_beside_the_published_numbers(tmp_path):
    recipe = tmp_path / "cifar100_lt.yaml"
    recipe.write_text("epochs: 4\n")
    folder = tmp_path / "results" / "cifar100_lt"
    for seed, base, ours in ((0, 0.50, 0.53), (1, 0.52, 0.56)):
        place(folder, "bc_ensemble-mean", made_up(seed, base, (0.3, 0.4)))
        place(folder, "ecl-mean", made_up(seed, ours, (0.4, 0.5)))
    flags = [
        "--recipes",
        str(recipe),
        f"--runs_dir={tmp_path}",
        f"--results_dir={tmp_path / 'results'}",
    ]
    (page,) = reproduce.main(["table3", *flags, "--render_only=true", "--seeds", "0", "1"])
    rows = {row["method"]: row for row in read(page.with_suffix(".csv"))}
    assert rows["ecl"]["top1"] == "55.5 ± 2.1"
    assert (rows["ecl"]["published"], rows["ecl"]["difference"]) == ("56.3", "-0.8")
    assert rows["ecl"]["gain"] == "+3.5 ± 0.7"  # +3 and +4 points for the same seeds
    assert rows["ecl"]["no flip"] == "54.5 ± 2.1"
    assert (rows["ecl"]["mean expert"], rows["ecl"]["best expert"]) == ("46.0 ± 0.0", "51.0 ± 0.0")
    assert rows["ecl"]["few"] == "none"
    assert (rows["bc_ensemble"]["published"], rows["bc_ensemble"]["gain"]) == ("52.2", "")
    assert (rows["bkt"]["top1"], rows["bkt"]["published"], rows["bkt"]["seeds"]) == ("not run", "53.7", "0")
    assert rows["kd"]["published"] == "not in the paper"
    assert "Not run: bkt-mean seed 0, " in page.read_text()
    (small,) = reproduce.main(["table3", *flags, "--render_only=true", "--seeds", "0", "1", "--scale=small"])
    assert read(small.with_suffix(".csv"))[-1]["published"] == "not published at this scale"


def test_figure_over_experts_has_numbers_of_its_own(tmp_path, tiny):
    place(tmp_path / "tiny", "ecl-mean", made_up(0, 0.5, few=0.2))
    place(tmp_path / "tiny", "ecl-mean", made_up(1, 0.52, few=0.4))
    (page,) = reproduce.main(["fig4", *tiny, "--render_only=true", "--seeds", "0", "1"])
    row = next(row for row in read(page.with_suffix(".csv")) if row["experts"] == "3" and row["model"] == "ensemble")
    assert [row[key] for key in ("top1", "top1_std", "few", "few_std")] == ["51.00", "1.41", "30.00", "14.14"]
    assert [row["top1"] for row in read(page.with_suffix(".csv")) if row["experts"] == "1"] == ["", ""]


def test_dry_run_tells_the_cost_from_the_step_time(tmp_path, tiny, capsys):
    """8 steps took two hours; four epochs of 20 images in batches of 10 are 8 steps."""
    place(tmp_path / "tiny", "ecl-mean", made_up(0, experts=(0.4, 0.4, 0.4)))
    reproduce.main(["fig4", *tiny, "--dry_run=true", "--seeds", "0", "1"])
    *runs, left = capsys.readouterr().out.splitlines()
    told = dict(line.split(": ") for line in runs)
    assert left == "9 runs left, hours: 18.00"  # those of other numbers of experts, too, are taken for two hours
    assert told["tiny ecl-mean seed 0"] == "finished"
    assert told["tiny ecl-mean seed 1"] == "2.00 h"
    assert told["tiny ecl-mean-k5 seed 0"] == "unknown"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("target", reproduce.NOTES)
def test_tables_of_a_recipe_that_is_not_ecl_s(target, tmp_path, capsys):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("method: bc\nmodel: {num_experts: 3, pretrained: true, tune: head}\nepochs: 9\n")
    flags = ["--recipes", str(recipe), f"--runs_dir={tmp_path}", f"--results_dir={tmp_path}", "--seeds", "0"]
    reproduce.main([target, *flags, "--dry_run"])
    *lines, left = capsys.readouterr().out.splitlines()
    refused = {line.split()[1].rstrip(":"): line for line in lines if ": left out: " in line}
    assert left == f"{len(lines) - len(refused)} runs left, hours: unknown"
    assert len(lines) > len(refused)
    if target == "shared_stages":
        assert [name for name in refused if "share1" in name] == ["bc_ensemble-mean-share1", "ecl-mean-share1"]
        assert all("experts share the whole encoder" in line for line in refused.values())
    if target == "table1":
        assert refused.keys() == {"ce-gamma10", "ce-gamma50", "ce", "ce-gamma200"}
        assert all("this method trains 1 expert, but the model has 3" in line for line in refused.values())
    if target == "fig5":
        assert any(line.startswith("own ecl-mean-alpha0.2 seed 0") for line in lines)


def test_shards_part_the_runs(tiny, capsys):
    parts = []
    for index in (1, 2, 3):
        reproduce.main(["fig5", *tiny, "--dry_run=true", "--seeds", "0", "1", f"--shard={index}/3"])
        parts.append(set(capsys.readouterr().out.splitlines()[:-1]))
    reproduce.main(["fig5", *tiny, "--dry_run=true", "--seeds", "0", "1"])
    *whole, left = capsys.readouterr().out.splitlines()
    assert left == "20 runs left, hours: unknown"
    assert len(whole) == 20  # the recipe's own cell is in both sweeps, and run once
    assert set().union(*parts) == set(whole)
    assert sum(map(len, parts)) == len(whole)


def test_dry_run_copies_no_result(tmp_path, tiny, capsys):
    run = RunFolder(tmp_path / "runs" / "tiny" / "ecl-mean" / "seed0")
    run.model.mkdir(parents=True)
    (run.model / "config.json").write_text("{}")
    seal(run.model)
    run.results_file.write_text(json.dumps(made_up(0, experts=(0.4, 0.4, 0.4)) | {"finished": True}))
    assert run.finished
    reproduce.main(["fig4", *tiny, "--dry_run", "--seeds", "0"])
    assert "tiny ecl-mean seed 0: finished" in capsys.readouterr().out
    assert not list(tmp_path.rglob("seed0.json"))


def test_damaged_result_is_named(tmp_path, tiny):
    place(tmp_path / "tiny", "ecl-mean", made_up(0, experts=(0.4, 0.4, 0.4)))
    (file,) = tmp_path.rglob("seed0.json")
    file.write_text(file.read_text()[:50])
    for switch in ("--dry_run", "--render_only"):
        with pytest.raises(SystemExit, match=f"{re.escape(str(file))} is damaged"):
            reproduce.main(["fig4", *tiny, switch, "--seeds", "0"])


@pytest.mark.parametrize("text", ["7", "[]", "null", '{"test": {}}', "{}", "[" * 100_000])
def test_result_that_is_none_is_named(text, tmp_path, tiny):
    place(tmp_path / "tiny", "ecl-mean", made_up(0, experts=(0.4, 0.4, 0.4)))
    (file,) = tmp_path.rglob("seed0.json")
    file.write_text(text)
    with pytest.raises(SystemExit, match=f"^error: {re.escape(str(file))} "):
        reproduce.main(["fig4", *tiny, "--render_only", "--seeds", "0"])


def started_here(monkeypatch, train):
    """Have reproduce.py call a function of train.py's flags, which returns the exit code; returns the commands."""
    commands = []

    def start(command, **_):
        commands.append(command)
        code = train(command[2:])
        return SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(Popen=start, STDOUT=None))
    monkeypatch.setattr(reproduce, "POLL", 0)
    return commands


def test_flags_may_hold_a_path_with_a_blank(tiny, monkeypatch):
    commands = started_here(monkeypatch, lambda _: 1)
    with pytest.raises(SystemExit, match="these runs failed"):
        reproduce.main(["table4", *tiny, "--cells", "ecl-mean", "--seeds", "0", "--flags=--data.path 'my data'"])
    assert commands[0][-2:] == ["--data.path", "my data"]


@pytest.mark.parametrize(
    "flags", [["--shard=3/2"], ["--shard=x"], ["--data_paths.other=x"], ["--scale=huge"], ["--cells=nope"]]
)
def test_wrong_flags_end_before_anything_runs(tiny, flags, tmp_path):
    with pytest.raises(SystemExit):
        reproduce.main(["fig4", *tiny, *flags])
    assert not (tmp_path / "runs").exists()


def train_here(flags):
    """train.py without the seconds that a new process takes."""
    train(flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return 0


@pytest.mark.slow
def test_comparison_runs_skips_and_renders(tmp_path, capfd, monkeypatch):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("epochs: 1\n")
    argv = ["--recipes", str(recipe), f"--runs_dir={tmp_path / 'runs'}"]
    argv = ["comparison", *argv, f"--results_dir={tmp_path / 'results'}", "--cells", "bc", "ecl-sum"]
    failing = ["--flags=--data.source digits --data.max_count 9999"]
    with pytest.raises(SystemExit, match=r"these runs failed.*bc seed 0"):
        reproduce.main([*argv, "--seeds", "0", "--cells", "bc", *failing])
    assert "lower data.max_count" in capfd.readouterr().err
    started_here(monkeypatch, train_here)
    argv.append(f"--flags={FLAGS}")
    (table,) = reproduce.main([*argv, "--seeds", "0", "1"])
    results = [json.loads((tmp_path / "results/tiny/bc" / f"seed{s}.json").read_text()) for s in (0, 1)]
    assert [result["seed"] for result in results] == [0, 1]
    assert results[0]["recipe"]["method"] == "bc"
    scores = [100 * result["test"]["plain"]["ensemble"]["top1"] for result in results]
    expected = f"{statistics.mean(scores):.1f} ± {abs(scores[0] - scores[1]) / 2**0.5:.1f}"
    rows = read(tmp_path / "results/tiny/table.csv")
    assert rows[0]["top1"] == expected
    assert rows[0]["many"] == "none"
    assert [(row["method"], row["model"]) for row in rows if row["flip"] == "no"] == [
        ("bc", "single network"),
        ("ecl-sum", "ensemble"),
        ("ecl-sum", "one expert (mean)"),
    ]
    assert expected in table.read_text()
    assert "Not run: nothing." in table.read_text()

    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("model/*"))]
    reproduce.main([*argv, "--seeds", "0", "1"])  # everything is finished
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("model/*"))]
    reproduce.main([*argv, "--seeds", "0", "2", "--render_only=true"])
    assert "Not run: bc seed 2, ecl-sum seed 2." in table.read_text()
    # The copies of the results are enough
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    reproduce.main([*argv, "--seeds", "0", "1"])
    assert expected in table.read_text()

    changed = tmp_path / "results/tiny/bc/seed0.json"
    changed.write_text(json.dumps(results[0] | {"recipe": results[0]["recipe"] | {"epochs": 7}}))
    with pytest.raises(SystemExit, match=r"different recipes.*epochs"):
        reproduce.main([*argv, "--seeds", "0", "1", "--render_only=true"])


def order_of(commands):
    """Method and teacher's folder of each started training."""
    found = [dict(str(flag).lstrip("-").split("=", 1) for flag in command if "=" in str(flag)) for command in commands]
    return [(flags["method"], flags.get("model.teacher")) for flags in found]


def test_teachers_are_trained_before_their_students(tmp_path, tiny, capsys, monkeypatch):
    argv = ["methods", *tiny, "--seeds", "0", "--cells", "dive", "bc"]
    flags = f"--flags={FLAGS} --batch_size 64"
    reproduce.main([*argv, flags, "--dry_run"])
    assert capsys.readouterr().out.splitlines() == [
        "tiny bc seed 0: unknown",
        "tiny dive seed 0: unknown, after tiny bc seed 0",
        "2 runs left, hours: unknown",
    ]
    commands = started_here(monkeypatch, train_here)
    (page,) = reproduce.main([*argv, flags])
    teacher = str(tmp_path / "runs/tiny/bc/seed0")
    assert order_of(commands) == [("bc", None), ("dive", teacher)]
    rows = {row["method"]: row for row in read(page.with_suffix(".csv"))}
    assert {name: row["teacher"] for name, row in rows.items()} == {"dive": "bc", "bc": ""}
    assert all(float(row["peak memory, MiB"]) > 50 for row in rows.values())
    reproduce.main([*argv, flags])
    assert len(commands) == 2  # both are finished
    # A student's results without its run, and a teacher's: what is trained again needs the teacher's model
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "tiny/dive/seed0.json").unlink()
    reproduce.main([*argv[:-1], flags, "--dry_run"])
    assert capsys.readouterr().out.splitlines()[-3:-1] == [
        "tiny bc seed 0: 0.00 h, again, for the model that its students need",
        "tiny dive seed 0: unknown, after tiny bc seed 0",
    ]


def test_students_of_a_failed_teacher_are_left_out(tiny, capsys, monkeypatch):
    commands = started_here(monkeypatch, lambda _: 1)
    argv = ["methods", *tiny, "--seeds", "0", "1", "--cells", "cbd_ens", "ce", "m2m"]
    with pytest.raises(SystemExit, match=r"runs failed.*cbd_ens seed 1"):
        reproduce.main(argv)
    assert [name for name, _ in order_of(commands)] == ["cbd_teachers", "ce"] * 2
    assert "tiny m2m seed 0: left out, since its teacher failed" in capsys.readouterr().out


def test_so_many_runs_at_once(tmp_path, tiny, monkeypatch):
    """Each has one thread and a log; a student waits for its teacher and for nobody else."""
    going, most, order = [], [], []

    class Child:
        def __init__(self, command, env, stdout, **_):
            assert env["OMP_NUM_THREADS"] == "1"
            assert stdout.name.endswith("seed0.log")
            [(self.method, _)] = order_of([command])
            order.append(self.method)
            going.append(self.method)
            most.append(len(going))
            self.looks, self.returncode = 3 if self.method == "bc" else 1, 0

        def poll(self):
            self.looks -= 1
            if self.looks > 0:
                return None
            going.remove(self.method)
            assert "bc" not in going or "dive" not in going
            return 0

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(Popen=Child, STDOUT=None))
    monkeypatch.setattr(reproduce, "POLL", 0)
    argv = ["methods", *tiny, "--seeds", "0", "--parallel=2", "--cells", "dive", "ce", "focal", "ldam"]
    with pytest.raises(SystemExit, match="no finished run"):  # the children do nothing
        reproduce.main(argv)
    assert order == ["bc", "ce", "focal", "ldam", "dive"]
    assert max(most) == 2


def test_kept_features_are_computed_once_for_all_cells(tmp_path, tiny, monkeypatch):
    """The second run waits until the first one has them, and the others get them."""
    (tmp_path / "tiny.yaml").write_text("method: bc\nmodel: {tune: head, pretrained: true, num_experts: 1}\n")
    order, had = [], {}

    class Child:
        def __init__(self, command, **_):
            [(self.method, _)] = order_of([command])
            self.folder = Path(command[command.index("--output_dir") + 1])
            order.append(self.method)
            had[self.method] = (self.folder / "features.safetensors").exists()
            self.looks, self.returncode = 4, 0

        def poll(self):
            self.looks -= 1
            if self.looks == 2 and not had[self.method]:
                assert order == [self.method]  # nobody else has begun
                self.folder.mkdir(parents=True)
                (self.folder / "features.safetensors").write_text(self.method)
            return None if self.looks else 0

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(Popen=Child, STDOUT=None))
    monkeypatch.setattr(reproduce, "POLL", 0)
    argv = ["methods", *tiny, "--seeds", "0", "--parallel=3", "--cells"]
    with pytest.raises(SystemExit, match="no finished run"):  # the children do nothing
        reproduce.main([*argv, "ce", "crt", "ncm"])
    first = order[0]
    assert had == {name: name != first for name in ("ce", "crt", "ncm")}
    with pytest.raises(SystemExit, match="no finished run"):
        reproduce.main([*argv, "tde"])  # of other cells than those that kept them
    assert had["tde"]
    kept = list((tmp_path / "runs/tiny").glob("*/seed0/features.safetensors"))
    assert [file.read_text() for file in kept] == [first] * 4
    assert len({file.stat().st_ino for file in kept}) == 1


def test_features_of_other_pictures_are_not_given(tmp_path):
    args, gamma = SimpleNamespace(runs_dir=tmp_path), (("data.imbalance_factor", 50, "gamma50"),)
    first, other, same = (
        reproduce.Run("tiny", reproduce.Cell(method, "mean", changes), 0)
        for method, changes in (("ce", gamma), ("bc", ()), ("bc", (*gamma, ("model.num_experts", 1, ""))))
    )
    first.folder(args).path.mkdir(parents=True)
    first.folder(args).features_file.write_text("features")
    for run in (other, same):
        reproduce.bring_features(args, run, [first, other, same])
    assert not other.folder(args).path.exists()
    assert same.folder(args).features_file.read_text() == "features"


@pytest.mark.slow
def test_stopped_runs_go_on(tmp_path, tiny, monkeypatch, capfd):
    """SIGTERM reaches the runs that are going on, and the same command takes them up again."""
    flags = f"--flags={FLAGS} --epochs 4000 --train.checkpoint_every 4000"
    argv = ["methods", *tiny, "--seeds", "0", "--parallel=2", "--cells"]
    child = begin("reproduce", [*argv, "ce", "dive", "bc", flags], tmp_path / "said", {"OMP_NUM_THREADS": "1"})
    folders = [tmp_path / "runs/tiny" / name / "seed0" for name in ("ce", "bc")]
    while child.process.is_alive() and not all((folder / "metrics.jsonl").exists() for folder in folders):
        time.sleep(0.1)
    child.process.terminate()
    assert child.wait() == STOPPED, child.said
    assert "the same command goes on" in child.said
    reached = max(int(path.name.split("_")[1]) for folder in folders for path in (folder / "checkpoints").iterdir())
    started_here(monkeypatch, train_here)
    with pytest.raises(SystemExit, match=r"no finished run"):
        reproduce.main([*argv, "ce", "bc", f"{flags} --train.max_steps {reached + 1}"])
    assert capfd.readouterr().out.count("continuing after step") == 2
    for folder in folders:
        assert json.loads((folder / "results.json").read_text())["steps"] == reached + 1


def test_methods_that_do_not_fit_the_recipe_are_left_out_with_the_reason(tmp_path, tiny, capsys):
    (tmp_path / "tiny.yaml").write_text(
        "method: bc\nepochs: 2\nmodel:\n  tune: head\n  pretrained: true\n  num_experts: 1\n"
    )
    reproduce.main(["methods", *tiny, "--seeds", "0", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    refused = {line.split()[1].rstrip(":"): line for line in lines if ": left out: " in line}
    assert {"cmo", "dive", "m2m"} < refused.keys()
    assert refused["dive"].endswith(
        "model.tune head keeps features instead of pictures, but dive shows its pictures to a teacher"
    )
    assert "has 3 stages, but there are 2 epochs" in refused["tsc"]
    runs = {line.split()[1].rstrip(":") for line in lines if " seed 0: " in line}
    assert {"ce", "bc", "ecl-mean", "sade"} < runs  # these with their own number of experts
    assert len(runs) + len(refused) == len(METHODS)


def test_table_of_methods_has_accuracy_beside_cost(tmp_path, tiny):
    pytest.importorskip("matplotlib")
    for name, few, memory in (("ce", 0.0, 3 << 20), ("tde", 0.3, None)):
        for seed, top1 in ((0, 0.4 + few), (1, 0.42 + few)):
            cost = {} if memory is None else {"peak_memory_bytes": memory}
            loss = {"a_setting_of_its_own": name}
            place(tmp_path / "tiny", name, made_up(seed, top1, few=few, method=name, loss=loss) | cost)
    (page,) = reproduce.main(["methods", *tiny, "--render_only", "--seeds", "0", "1"])
    first, second = read(page.with_suffix(".csv"))
    assert [first["method"], second["method"]] == ["tde", "ce"]
    assert first["top1"] == "71.0 ± 1.4"
    assert (first["training, min"], first["parameters"]) == ("120.0 ± 0.0", "2.00 M")
    assert (first["peak memory, MiB"], second["peak memory, MiB"]) == ("not measured", "3")
    text = page.read_text()
    assert "(methods.png)" in text
    assert page.with_suffix(".png").stat().st_size > 1000
    place(tmp_path / "tiny", "tde", made_up(1, method="tde", loss={"alpha": 3.0}))
    with pytest.raises(SystemExit, match=r"different recipes.*loss\.alpha"):
        reproduce.main(["methods", *tiny, "--render_only", "--seeds", "0", "1"])


def test_table_says_which_machine_each_run_had(tmp_path, tiny):
    gpu = {"machine": {"platform": "there", "device": "a GPU", "threads_per_process": 1}}
    for name, top1, machine in (("ce", 0.2, {}), ("bc", 0.3, gpu), ("tde", 0.4, gpu)):
        place(tmp_path / "tiny", name, made_up(0, top1, method=name) | machine)
    flags = [*tiny, "--render_only", "--seeds", "0"]
    (page,) = reproduce.main(["methods", *flags])
    assert [row["device"] for row in read(page.with_suffix(".csv"))] == ["a GPU", "a GPU", "cpu"]
    text = page.read_text()
    assert "Machine of 2 runs: there, a GPU, 1 thread(s) a process; torch 1, timm 2, transformers 3.\n" in text
    assert "Machine of 1 runs: here, cpu, " in text
    (page,) = reproduce.main(["methods", *flags, "--cells", "bc", "tde"])
    assert "\nMachine: there, a GPU, " in page.read_text()
    assert "| device |" not in page.read_text()


def test_table_says_which_epoch_was_tested(tmp_path, tiny):
    place(tmp_path / "tiny", "bc", made_up(0, data={"val_fraction": 0.1}))
    (page,) = reproduce.main(["comparison", *tiny, "--render_only", "--seeds", "0"])
    assert "of the epoch that was the best on validation pictures in %" in page.read_text()


def test_older_results_have_the_default_of_newer_settings():
    old, new = made_up(0), made_up(1, loss={"queue_size": 1024})
    assert tables.differing_settings([old, new]) == set()
    assert tables.differing_settings([old, made_up(1, loss={"queue_size": 7})]) == {"loss.queue_size"}


def test_settings_that_a_method_does_not_have_are_not_compared():
    """Older results of NCL hold all of ECL's."""
    old = made_up(0, method="ncl", loss={"tau": 3.0, "queue_size": 8192})
    new = made_up(1, method="ncl", loss={"queue_size": 8192})
    others = [made_up(0, method="bc_ensemble"), made_up(0, method="ecl", loss={"queue_size": 8192})]
    assert tables.differing_settings([old, new, *others]) == set()
    assert tables.differing_settings([old, made_up(1, method="ncl")]) == {"loss.queue_size"}


@pytest.mark.parametrize(
    ("target", "recipe", "seeds"),
    [
        ("comparison", "cifar10_lt_small_large_decay", "012"),
        ("table3", "cifar10_lt_small_large_decay", "012"),
        ("shared_stages", "cifar10_lt_small_large_decay", "012"),
        ("methods", "cifar10_lt_small", "0"),
    ],
)
def test_committed_tables_are_those_of_the_committed_results(tmp_path, target, recipe, seeds):
    """Rendering again from the files beside them changes nothing."""
    results = ROOT / "training/results" / recipe
    shutil.copytree(results, tmp_path / recipe)
    flags = [f"--recipes={recipe}", "--scale=small", "--render_only=true", f"--runs_dir={tmp_path}"]
    (page,) = reproduce.main([target, *flags, f"--results_dir={tmp_path}", "--seeds", *seeds])
    for suffix in (".md", ".csv"):
        assert page.with_suffix(suffix).read_text() == (results / page.with_suffix(suffix).name).read_text()


def test_output_of_a_training_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "x.log").symlink_to(tmp_path / "precious")
    run = SimpleNamespace(log=lambda _: tmp_path / "x.log", flags=lambda _: [])
    monkeypatch.setattr(reproduce.subprocess, "Popen", lambda *_, stdout, **__: stdout.write(b"said"))
    for _ in range(2):
        reproduce.start(SimpleNamespace(parallel=2), run, {})
    assert (tmp_path / "precious").read_text() == "years of work"
    assert (tmp_path / "x.log").read_text() == "saidsaid"
