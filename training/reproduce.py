"""Run a comparison of methods over seeds as ordinary runs, and render its table from their results.

    python training/reproduce.py --recipe training/recipes/cifar10_lt_small.yaml --seeds 0 1 2
    python training/reproduce.py --recipe training/recipes/cifar10_lt_small.yaml --seeds 0 1 2 --render_only true

Runs go to `runs/<recipe>/<cell>/seed<n>`; finished ones are skipped and interrupted ones continued. The results of each
run and the table, as Markdown and CSV, go to `training/results/<recipe>`.
"""

import csv
import io
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ecl_hf.runs import FREE_TO_CHANGE, RunFolder, flatten, write_atomically

CELLS: dict[str, list[str]] = {
    "ce": ["--method=ce"],
    "bc": ["--method=bc"],
    "bc_ensemble-mean": ["--method=bc_ensemble", "--loss.sup_reduction=mean"],
    "bc_ensemble-sum": ["--method=bc_ensemble", "--loss.sup_reduction=sum"],
    "ncl": ["--method=ncl"],
    "ecl-mean": ["--method=ecl", "--loss.sup_reduction=mean"],
    "ecl-sum": ["--method=ecl", "--loss.sup_reduction=sum"],
}
"""Rows of the table: name and flags of the run. Supervision is reduced over experts by `mean` (Eq. 10) or `sum`."""

COLUMNS = ("top1", "many", "medium", "few", "ece")
TRAIN = Path(__file__).with_name("train.py")


def summary(values: list[float | None]) -> str:
    """Mean and sample standard deviation in percent."""
    if None in values:
        return "none"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def shared(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The recipe's settings that all cells of a table must have in common."""
    own = {"method", "seed", "loss.sup_reduction", "model.num_experts", *FREE_TO_CHANGE}
    return [(key, str(value)) for key, value in flatten(result["recipe"]).items() if key not in own]


def rows(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """A row for each method and way of predicting."""
    table = []
    for cell, runs in results.items():
        for flip in ("plain", "flip"):
            kinds = ("ensemble", "expert_mean") if len(runs[0]["test"][flip]["experts"]) > 1 else ("ensemble",)
            for kind in kinds:
                model = {"ensemble": "ensemble", "expert_mean": "one expert (mean)"}[kind]
                head = {
                    "method": cell,
                    "model": model if len(kinds) > 1 else "single network",
                    "flip": "yes" if flip == "flip" else "no",
                }
                scores = [run["test"][flip][kind] for run in runs]
                cells = {name: summary([score[name] for score in scores]) for name in COLUMNS}
                suffix = "" if kind == "ensemble" else "_per_expert"
                size = {
                    "parameters": f"{runs[0][f'parameters{suffix}'] / 1e6:.2f} M",
                    "MACs": f"{runs[0][f'macs{suffix}'] * (1 + (flip == 'flip')) / 1e6:.1f} M",
                }
                table.append({**head, **cells, **size, "seeds": len(runs)})
    return table


def render(name: str, results: dict[str, list[dict[str, Any]]], missing: list[str]) -> tuple[str, str]:
    """The table as Markdown and as CSV."""
    table = rows(results)
    first = next(iter(results.values()))[0]
    machine, versions = first["machine"], first["versions"]
    groups = ", ".join(f"{group} {count}" for group, count in first["shot_groups"].items())
    commits = sorted({str(run["commit"]) for runs in results.values() for run in runs})
    lines = [
        f"# {name}",
        "",
        "Accuracy and calibration error of the last epoch in %, mean ± sample standard deviation over seeds.",
        "Written by `training/reproduce.py` from the results beside this file.",
        "",
        f"Training images: {sum(first['class_counts'])}. Test images: {first['test_images']}. Classes: {groups}.",
        f"Trained at commit {', '.join(commits)}.",
        f"Machine: {machine['platform']}, {machine['device']}, {machine['threads_per_process']} thread(s) a process;",
        f"torch {versions['torch']}, timm {versions['timm']}, transformers {versions['transformers']}.",
        "",
        "| " + " | ".join(table[0]) + " |",
        "|" + "---|" * len(table[0]),
        *("| " + " | ".join(map(str, row.values())) + " |" for row in table),
        "",
        "Not run: " + (", ".join(missing) or "nothing") + ".",
        "",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return "\n".join(lines), text.getvalue()


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Run what is missing, render what is there; returns the Markdown file."""
    parser = ArgumentParser(prog="reproduce.py", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds of each cell")
    parser.add_argument("--cells", type=str, nargs="+", default=list(CELLS), help=f"Out of {', '.join(CELLS)}")
    parser.add_argument("--flags", type=str, default="", help="More flags of train.py, such as '--data.path cifar10'")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="Where the runs are")
    parser.add_argument("--results_dir", type=Path, default=Path("training/results"), help="Where the tables go")
    parser.add_argument("--render_only", type=bool, default=False, help="Train nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.cells) - set(CELLS):
        parser.error(f"unknown cells {', '.join(sorted(unknown))}; choose from {', '.join(CELLS)}")

    name = args.recipe.stem
    target = args.results_dir / name
    results: dict[str, list[dict[str, Any]]] = {}
    missing = []
    for seed in args.seeds:
        for cell in args.cells:
            run = RunFolder(args.runs_dir / name / cell / f"seed{seed}")
            if not args.render_only and not run.finished:
                print(f"{name} {cell} seed {seed}", flush=True)
                flags = ["--recipe", str(args.recipe), "--output_dir", str(run.path), "--seed", str(seed), "--resume"]
                subprocess.run([sys.executable, TRAIN, *flags, *CELLS[cell], *args.flags.split()], check=True)
            if run.finished:
                results.setdefault(cell, []).append(json.loads(run.results_file.read_text()))
                (target / cell).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(run.results_file, target / cell / f"seed{seed}.json")
            else:
                missing.append(f"{cell} seed {seed}")
    if not results:
        sys.exit(f"error: no finished run under {args.runs_dir / name}")
    every = [result for runs in results.values() for result in runs]
    if differing := {key for result in every for key in set(shared(result)) ^ set(shared(every[0]))}:
        sys.exit(f"error: the runs under {args.runs_dir / name} have different recipes: {sorted(differing)}")
    markdown, table = render(name, {cell: results[cell] for cell in args.cells if cell in results}, missing)
    write_atomically(target / "table.md", markdown)
    write_atomically(target / "table.csv", table)
    print(markdown)
    return target / "table.md"


if __name__ == "__main__":
    main()
