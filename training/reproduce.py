"""Run the cells of one of the paper's tables or figures as ordinary runs, and render it from their results.

    python training/reproduce.py table3 --scale small --dry_run                 # what would be run, and how long
    python training/reproduce.py table3 --scale small --seeds 0 1 2
    python training/reproduce.py table1 --scale paper --shard 2/4               # the second of four machines
    python training/reproduce.py comparison --scale small --render_only         # this project's own comparison
    python training/reproduce.py methods --scale small --parallel 8             # all methods, eight runs at once

Runs go to `runs/<recipe>/<cell>/seed<n>`; finished ones are skipped and interrupted ones continued. A method that
learns from a finished model waits for the run that makes it, of the same recipe and seed. The results of each run and
the tables, as Markdown and CSV, go to `training/results/<recipe>`; results that lie there already, such as those of
other machines, need no run folder.
"""

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from ecl_hf.data.longtail import exponential_counts
from ecl_hf.evidence import tables
from ecl_hf.files import read_text, replacing
from ecl_hf.flags import FlagParser
from ecl_hf.learning.stages import check_stages
from ecl_hf.learning.tuning import check_kept_features
from ecl_hf.methods import METHODS
from ecl_hf.publishing.words import tested_epoch
from ecl_hf.runs.folder import RunFolder, read_results, write_atomically
from ecl_hf.runs.interruption import STOPPED, StopRequest
from ecl_hf.runs.recipe import Recipe, prepare_flags
from ecl_hf.runs.recipe_files import RecipeFile, find_recipe
from ecl_hf.terminal import speaking

TRAIN = Path(__file__).with_name("train.py")
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))

POLL = 0.2
"""Seconds between two looks at the runs that are going on."""

SCALES = {"small": ("cifar10_lt_small",), "medium": ("cifar100_lt_16px",), "paper": ("cifar100_lt", "cifar10_lt")}
LARGE = ("imagenet_lt_resnet50", "imagenet_lt_resnext50", "inaturalist2018")
PAPER_RECIPES = {
    "table1": SCALES["paper"],
    "table2": LARGE,
    "table3": ("cifar100_lt", "imagenet_lt_resnet50"),
    "table4": ("cifar100_lt", "imagenet_lt_resnet50"),
    "fig4": ("cifar100_lt",),
    "fig5": ("cifar100_lt",),
    "comparison": SCALES["paper"],
    "shared_stages": SCALES["paper"],
    "methods": SCALES["paper"],
}
GAMMAS = (10, 50, 100, 200)
EXPERTS = (1, 2, 3, 4, 5)
SHARED = (0, 1, 2)
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BETAS = (0.0, 0.5, 1.0, 1.5, 2.0)
ABLATION = {
    "bc_ensemble": ("-", "-", "-"),
    "bkt": ("yes", "-", "-"),
    "fld": ("-", "yes", "-"),
    "cpt": ("-", "-", "yes"),
    "bkt_cpt": ("yes", "-", "yes"),
    "fld_cpt": ("-", "yes", "yes"),
    "ecl": ("yes", "yes", "yes"),
    # Controls
    "kd": ("unweighted", "-", "-"),
    "reference_only": ("head alone", "-", "-"),
    "ecl_unweighted": ("unweighted", "yes", "yes"),
    "ecl_shuffled": ("shuffled", "yes", "yes"),
    "ecl_inverted": ("inverted", "yes", "yes"),
    "ecl_detached": ("detached", "detached", "yes"),
}
"""Table III from top to bottom and this project's controls: BKT, FLD and CPT of each method."""
NOTES = {
    "table1": "Table I: method and imbalance factor.",
    "table2": "Table II: large-scale data. Published rows of other methods come from their own papers' recipes.",
    "table3": "Table III: ablation, and below `ecl` controls the paper lacks. Gain: over `bc_ensemble`, same seeds.",
    "table4": "Table IV: one expert and the ensemble; the paper prints it as a picture.",
    "fig4": "Fig. 4: number of experts, without flip; the paper gives a picture.",
    "fig5": "Fig. 5: alpha (both distillations) and beta, without flip; the paper gives a picture.",
    "comparison": "",
    "shared_stages": "Experts with and without shared first stages (`model.share_stages`); not in the paper.",
    "methods": "Every method with one recipe, its own settings at their published values and its stages scaled to the "
    "recipe's epochs. Training time and peak memory are those of its own run; a teacher's come on top.",
}


@dataclass(frozen=True)
class Cell:
    """One setting of a table; its name is that of the directory of its runs, and the same in every table.

    Attributes:
        method: a name of METHODS.
        reduction: `loss.sup_reduction`, for methods over several experts that read it.
        changes: further keys of the recipe that differ from the file: key -> value, short name in the directory.
    """

    method: str
    reduction: str
    changes: tuple[tuple[str, Any, str], ...] = ()

    @property
    def reduced(self) -> bool:
        """Whether the reduction says anything: a single network has nothing to reduce."""
        method = METHODS[self.method]
        return "sup_reduction" in {item.name for item in fields(method.settings)} and method.experts.most is None

    @property
    def name(self) -> str:
        """Such as `ecl-sum-gamma50`."""
        parts = [self.method, *([self.reduction] if self.reduced else [])]
        return "-".join([*parts, *(short for _, _, short in self.changes if short)])

    @property
    def flags(self) -> list[str]:
        """Flags of train.py."""
        flags = [f"--loss.sup_reduction={self.reduction}"] if self.reduced else []
        return [f"--method={self.method}", *flags, *(f"--{key}={value}" for key, value, _ in self.changes)]

    @property
    def teacher(self) -> "Cell | None":
        """The cell whose model this one learns from: on the same data, with its own number of experts."""
        name = METHODS[self.method].teacher
        if name is None:
            return None
        changes = tuple(change for change in self.changes if change[0].startswith("data."))
        counted = any(key == "model.num_experts" for key, _, _ in self.changes)
        return Cell(name, self.reduction, (*changes, *(own_experts(name) if counted else ())))


@dataclass(frozen=True)
class Run:
    """One training of a cell.

    Attributes:
        recipe: name of the recipe file.
        cell: what is trained.
        seed: of the run.
    """

    recipe: str
    cell: Cell
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe} {self.cell.name} seed {self.seed}"

    @property
    def teacher(self) -> "Run | None":
        """The run that makes the model which this one learns from."""
        return self.cell.teacher and Run(self.recipe, self.cell.teacher, self.seed)

    @property
    def first(self) -> "Run":
        """The teacher, its teacher's if it has one, or the run itself."""
        return self.teacher.first if self.teacher else self

    @property
    def pictures(self) -> tuple[Any, ...]:
        """The same for all runs of a command that have the same pictures."""
        return self.recipe, *(change for change in self.cell.changes if change[0].startswith("data."))

    def folder(self, args: Namespace) -> RunFolder:
        """Where it is trained."""
        return RunFolder(args.runs_dir / self.recipe / self.cell.name / f"seed{self.seed}")

    def log(self, args: Namespace) -> Path:
        """Where its output goes while others run beside it."""
        return self.folder(args).path.with_suffix(".log")

    def flags(self, args: Namespace) -> list[str]:
        """All flags of train.py."""
        (file,) = (file for file in args.recipes if file.stem == self.recipe)
        flags = ["--recipe", str(file), "--output_dir", str(self.folder(args).path), "--seed", str(self.seed)]
        flags += [f"--data.path={args.data_paths[self.recipe]}"] if self.recipe in args.data_paths else []
        flags += [f"--model.teacher={self.teacher.folder(args).path}"] if self.teacher else []
        return [*flags, "--resume", *self.cell.flags, *shlex.split(args.flags)]


def own_experts(method: str) -> tuple[tuple[str, Any, str], ...]:
    """The change of a recipe that gives a method its own number of experts."""
    return (("model.num_experts", METHODS[method].experts.default, ""),)


def changed(cell: Cell, recipe: Recipe, **settings: Any) -> Cell:
    """The cell with other settings; those that are the recipe's own leave its name as it is."""
    of_ecl = METHODS["ecl"].settings
    loss = recipe.loss if isinstance(recipe.loss, of_ecl) else of_ecl()
    own = {
        "gamma": (recipe.data.imbalance_factor, ("data.imbalance_factor",)),
        "k": (recipe.model.num_experts or METHODS[cell.method].experts.default, ("model.num_experts",)),
        "share": (recipe.model.share_stages or 0, ("model.share_stages",)),
        "alpha": (loss.alpha_logit, ("loss.alpha_logit", "loss.alpha_feature")),
        "beta": (loss.beta, ("loss.beta",)),
    }
    changes = []
    for short, value in settings.items():
        default, keys = own[short]
        if value != default:
            changes += [(key, value, f"{short}{value:g}" if key == keys[0] else "") for key in keys]
    return Cell(cell.method, cell.reduction, (*cell.changes, *changes))


def plan(target: str, recipe: Recipe, reduction: str) -> list[tuple[Cell, dict[str, str]]]:
    """The cells of a table in the order of its rows, with the columns that describe each."""
    if target == "comparison":
        cells = [Cell("ce", "mean"), Cell("bc", "mean"), *(Cell("bc_ensemble", kind) for kind in ("mean", "sum"))]
        cells += [Cell("ncl", "mean"), *(Cell("ecl", kind) for kind in ("mean", "sum"))]
        return [(cell, {}) for cell in cells]
    if target == "shared_stages":
        pairs = product(("bc_ensemble", "ecl"), SHARED)
        return [(changed(Cell(method, reduction), recipe, share=n), {}) for method, n in pairs]
    if target == "table1":
        methods = ("ce", "ncl", "bc_ensemble", "ecl")
        pairs = product(GAMMAS, methods)
        return [
            (changed(Cell(m, reduction), recipe, gamma=g), {"method": m, "imbalance factor": str(g)}) for g, m in pairs
        ]
    if target == "table2":
        return [(Cell(method, reduction), {"method": method}) for method in ("ce", "bc", "ncl", "ecl")]
    if target == "table3":
        parts = ("BKT", "FLD", "CPT")
        return [
            (Cell(method, reduction), {"method": method, **dict(zip(parts, marks, strict=True))})
            for method, marks in ABLATION.items()
        ]
    if target == "table4":
        return [(Cell(method, reduction), {"method": method}) for method in ("ncl", "ecl")]
    if target == "methods":
        given = recipe.model.num_experts is not None
        return [
            (Cell(name, reduction, own_experts(name) if given else ()), {"teacher": method.teacher or ""})
            for name, method in METHODS.items()
        ]
    cell = Cell("ecl", reduction)
    if target == "fig4":
        return [(changed(cell, recipe, k=k), {"experts": str(k)}) for k in EXPERTS]
    sweeps = [("alpha", value) for value in ALPHAS] + [("beta", value) for value in BETAS]
    return [(changed(cell, recipe, **{name: v}), {"swept": name, "value": str(v)}) for name, v in sweeps]


def published_numbers(target: str, recipe_name: str, rows: list[tuple[Cell, dict[str, str]]]) -> dict[str, float]:
    """What the paper prints for the cells, by their names."""
    printed = PUBLISHED.get(target, {}).get(recipe_name, {})
    numbers = {}
    for cell, head in rows:
        value = printed.get(cell.method)
        value = value.get(int(head["imbalance factor"])) if isinstance(value, dict) else value
        if value is not None:
            numbers[cell.name] = value
    return numbers


def results_of(args: Namespace, recipe_name: str, cell: str, seed: int) -> dict[str, Any] | None:
    """A cell's finished results: of its run, which are copied to the results, or of such a copy."""
    run = RunFolder(args.runs_dir / recipe_name / cell / f"seed{seed}")
    copy = args.results_dir / recipe_name / cell / f"seed{seed}.json"
    if run.finished and not args.dry_run:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(copy, read_text(run.results_file))
    file = run.results_file if run.finished else copy
    return results_in(file) if file.exists() else None


def results_in(file: Path) -> dict[str, Any]:
    """Content of a results file; SystemExit names one that is damaged or lacks what the tables say."""
    try:
        return read_results(file, tables.ENTRIES)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def read_recipe(file: Path, flags: str = "") -> Recipe:
    """A recipe with some flags of train.py; SystemExit names what is wrong with it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", action=RecipeFile)
    try:
        words, method, _ = prepare_flags(["--recipe", str(file), *shlex.split(flags)])
        Recipe.add_arguments(parser, method)
        return Recipe.from_arguments(parser, parser.parse_args(words))
    except (ArgumentError, OSError, ValueError) as error:
        sys.exit(f"error: recipe {file}: {error}")


def refusal(cell: Cell, recipe: Recipe) -> str | None:
    """Why train.py would refuse a cell with a recipe, as far as that can be known without data; None if not."""
    name, method, streaming = cell.method, METHODS[cell.method], recipe.data.streaming
    pieces = recipe.train.gradient_accumulation_steps
    changes: dict[str, dict[str, Any]] = {"data": {}, "model": {}, "loss": {}}
    for key, value, _ in cell.changes:
        section, _, short = key.partition(".")
        changes[section][short] = value
    try:
        data, model = (replace(getattr(recipe, section), **changes[section]) for section in ("data", "model"))
        replace(recipe, method=name, data=data, model=model, loss=method.settings(**changes["loss"]))
        method.num_experts(model.num_experts)
        method.stage_epochs(recipe.epochs)
        check_stages(method, streaming=streaming, pieces=pieces, teacher=method.teacher, name=name)
        if recipe.model.tune == "head":
            check_kept_features(method, name, pretrained=recipe.model.pretrained, streaming=streaming)
    except ValueError as error:
        return str(error)
    return None


def results_so_far(args: Namespace, recipe_name: str) -> list[dict[str, Any]]:
    """Results of finished runs with a recipe."""
    files = [
        *(args.results_dir / recipe_name).glob("*/seed*.json"),
        *(args.runs_dir / recipe_name).glob("*/seed*/results.json"),
    ]
    return [result for file in files if (result := results_in(file))["finished"]]


def estimate(cell: Cell, so_far: list[dict[str, Any]]) -> float | None:
    """Hours of a run, from the step time of results with the same recipe, method and number of experts."""
    changes = {key: value for key, value, _ in cell.changes}
    experts = METHODS[cell.method].num_experts(changes.get("model.num_experts"))
    hours = []
    for result in so_far:
        recipe = result["recipe"]
        if recipe["method"] != cell.method or len(result["test"]["plain"]["experts"]) != experts:
            continue
        counts = result["class_counts"]
        images = sum(counts)
        if "data.imbalance_factor" in changes:
            images = sum(exponential_counts(len(counts), max(counts), changes["data.imbalance_factor"]))
        steps = recipe["epochs"] * (images // recipe["batch_size"])
        hours.append(result["training_seconds"] / result["steps"] * steps / 3600)
    return statistics.mean(hours) if hours else None


def time_left(args: Namespace, runs: Sequence[Run]) -> str:
    """How many runs are left and how long they take; one without a like takes as long as the others did."""
    so_far = {name: results_so_far(args, name) for name in {run.recipe for run in runs}}
    others = [result["training_seconds"] / 3600 for results in so_far.values() for result in results]
    hours = [estimate(run.cell, so_far[run.recipe]) for run in runs]
    known = [*others, *filter(None, hours)]
    total = sum(statistics.mean(known) if value is None else value for value in hours) if known else None
    about = "unknown" if total is None else f"{total / max(1, min(args.parallel, len(runs))):.2f}"
    return f"{len(runs)} runs left, hours: {about}"


def missing_runs(args: Namespace, runs: Iterable[Run]) -> list[Run]:
    """The runs that have no results yet, each after those teachers of its that have no model yet."""

    def with_teachers(run: Run) -> list[Run]:
        teacher = run.teacher
        return [*(with_teachers(teacher) if teacher and not teacher.folder(args).finished else ()), run]

    absent = [run for run in runs if results_of(args, run.recipe, run.cell.name, run.seed) is None]
    return list(dict.fromkeys(needed for run in absent for needed in with_teachers(run)))


def bring_features(args: Namespace, run: Run, others: Iterable[Run]) -> None:
    """Give a run that begins the features that another one on the same pictures keeps; it sees itself if they fit."""
    folder = run.folder(args)
    kept = (other.folder(args).features_file for other in others if other.pictures == run.pictures)
    if not folder.path.exists() and (file := next(filter(Path.is_file, kept), None)):
        folder.path.mkdir(parents=True)
        try:
            folder.features_file.hardlink_to(file)
        except OSError:  # of a file system without links
            shutil.copyfile(file, folder.features_file)


def carry_out(args: Namespace, runs: Sequence[Run], others: Iterable[Run]) -> list[Run]:
    """Train runs, so many at once and each after its teacher; returns those that failed.

    Of runs that train on kept features, one computes them for all with the same pictures. SIGTERM and Ctrl-C stop all
    runs, each with a checkpoint, and end the program.

    Args:
        args: flags.
        runs: to train.
        others: that may have features of the same pictures.
    """

    def ready(run: Run) -> bool:
        computing = run.recipe in args.keeping and any(
            run.pictures == child.pictures and not child.folder(args).features_file.exists() for child in children
        )
        return not computing and run.teacher not in waiting and run.teacher not in children

    waiting, children, failed, stopping = list(runs), {}, [], False
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.parallel > 1 else {})
    with StopRequest() as stop:
        stop.deferred = True
        while waiting or children:
            if stop.asked and not stopping:
                stopping = True
                waiting.clear()
                for child in children.values():
                    child.terminate()
            for run in [run for run in waiting if run.teacher in failed]:
                print(f"{run}: left out, since its teacher failed", flush=True)
                waiting.remove(run)
                failed.append(run)
            for run in list(waiting):
                if len(children) < args.parallel and ready(run):
                    print(run, flush=True)
                    waiting.remove(run)
                    bring_features(args, run, others)
                    children[run] = start(args, run, environment)
            time.sleep(POLL)
            for run in [run for run, child in children.items() if child.poll() is not None]:
                code = children.pop(run).returncode
                if code:
                    failed.append(run)
                state = f"exit code {code}" if code else "done"
                print(f"{run}: {state}; {time_left(args, [*children, *waiting])}", flush=True)
                if code and args.parallel > 1:
                    said = run.log(args).read_text(encoding="utf-8", errors="replace")
                    print(f"{run.log(args)}: {said.rstrip().rpartition(chr(10))[2]}", flush=True)
    if stopping:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED)
    return failed


def start(args: Namespace, run: Run, environment: dict[str, str]) -> subprocess.Popen:
    """Begin a training; where there are several at once, its output goes to a file beside its folder."""
    command = [sys.executable, TRAIN, *run.flags(args)]
    if args.parallel == 1:
        return subprocess.Popen(command)
    run.log(args).parent.mkdir(parents=True, exist_ok=True)
    if run.log(args).is_symlink():  # it could lead to any file
        run.log(args).unlink()
    with run.log(args).open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def draw(results: dict[str, tables.Results], file: Path) -> bool:
    """Write the picture of few-shot against many-shot accuracy; whether there is something to draw it with."""
    try:
        from ecl_hf.evidence.plots import plot_methods
    except ImportError:
        print(f"no {file.name}: pip install 'ecl-hf[figures]' draws it", file=sys.stderr)
        return False
    points = []
    for name, runs in results.items():
        point = {"method": name}
        for group in ("many", "few"):
            values = tables.group_scores(runs)[group]
            point |= dict(zip((group, f"{group}_std"), tables.mean_and_deviation(values), strict=True))
        points += [point] if None not in (point["many"], point["few"]) else []
    if points:
        with replacing(file) as new:
            plot_methods(points).savefig(new, format="png", dpi=130)
    return bool(points)


def differences(args: Namespace, results: dict[str, tables.Results]) -> list[str]:
    """Recipe keys that differ although the cells of a table must have them in common."""
    found = tables.differing_settings([run for runs in results.values() for run in runs])
    if args.target == "methods":  # whose settings are their own
        within = [tables.differing_settings(runs) for runs in results.values()]
        found = {key for key in found if not key.startswith("loss.")}.union(*within)
    return sorted(found)


def render(
    args: Namespace, recipe_name: str, rows: list[tuple[Cell, dict[str, str]]], refused: dict[Cell, str]
) -> Path | None:
    """Write a table of one recipe from the results there are; returns the Markdown file, None without any result.

    Args:
        args: flags.
        recipe_name: of the recipe file.
        rows: cells with the columns that describe each.
        refused: cells that can't be trained with the recipe, and why.
    """
    found = {cell.name: [results_of(args, recipe_name, cell.name, seed) for seed in args.seeds] for cell, _ in rows}
    missing = [
        f"{name} seed {seed}"
        for place, seed in enumerate(args.seeds)
        for name, runs in found.items()
        if runs[place] is None
    ]
    results = {name: there for name, runs in found.items() if (there := [run for run in runs if run is not None])}
    if not results:
        return None
    every = [run for runs in results.values() for run in runs]
    try:
        differing = differences(args, results)
    except ValueError as error:
        sys.exit(f"error: results of {recipe_name}: {error}")
    if differing:
        sys.exit(f"error: the runs of {recipe_name} have different recipes: {differing}")
    heads = {cell.name: head for cell, head in rows}
    epoch = tested_epoch(every[0])
    lines = [f"Accuracy and calibration error of {epoch} in %, mean ± sample standard deviation over seeds."]
    if args.target in ("comparison", "shared_stages"):
        table = tables.comparison_rows(results)
    elif args.target == "methods":
        table = tables.method_rows(results, heads)
        lines.append("Ensembles without flip.")
    elif args.target in ("fig4", "fig5"):
        swept = [(cell.name, head) for cell, head in rows]  # the recipe's own setting is in both sweeps of Fig. 5
        table = [row for name, head in swept for row in tables.curve_rows(results, {name: head})]
    else:
        published = published_numbers(args.target, recipe_name, rows)
        printed = args.scale == "paper"
        absent = "not in the paper" if printed else "not published at this scale"
        baseline = next((name for name in heads if name.startswith("bc_ensemble")), None)
        baseline = baseline if args.target == "table3" else None
        table = tables.published_rows(results, heads, published, absent, baseline)
        lines.append(
            "Ensembles with flip unless the column says otherwise; the best expert is chosen on the test split."
        )
    lines += ["Written by `training/reproduce.py` from the results beside this file.", ""]
    lines += [NOTES[args.target], ""] if NOTES[args.target] else []
    title = recipe_name if args.target == "comparison" else f"{recipe_name}: {args.target}"
    target = args.results_dir / recipe_name / ("table" if args.target == "comparison" else args.target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if args.target == "methods" and draw(results, target.with_suffix(".png")):
        lines += [f"![Few-shot against many-shot accuracy]({target.name}.png)", ""]
    if refused:
        lines += ["Left out:", "", *(f"- {cell.name}: {reason}" for cell, reason in refused.items()), ""]
    page = tables.markdown(title, [*lines, *tables.provenance(every)], table, missing)
    write_atomically(target.with_suffix(".md"), page)
    write_atomically(target.with_suffix(".csv"), tables.as_csv(table))
    print(page)
    return target.with_suffix(".md")


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the flags; every target has the same."""
    parser = FlagParser(prog="reproduce.py", description=__doc__.split("\n")[0])
    targets = parser.add_subcommands(dest="target")
    for name, note in NOTES.items():
        target = FlagParser(description=note or "This project's comparison of methods and of Eq. 10's reductions.")
        target.add_argument("--scale", choices=list(SCALES), default="paper", help="Which recipes")
        target.add_argument(
            "--recipes", type=str, nargs="+", default=[], help="Recipes in place of the scale's: files or names"
        )
        target.add_argument(
            "--seeds", type=int, nargs="+", default=[], help="Default: 0-4 for CIFAR of the paper, else 0-2"
        )
        target.add_argument(
            "--cells", type=str, nargs="+", default=[], help="Only cells of these names (see --dry_run)"
        )
        target.add_argument("--sup_reduction", choices=["mean", "sum"], help="Eq. 10; the recipe's when not given")
        target.add_argument("--data_paths", type=dict[str, str], default={}, help="Recipe name -> local data directory")
        target.add_argument(
            "--flags", type=str, default="", help="More flags of train.py, such as '--data.num_workers 4'"
        )
        target.add_argument(
            "--parallel", type=PositiveInt, default=1, help="Runs at once; more than one have a thread each"
        )
        target.add_argument("--shard", type=str, default="1/1", help="i/n: every n-th run, beginning with the i-th")
        target.add_argument("--runs_dir", type=Path, default=Path("runs"), help="Where the runs are")
        target.add_argument("--results_dir", type=Path, default=Path("training/results"), help="Where the tables go")
        switch = {"type": bool, "nargs": "?", "const": True, "default": False}
        target.add_argument("--dry_run", **switch, help="List the runs with their expected cost, and write nothing")
        target.add_argument("--render_only", **switch, help="Train nothing")
        targets.add_subcommand(name, target, help=target.description)
    chosen = parser.parse_args(argv)
    args = chosen[chosen.target]
    args.target = chosen.target
    recipes = PAPER_RECIPES[args.target] if args.scale == "paper" else SCALES[args.scale]
    if args.target == "table2" and args.scale != "paper" and not args.recipes:
        parser.error("table2 has the paper's scale alone")
    try:
        args.recipes = [find_recipe(name) for name in args.recipes or recipes]
    except FileNotFoundError as error:
        parser.error(str(error))
    index, _, count = args.shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        parser.error(f"shard must be i/n with 1 <= i <= n, got {args.shard}")
    args.shard = (int(index), int(count))
    if unknown := set(args.data_paths) - {recipe.stem for recipe in args.recipes}:
        parser.error(f"data_paths names no recipe of this table: {', '.join(sorted(unknown))}")
    return args


@speaking()
def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, render what is there; returns the Markdown files."""
    args = parse(argv)
    tables_of: dict[str, list[tuple[Cell, dict[str, str]]]] = {}
    refused: dict[str, dict[Cell, str]] = {}
    cells_of: dict[str, list[Cell]] = {}
    args.keeping = set()  # recipes of which features are kept
    for file in args.recipes:
        try:
            recipe = Recipe.from_file(file)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        reduction = getattr(recipe.loss, "sup_reduction", METHODS["ecl"].settings().sup_reduction)
        rows = plan(args.target, recipe, args.sup_reduction or reduction)
        names = [cell.name for cell, _ in rows]
        if unknown := set(args.cells) - set(names):
            sys.exit(
                f"error: unknown cells {', '.join(sorted(unknown))}; choose from {', '.join(dict.fromkeys(names))}"
            )
        cells_of[file.stem] = [cell for cell, _ in rows]
        rows = [(cell, head) for cell, head in rows if not args.cells or cell.name in args.cells]
        whole = read_recipe(file, args.flags)
        if whole.model.tune == "head":
            args.keeping.add(file.stem)
        reasons = {cell: refusal(cell, whole) for cell, _ in rows}
        refused[file.stem] = {cell: reason for cell, reason in reasons.items() if reason}
        for cell, reason in refused[file.stem].items():
            print(f"{file.stem} {cell.name}: left out: {reason}")
        tables_of[file.stem] = [(cell, head) for cell, head in rows if cell not in refused[file.stem]]
    five = args.scale == "paper" and all(file.stem in SCALES["paper"] for file in args.recipes)
    args.seeds = args.seeds or list(range(5 if five else 3))

    groups: dict[Run, dict[Run, None]] = {}  # the runs that begin with the same teacher
    for seed, (name, rows) in product(args.seeds, tables_of.items()):
        for cell, _ in rows:
            run = Run(name, cell, seed)
            groups.setdefault(run.first, {})[run] = None
    index, count = args.shard
    wanted = [run for group in list(groups.values())[index - 1 :: count] for run in group]
    missing = [] if args.render_only else missing_runs(args, wanted)
    if args.dry_run:
        so_far = {name: results_so_far(args, name) for name in tables_of}
        for run in dict.fromkeys([*missing, *wanted]):
            hours = estimate(run.cell, so_far[run.recipe])
            begun = "begun, " if run.folder(args).recipe_file.exists() else ""
            state = f"{begun}unknown" if hours is None else f"{begun}{hours:.2f} h"
            after = f", after {run.teacher}" if run.teacher in missing else ""
            known = results_of(args, run.recipe, run.cell.name, run.seed) is not None
            again = ", again, for the model that its students need" if known else ""
            print(f"{run}: {f'{state}{after}{again}' if run in missing else 'finished'}")
        print(time_left(args, missing))
        return []
    every = [Run(name, cell, seed) for seed, (name, cells) in product(args.seeds, cells_of.items()) for cell in cells]
    failed = carry_out(args, missing, every)
    written = [path for name, rows in tables_of.items() if (path := render(args, name, rows, refused[name]))]
    if failed:
        sys.exit(f"error: these runs failed, their messages are above: {', '.join(map(str, failed))}")
    if not written:
        sys.exit(f"error: no finished run under {args.runs_dir} and no result under {args.results_dir}")
    return written


if __name__ == "__main__":
    main()
