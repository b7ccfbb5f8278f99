"""Results of runs as tables: mean and deviation over seeds, beside what the paper prints."""

import csv
import io
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from ecl_hf.names import in_spreadsheet
from ecl_hf.runs.folder import FREE_TO_CHANGE, flatten
from ecl_hf.runs.recipe import Recipe

SCORES = ("top1", "many", "medium", "few", "ece")
OWN_SETTINGS = {
    *("method", "seed", "data.imbalance_factor", "model.num_experts", "model.share_stages", "model.share_blocks"),
    *("loss.sup_reduction", "loss.alpha_logit", "loss.alpha_feature", "loss.beta"),
    *FREE_TO_CHANGE,
}
"""Recipe keys in which the cells of one table may differ."""

NUMBER = (int, float)
ENTRIES = {
    **{"method": str, "seed": int, "finished": bool, "steps": int, "training_seconds": NUMBER, "test_images": int},
    **{"class_counts": list, "shot_groups": dict, "parameters": NUMBER, "macs": NUMBER, "commit": object},
    **{"machine.platform": str, "machine.device": str, "machine.threads_per_process": int, "versions.torch": str},
    **{"versions.timm": str, "versions.transformers": str, "recipe.method": str},
    **{f"test.{way}.experts": list for way in ("plain", "flip")},
    **{
        f"test.{way}.{kind}.{score}": NUMBER if score == "top1" else object
        for way in ("plain", "flip")
        for kind in ("ensemble", "expert_mean")
        for score in SCORES
    },
}
"""What tables say of a run's `results.json`, by dotted names."""

Results = Sequence[dict[str, Any]]
"""`results.json` of the seeds of one cell."""


def differing_settings(every: Results) -> set[str]:
    """Recipe keys that are not the same in all results that have them, apart from a cell's own.

    What an older result does not say, it has by default; a setting that its method does not have any more says nothing.

    Raises:
        ValueError: a result is of an unknown method.
    """
    first, differing = {}, set()
    for result in every:
        default = flatten(asdict(Recipe(method=result["recipe"]["method"])))
        said = flatten(result["recipe"])
        settings = default | {key: said[key] for key in said if key in default or not key.startswith("loss.")}
        differing |= {key for key, value in settings.items() if first.setdefault(key, value) != value}
    return differing - OWN_SETTINGS


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of fractions, in percent; None where there is none."""
    if not values or None in values:
        return None, None
    deviation = 100 * statistics.stdev(values) if len(values) > 1 else None
    return 100 * statistics.mean(values), deviation


def summary(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation of fractions, in percent."""
    mean, deviation = mean_and_deviation(values)
    if mean is None:
        return "none"
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def comparison_rows(results: dict[str, Results]) -> list[dict[str, str]]:
    """A row for each cell and way of predicting: ensemble and mean expert, without and with flip."""
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
                cells = {name: summary([score[name] for score in scores]) for name in SCORES}
                suffix = "" if kind == "ensemble" else "_per_expert"
                size = {
                    "parameters": f"{runs[0][f'parameters{suffix}'] / 1e6:.2f} M",
                    "MACs": f"{runs[0][f'macs{suffix}'] * (1 + (flip == 'flip')) / 1e6:.1f} M",
                }
                table.append({**head, **cells, **size, "seeds": str(len(runs))})
    return table


def method_rows(results: dict[str, Results], cells: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """A row for each cell with results, the most accurate first: scores of the ensemble without flip, and the cost.

    Args:
        results: cell -> its seeds' results; those of older versions lack the peak of memory.
        cells: cell -> the columns that describe it beside its name.
    """
    found = sorted(results, key=lambda cell: -mean_and_deviation(group_scores(results[cell])["top1"])[0])
    devices = {cell: sorted({run["machine"]["device"] for run in runs}) for cell, runs in results.items()}
    several = len(set(chain(*devices.values()))) > 1  # of which each has its own times and counts its own memory
    table = []
    for cell in found:
        runs = results[cell]
        minutes = [run["training_seconds"] / 60 for run in runs]
        peaks = [run.get("peak_memory_bytes") for run in runs]
        cost = {
            "device": ", ".join(devices[cell]) if several else "",
            "training, min": f"{statistics.mean(minutes):.1f}"
            + (f" ± {statistics.stdev(minutes):.1f}" if len(minutes) > 1 else ""),
            "peak memory, MiB": "not measured" if None in peaks else f"{max(peaks) / 2**20:.0f}",
            "parameters": f"{runs[0]['parameters'] / 1e6:.2f} M",
            "MACs": f"{runs[0]['macs'] / 1e6:.1f} M",
        }
        scores = {name: summary(values) for name, values in group_scores(runs).items()}
        table.append({"method": cell, **scores, **cost, **cells[cell], "seeds": str(len(runs))})
    return table


def group_scores(runs: Results) -> dict[str, list[float | None]]:
    """Scores of the ensemble without flip, one for each seed."""
    return {name: [run["test"]["plain"]["ensemble"][name] for run in runs] for name in SCORES}


def gain(runs: Results, baseline: Results) -> str:
    """Top-1 over the baseline's of the same seeds (ensembles with flip), in points."""
    base = {run["seed"]: run["test"]["flip"]["ensemble"]["top1"] for run in baseline}
    pairs = [run["test"]["flip"]["ensemble"]["top1"] - base[run["seed"]] for run in runs if run["seed"] in base]
    mean, deviation = mean_and_deviation(pairs)
    if mean is None:
        return "not run"
    return f"{mean:+.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def published_rows(
    results: dict[str, Results],
    cells: dict[str, dict[str, str]],
    published: dict[str, float],
    absent: str,
    baseline: str | None = None,
) -> list[dict[str, str]]:
    """A row for each cell, run or not, beside the paper's top-1 (ensemble with flip).

    Args:
        results: cell -> its seeds' results; cells that were not run are missing.
        cells: cell -> the columns that describe it.
        published: cell -> top-1 in % as printed.
        absent: what to say where nothing is printed.
        baseline: cell to which the others' gain is given, over common seeds.
    """
    table = []
    for cell, head in cells.items():
        runs = results.get(cell, ())
        ways = {(way, kind): [run["test"][way][kind] for run in runs] for way in ("flip", "plain") for kind in
                ("ensemble", "expert_mean")}  # fmt: skip
        best = [max(expert["top1"] for expert in run["test"]["flip"]["experts"]) for run in runs]
        row = {**head, "top1": summary([score["top1"] for score in ways["flip", "ensemble"]]) if runs else "not run"}
        row["published"] = f"{published[cell]:.1f}" if cell in published else absent
        measured, _ = mean_and_deviation([score["top1"] for score in ways["flip", "ensemble"]])
        known = measured is not None and cell in published
        row["difference"] = f"{measured - published[cell]:+.1f}" if known else ""
        if baseline:
            row["gain"] = "" if cell == baseline or not runs else gain(runs, results.get(baseline, ()))
        row["no flip"] = summary([score["top1"] for score in ways["plain", "ensemble"]]) if runs else ""
        row["mean expert"] = summary([score["top1"] for score in ways["flip", "expert_mean"]]) if runs else ""
        row["best expert"] = summary(best) if runs else ""
        for name in SCORES[1:]:
            row[name] = summary([score[name] for score in ways["flip", "ensemble"]]) if runs else ""
        table.append({**row, "seeds": str(len(runs))})
    return table


def curve_rows(results: dict[str, Results], cells: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a figure over a setting (Fig. 4 and 5), ensemble and mean expert without flip, numbers apart.

    Args:
        results: cell -> its seeds' results.
        cells: cell -> the columns that describe it.
    """
    table = []
    for cell, head in cells.items():
        runs = results.get(cell, ())
        for model, kind in (("ensemble", "ensemble"), ("one expert (mean)", "expert_mean")):
            row = {**head, "model": model}
            for name in ("top1", "few"):
                values = [run["test"]["plain"][kind][name] for run in runs]
                numbers = dict(zip((name, f"{name}_std"), mean_and_deviation(values), strict=True))
                row |= {key: "" if number is None else f"{number:.2f}" for key, number in numbers.items()}
            table.append({**row, "seeds": str(len(runs))})
    return table


def provenance(every: Results) -> list[str]:
    """Lines on what the results of one recipe come from."""
    first = every[0]
    images = sorted({sum(result["class_counts"]) for result in every}, reverse=True)
    groups = ", ".join(f"{group} {count}" for group, count in first["shot_groups"].items())
    one_split = len(images) == 1
    machines = Counter(map(describe_machine, every)).most_common()
    return [
        f"Training images: {', '.join(map(str, images))}. Test images: {first['test_images']}."
        + (f" Classes: {groups}." if one_split else ""),
        f"Trained at commit {', '.join(sorted({str(result['commit']) for result in every}))}.",
        *(f"Machine{f' of {count} runs' if len(machines) > 1 else ''}: {machine}." for machine, count in machines),
    ]


def describe_machine(result: dict[str, Any]) -> str:
    """What a run was tested on."""
    machine, versions = result["machine"], result["versions"]
    threads = f"{machine['threads_per_process']} thread(s) a process"
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "transformers"))
    return f"{machine['platform']}, {machine['device']}, {threads}; {used}"


def markdown(title: str, lines: Sequence[str], rows: Sequence[dict[str, str]], missing: Sequence[str]) -> str:
    """A page with one table; columns that are empty everywhere are left out."""
    columns = [key for key in rows[0] if any(row[key] for row in rows)]
    return "\n".join(
        [
            *(f"# {title}", "", *lines, ""),
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
            *("| " + " | ".join(row[key] for key in columns) + " |" for row in rows),
            *("", "Not run: " + (", ".join(missing) or "nothing") + ".", ""),
        ]
    )


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """The rows as CSV with a header; what a spreadsheet would compute is text (`in_spreadsheet`)."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: in_spreadsheet(cell) for key, cell in row.items()} for row in rows)
    return text.getvalue()
