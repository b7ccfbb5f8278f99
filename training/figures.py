"""Draw the paper's figures of one or several runs side by side, and write a self-contained report.html.

    python training/figures.py --run runs/ecl
    python training/figures.py --run runs/ecl --run runs/bc --names ECL "independent networks" --output figures
    python training/figures.py --run runs/ecl --results training/results/cifar10_lt_small    # also its tables, Fig. 4, 5

Everything is drawn from saved arrays: `evaluation.json` and `.npz`, which `evaluate.py` writes (and which is run here for a
run folder that has none), `metrics.jsonl` and `results.json` of the run, and tables of `reproduce.py`. Each figure becomes a
PNG and an SVG; what can't be drawn is listed in the report with the reason.
"""

import base64
import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure

from ecl_hf import plots
from ecl_hf.runs import RunFolder, write_atomically

EVALUATE = Path(__file__).with_name("evaluate.py")
TEMPLATE = Path(__file__).with_name("report_template.html")
SCORES = ("top1", "top5", "many", "medium", "few", "ece")


@dataclass(frozen=True)
class Evidence:
    """What is known of one run.

    Attributes:
        evaluation: the JSON file of `evaluate.py`.
        arrays: the .npz file beside it.
        results: `results.json` of the run; empty for a model without run folder.
        epochs: lines of `metrics.jsonl`.
    """

    evaluation: dict[str, Any]
    arrays: dict[str, np.ndarray]
    results: dict[str, Any]
    epochs: list[dict[str, Any]]


@dataclass(frozen=True)
class Drawing:
    """A figure of the report; `figure` is None, and `caption` the reason, where it could not be drawn."""

    name: str
    title: str
    caption: str
    figure: Figure | None


def read_evidence(path: Path, data_path: str | None, landscape_images: int) -> Evidence:
    """Read a run folder or an evaluation's JSON file; a run that was not evaluated yet is evaluated.

    Raises:
        FileNotFoundError: there is no such run or file.
        ValueError: it is not what `evaluate.py` writes, or the evaluation failed.
    """
    run = RunFolder(path)
    evaluation = run.path / "evaluation.json" if path.is_dir() else path
    if path.is_dir() and not evaluation.is_file():
        if not run.model.is_dir():
            raise FileNotFoundError(f"{path} has no model: it is not a run folder, or its training is not finished")
        flags = ["--run", str(path), f"--landscape_images={landscape_images}"]
        flags += [f"--data.path={data_path}"] if data_path else []
        if subprocess.run([sys.executable, EVALUATE, *flags]).returncode:
            raise ValueError(f"the evaluation of {path} failed")
    if not evaluation.is_file() or not evaluation.with_suffix(".npz").is_file():
        raise FileNotFoundError(
            f"{path} is neither a run folder nor a JSON file of evaluate.py with its .npz beside it"
        )
    content = json.loads(evaluation.read_text())
    if "reliability" not in content:
        raise ValueError(f"{evaluation} is not a JSON file of evaluate.py")
    with np.load(evaluation.with_suffix(".npz")) as file:
        arrays = dict(file)
    beside = RunFolder(evaluation.parent)
    results = json.loads(beside.results_file.read_text()) if beside.results_file.is_file() else {}
    lines = beside.metrics_file.read_text().splitlines() if beside.metrics_file.is_file() else []
    return Evidence(content, arrays, results, [json.loads(line) for line in lines])


def of_runs(runs: dict[str, Evidence], *names: str) -> dict[str, Any]:
    """These arrays of the runs that have them; a single name gives the array itself."""
    having = {
        run: [evidence.arrays[name] for name in names if name in evidence.arrays] for run, evidence in runs.items()
    }
    return {run: arrays[0] if len(names) == 1 else tuple(arrays) for run, arrays in having.items() if arrays}


def draw_all(runs: dict[str, Evidence], tables: dict[str, list[dict[str, str]]]) -> list[Drawing]:
    """Every figure, or why it is not there."""
    first = next(iter(runs.values())).evaluation
    counts, names = first["class_counts"], first["class_names"]
    tested = first["test_images"] / len(counts)
    drawings = []

    def add(name: str, title: str, caption: str, data: Any, reason: str, plot: Any, *arguments: Any) -> None:
        figure = plot(data, *arguments) if data else None
        drawings.append(Drawing(name, title, caption if figure else reason, figure))

    again = "run evaluate.py --run again"
    add(
        *("class_histogram", "Training images of each class"),
        "Many-shot classes have more than 100 training images, few-shot classes less than 20.",
        *(counts, "", plots.plot_class_histogram, names),
    )
    add(
        *("class_accuracy", "Accuracy of each class against its training images"),
        "Ensembles without flip. A flat curve at equal height would be a classifier without head preference.",
        {run: rows[0] for run, rows in of_runs(runs, "class_accuracy_plain").items()},
        *("no class accuracies", plots.plot_class_accuracy, counts),
    )
    add(
        *("training", "Loss terms over the epochs"),
        'Means over the training batches of an epoch, before their weights; "loss" is the weighted sum.',
        {run: evidence.epochs for run, evidence in runs.items() if evidence.epochs},
        *("no metrics.jsonl beside the evaluation", plots.plot_training),
    )
    predicted = {run: matrix.sum(0) for run, matrix in of_runs(runs, "confusion").items()}
    add(
        *("fig2_transfer", "Fig. 2: what is transferred, and what is predicted"),
        "The teacher's logit of the image's own class times the image's weight in the distillation, averaged over the "
        'training images without augmentation (a reading of "distilled logits value"; where the method does not distil '
        "logits, what it would transfer unweighted); the mean weight of Eq. 6; the ensemble's predictions on the test "
        "split, dashed: as many as there are images.",
        of_runs(runs, "transfer_value"),
        f"needs a run folder with several experts and a checkpoint: {again}",
        *(plots.plot_transfer, of_runs(runs, "transfer_weight"), predicted, counts, names, tested),
    )
    add(
        *("fig4_experts", "Fig. 4: number of experts"),
        "Means over seeds; bars: sample standard deviation. Without flip.",
        points(tables.get("fig4", []), ("experts",)),
        *("no fig4.csv among --results: run reproduce.py fig4", plots.plot_expert_number),
    )
    add(
        *("fig5_weights", "Fig. 5: weights of the distillation and of the contrastive task"),
        "Means over seeds; bars: sample standard deviation. Without flip.",
        points(tables.get("fig5", []), ("value",)),
        *("no fig5.csv among --results: run reproduce.py fig5", plots.plot_loss_weights),
    )
    add(
        *("fig6_tsne", "Fig. 6: t-SNE of test features"),
        "The first expert's pooled features of up to 100 test images of a class, of at most ten classes spread over the "
        "ranking; in brackets the training images. Axes of t-SNE have no unit.",
        of_runs(runs, "tsne_points", "tsne_labels"),
        *(again, plots.plot_tsne, counts, names),
    )
    add(
        *("fig7_feature_distance", "Fig. 7: distance of the experts' features"),
        "Eq. 12 on the test split. The scale of features is a method's own: compare the shape over the classes first.",
        {run: rows for run, rows in of_runs(runs, "feature_distance").items() if len(rows)},
        *("needs several experts", plots.plot_feature_distance, counts, names),
    )
    images = {evidence.evaluation["landscape_images"] for evidence in runs.values()} - {0}
    add(
        *("fig8_landscape", "Fig. 8: loss and accuracy around the weights"),
        f"Ensemble on {' or '.join(map(str, sorted(images)))} test images along five random directions, Gaussian with the "
        "norm of each filter; biases and normalisation layers are not moved, BatchNorm keeps its running statistics. Bold: "
        "mean of the directions. The loss is cut off above.",
        of_runs(runs, "landscape_magnitudes", "landscape_loss", "landscape_accuracy"),
        *("run evaluate.py --run again with --landscape_images 1000", plots.plot_landscape),
    )
    add(
        *("fig9_reliability", "Fig. 9: reliability"),
        "Ensemble without flip in 15 bins. Orange: how far the mean confidence is from the accuracy.",
        {run: evidence.evaluation["reliability"]["plain"]["ensemble"] for run, evidence in runs.items()},
        *("", plots.plot_reliability),
        {run: evidence.evaluation["test"]["plain"]["ensemble"]["ece"] for run, evidence in runs.items()},
    )
    add(
        *("fig10_confusion", "Fig. 10: confusion"),
        "Ensemble without flip, logarithm of one plus the number of images; the diagonal is right.",
        of_runs(runs, "confusion"),
        *(again, plots.plot_confusion, counts, names),
    )
    add(
        *("posthoc", "Post-hoc logit adjustment (Eq. 4)"),
        "Top-1 of the ensemble (bold) and of each expert over tau. Dotted: the optimum of theory, 1 where the logits carry "
        "the training prior and 0 where training has taken it out (Eq. 3). Where the best tau lies elsewhere, the bias that "
        "was learnt is not the one that was assumed.",
        {
            run: (evidence.evaluation["posthoc"], float(evidence.evaluation["logit_prior"] == "train"))
            for run, evidence in runs.items()
        },
        *("", plots.plot_posthoc),
    )
    add(
        *("shifted", "Shifted test distributions"),
        "Top-1 if the classes of the test set were long-tailed, forward (as in training) to backward (reversed), with and "
        "without knowledge of it (target_prior). Class accuracies are weighted, which is the expectation over subsets.",
        {run: evidence.evaluation["shifted"] for run, evidence in runs.items()},
        *("", plots.plot_shifted),
    )
    return drawings


def points(rows: list[dict[str, str]], extra: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a figure's CSV file with numbers as numbers; empty cells become None."""
    numbers = {"top1", "top1_std", "few", "few_std", *extra}
    return [
        {key: (float(value) if value else None) if key in numbers else value for key, value in row.items()}
        for row in rows
        if row["top1"]
    ]


def percent(score: float | None) -> str:
    """A fraction in percent."""
    return "none" if score is None else f"{100 * score:.1f}"


def score_rows(runs: dict[str, Evidence]) -> list[list[str]]:
    """Header and rows of the table of scores; top-5 only where it says something."""
    shown = [key for key in SCORES if key != "top5" or any(
        e.evaluation["test"]["plain"]["ensemble"]["top5"] is not None for e in runs.values())]  # fmt: skip
    rows = [["run", "model", "flip", *shown]]
    for name, evidence in runs.items():
        for way in ("plain", "flip"):
            test = evidence.evaluation["test"][way]
            models = {"ensemble": test["ensemble"], "one expert (mean)": test["expert_mean"]}
            models["best expert"] = test["expert_best"]
            if len(test["experts"]) == 1:
                models = {"single network": test["ensemble"]}
            flip = "yes" if way == "flip" else "no"
            rows += [[name, model, flip, *(percent(score[key]) for key in shown)] for model, score in models.items()]
    return rows


def run_rows(runs: dict[str, Evidence]) -> list[list[str]]:
    """Header and rows of the table of what was run."""
    rows = [["run", "method", "experts", "seed", "epochs", "parameters", "MACs", "images/s", "training", "device"]]
    for name, evidence in runs.items():
        test, run = evidence.evaluation, evidence.results
        hours = f"{run['training_seconds'] / 3600:.2f} h" if run else "unknown"
        told = [str(run.get(key, "unknown")) for key in ("seed", "epochs")]
        size = [f"{test['parameters'] / 1e6:.2f} M", f"{test['macs'] / 1e6:.1f} M", f"{test['images_per_second']:.0f}"]
        experts = str(len(test["test"]["plain"]["experts"]))
        rows.append([name, run.get("method", "unknown"), experts, *told, *size, hours, test["machine"]["device"]])
    return rows


def read_tables(folder: Path | None) -> dict[str, list[dict[str, str]]]:
    """Tables of `reproduce.py`, by their names; FileNotFoundError if there is none."""
    if folder is None:
        return {}
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"results: there is no .csv file of reproduce.py in {folder}")
    return {file.stem: list(csv.DictReader(file.read_text().splitlines())) for file in files}


def save(drawing: Drawing, output: Path) -> str:
    """Write a figure as SVG and PNG; returns the PNG for inlining."""
    drawing.figure.savefig(output / f"{drawing.name}.svg", metadata={"Date": None})
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="png", dpi=130)
    (output / f"{drawing.name}.png").write_bytes(buffer.getvalue())
    return base64.b64encode(buffer.getvalue()).decode()


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw, and return the path of the report."""
    parser = ArgumentParser(prog="figures.py", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=str, action="append", required=True, help="Run folder or JSON of evaluate.py")
    parser.add_argument("--names", type=str, nargs="+", default=[], help="Names of the runs, else those of the folders")
    parser.add_argument("--output", type=Path | None, help="Where to write, else figures/ in the first run folder")
    parser.add_argument("--results", type=Path | None, help="Directory of reproduce.py's results, for its tables")
    parser.add_argument("--data.path", type=str | None, help="Local data directory, for runs that are evaluated here")
    parser.add_argument(
        "--landscape_images", type=int, default=1000, help="For runs that are evaluated here; 0: no Fig. 8"
    )
    args = parser.parse_args(argv)
    paths = [Path(path) for path in args.run]
    names = args.names or [path.stem if path.suffix == ".json" else path.resolve().name for path in paths]
    if len(names) != len(paths):
        parser.error(f"{len(names)} names for {len(paths)} runs")
    if len(set(names)) != len(names):
        parser.error(f"the runs need different names; give them with --names (now {', '.join(names)})")
    try:
        tables = read_tables(args.results)
        runs = {n: read_evidence(p, args.data.path, args.landscape_images) for n, p in zip(names, paths, strict=True)}
        first = runs[names[0]].evaluation
        for name, evidence in runs.items():
            for key in ("class_names", "class_counts", "test_images"):
                if evidence.evaluation[key] != first[key]:
                    raise ValueError(f"{names[0]} and {name} can't be compared: they differ in {key}")
        output = args.output or (paths[0] if paths[0].is_dir() else paths[0].parent) / "figures"
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    drawings = draw_all(runs, tables)
    pictures = {drawing.name: save(drawing, output) for drawing in drawings if drawing.figure}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(TEMPLATE.read_text()).render(
        names=names,
        evaluation=first,
        drawings=drawings,
        pictures=pictures,
        run_table=run_rows(runs),
        score_table=score_rows(runs),
        tables={name: [list(rows[0]), *(list(row.values()) for row in rows)] for name, rows in tables.items() if rows},
        recipes={n: yaml.safe_dump(e.results["recipe"], sort_keys=False) for n, e in runs.items() if e.results},
        origins={n: {key: e.evaluation[key] for key in ("commit", "versions", "machine")} for n, e in runs.items()},
    )
    report = output / "report.html"
    write_atomically(report, html)
    for drawing in drawings:
        print(
            f"{drawing.name}: {output / drawing.name}.png" if drawing.figure else f"{drawing.name}: {drawing.caption}"
        )
    print(f"report: {report}")
    return report


if __name__ == "__main__":
    main()
