"""Run the cells of one of the paper's tables or figures as ordinary runs, and render it from their results.

    python training/reproduce.py table3 --scale small --dry_run                 # what would be run, and how long
    python training/reproduce.py table3 --scale small --seeds 0 1 2
    python training/reproduce.py table1 --scale paper --shard 2/4               # the second of four machines
    python training/reproduce.py comparison --scale small --render_only         # this project's own comparison

Runs go to `runs/<recipe>/<cell>/seed<n>`; finished ones are skipped and interrupted ones continued. The results of
each run and the tables, as Markdown and CSV, go to `training/results/<recipe>`; results that lie there already, such as
those of other machines, need no run folder.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from ecl_hf.data.longtail import exponential_counts
from ecl_hf.evidence import tables
from ecl_hf.methods import METHODS
from ecl_hf.runs.folder import RunFolder, write_atomically
from ecl_hf.runs.recipe import Recipe
from ecl_hf.runs.recipe_files import find_recipe

TRAIN = Path(__file__).with_name("train.py")
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())

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
        """Whether the reduction says anything: NCL is always summed, a single network has nothing to reduce."""
        method = METHODS[self.method]
        reducible = "sup_reduction" in {item.name for item in fields(method.settings)}
        return reducible and method.experts.most is None and self.method != "ncl"

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


def changed(cell: Cell, recipe: Recipe, **settings: Any) -> Cell:
    """The cell with other settings; those that are the recipe's own leave its name as it is."""
    own = {
        "gamma": (recipe.data.imbalance_factor, ("data.imbalance_factor",)),
        "k": (METHODS[cell.method].num_experts(recipe.model.num_experts), ("model.num_experts",)),
        "share": (recipe.model.share_stages or 0, ("model.share_stages",)),
        "alpha": (recipe.loss.alpha_logit, ("loss.alpha_logit", "loss.alpha_feature")),
        "beta": (recipe.loss.beta, ("loss.beta",)),
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
        write_atomically(copy, run.results_file.read_text())
    file = run.results_file if run.finished else copy
    return read_results(file) if file.exists() else None


def read_results(file: Path) -> dict[str, Any]:
    """Content of a results file; SystemExit names one that is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        sys.exit(f"error: {file} is damaged: {error}")


def estimate(args: Namespace, recipe_name: str, cell: Cell) -> str:
    """Hours of a run, from the step time of results with the same recipe, method and number of experts."""
    files = [
        *(args.results_dir / recipe_name).glob("*/seed*.json"),
        *(args.runs_dir / recipe_name).glob("*/seed*/results.json"),
    ]
    changes = {key: value for key, value, _ in cell.changes}
    hours = []
    for file in files:
        result = read_results(file)
        recipe = result["recipe"]
        experts = METHODS[cell.method].num_experts(changes.get("model.num_experts"))
        like = recipe["method"] == cell.method and len(result["test"]["plain"]["experts"]) == experts
        if not like or not result["finished"]:
            continue
        counts = result["class_counts"]
        images = sum(counts)
        if "data.imbalance_factor" in changes:
            images = sum(exponential_counts(len(counts), max(counts), changes["data.imbalance_factor"]))
        steps = recipe["epochs"] * (images // recipe["batch_size"])
        hours.append(result["training_seconds"] / result["steps"] * steps / 3600)
    return f"{sum(hours) / len(hours):.2f} h" if hours else "unknown"


def render(args: Namespace, recipe_name: str, rows: list[tuple[Cell, dict[str, str]]]) -> Path | None:
    """Write a table of one recipe from the results there are; returns the Markdown file, None without any result."""
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
    if differing := tables.differing_settings(every):
        sys.exit(f"error: the runs of {recipe_name} have different recipes: {sorted(differing)}")
    heads = {cell.name: head for cell, head in rows}
    lines = ["Accuracy and calibration error of the last epoch in %, mean ± sample standard deviation over seeds."]
    if args.target in ("comparison", "shared_stages"):
        table = tables.comparison_rows(results)
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
    page = tables.markdown(title, [*lines, *tables.provenance(every)], table, missing)
    write_atomically(target.with_suffix(".md"), page)
    write_atomically(target.with_suffix(".csv"), tables.as_csv(table))
    print(page)
    return target.with_suffix(".md")


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the flags; every target has the same."""
    parser = ArgumentParser(prog="reproduce.py", description=__doc__.split("\n")[0])
    targets = parser.add_subcommands(dest="target")
    for name, note in NOTES.items():
        target = ArgumentParser(description=note or "This project's comparison of methods and of Eq. 10's reductions.")
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


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run what is missing, render what is there; returns the Markdown files."""
    args = parse(argv)
    tables_of: dict[str, list[tuple[Cell, dict[str, str]]]] = {}
    for file in args.recipes:
        try:
            recipe = Recipe.from_file(file)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        rows = plan(args.target, recipe, args.sup_reduction or recipe.loss.sup_reduction)
        names = [cell.name for cell, _ in rows]
        if unknown := set(args.cells) - set(names):
            sys.exit(
                f"error: unknown cells {', '.join(sorted(unknown))}; choose from {', '.join(dict.fromkeys(names))}"
            )
        tables_of[file.stem] = [(cell, head) for cell, head in rows if not args.cells or cell.name in args.cells]
    five = args.scale == "paper" and all(file.stem in SCALES["paper"] for file in args.recipes)
    args.seeds = args.seeds or list(range(5 if five else 3))

    files = {file.stem: file for file in args.recipes}
    work = [
        (name, cell, seed)
        for seed in args.seeds
        for name, rows in tables_of.items()
        for cell in dict.fromkeys(cell for cell, _ in rows)
    ]
    index, count = args.shard
    failed = []
    for name, cell, seed in work[index - 1 :: count]:
        run = RunFolder(args.runs_dir / name / cell.name / f"seed{seed}")
        done = results_of(args, name, cell.name, seed) is not None
        if args.dry_run:
            begun = "begun, " if run.recipe_file.exists() else ""
            state = "finished" if done else begun + estimate(args, name, cell)
            print(f"{name} {cell.name} seed {seed}: {state}")
        elif not done and not args.render_only:
            print(f"{name} {cell.name} seed {seed}", flush=True)
            flags = ["--recipe", str(files[name]), "--output_dir", str(run.path), "--seed", str(seed), "--resume"]
            flags += [f"--data.path={args.data_paths[name]}"] if name in args.data_paths else []
            if subprocess.run([sys.executable, TRAIN, *flags, *cell.flags, *shlex.split(args.flags)]).returncode:
                failed.append(f"{name} {cell.name} seed {seed}")
    if args.dry_run:
        return []
    written = [path for name, rows in tables_of.items() if (path := render(args, name, rows))]
    if failed:
        sys.exit(f"error: these runs failed, their messages are above: {', '.join(failed)}")
    if not written:
        sys.exit(f"error: no finished run under {args.runs_dir} and no result under {args.results_dir}")
    return written


if __name__ == "__main__":
    main()
