"""Draw the paper's figures of one or several runs side by side, and write a self-contained report.html.

    python training/figures.py --run runs/ecl
    python training/figures.py --run runs/ecl --run runs/bc --names ECL "independent networks" --output figures
    python training/figures.py --run runs/ecl --results training/results/cifar10_lt_small_large_decay  # with tables

Everything is drawn from saved arrays: `evaluation.json` and `.npz`, which `evaluate.py` writes (it is run here for a
run folder that has none), `metrics.jsonl` and `results.json` of the run, and tables of `reproduce.py`. Each figure
becomes a PNG and an SVG; what can't be drawn is listed in the report with the reason.
"""

import base64
import csv
import io
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from ecl_hf.evidence.analysis import embed_features
from ecl_hf.evidence.classes import ranked_classes
from ecl_hf.evidence.evaluation import percent
from ecl_hf.files import read_entries, read_text, replacing
from ecl_hf.flags import FlagParser
from ecl_hf.names import printable
from ecl_hf.runs.folder import RunFolder, read_results, write_atomically
from ecl_hf.terminal import refusing, speaking

try:
    import sklearn  # noqa: F401  (for t-SNE)
    from matplotlib.figure import Figure

    from ecl_hf.evidence import plots
    from ecl_hf.evidence.plots.fonts import drawable, fonts_for
    from ecl_hf.evidence.plots.style import short_names
except ImportError as error:
    raise ImportError(f"figures need pip install 'ecl-hf[figures]' ({error})") from error

EVALUATE = Path(__file__).with_name("evaluate.py")
TEMPLATE = Path(__file__).with_name("report_template.html")
AGAIN = "evaluate.py --run has to run again"
TEXTS = {
    "class_histogram": (
        "Training images of each class",
        "Many-shot classes have more than 100 training images, few-shot classes less than 20.",
        AGAIN,
    ),
    "class_accuracy": (
        "Accuracy of each class against its training images",
        "Ensembles without flip. A flat curve would be a classifier without head preference.",
        AGAIN,
    ),
    "training": (
        "Loss terms over the epochs",
        'Means over the training batches of an epoch, before their weights; "loss" is the weighted sum.',
        "there is no metrics.jsonl beside the evaluation",
    ),
    "fig2_transfer": (
        "Fig. 2: what is transferred, and what is predicted",
        "Left: the teacher's logit of the image's own class times the image's weight in the distillation, mean over "
        'the training images without augmentation (a reading of "distilled logits value"; for a method that does not '
        "distil logits, what it would transfer unweighted). Then the mean weight of Eq. 6, where there are reference "
        "heads, and the ensemble's predictions on the test split; dashed: as many as a class has test images.",
        "it needs a run folder with several experts and a checkpoint",
    ),
    "fig4_experts": (
        "Fig. 4: number of experts",
        "Means over seeds; bars: sample standard deviation.",
        "there is no fig4.csv with a measured row among --results (reproduce.py fig4)",
    ),
    "fig5_weights": (
        "Fig. 5: weights of the distillation and of the contrastive task",
        "Means over seeds; bars: sample standard deviation.",
        "there is no fig5.csv with a measured row among --results (reproduce.py fig5)",
    ),
    "fig6_tsne": (
        "Fig. 6: t-SNE of test features",
        "The first expert's pooled features of up to 100 test images of a class, of at most ten classes spread over "
        "the ranking; in brackets the training images. The axes of t-SNE have no unit.",
        AGAIN,
    ),
    "fig7_feature_distance": (
        "Fig. 7: distance of the experts' features",
        "Eq. 12 on the test split. The features' scale is each run's own: compare the shape over the classes first.",
        "it needs a run with several experts",
    ),
    "fig8_landscape": (
        "Fig. 8: loss and accuracy around the weights",
        "The ensemble on test images along five random directions, Gaussian with the norm of each filter; biases and "
        "normalisation layers are not moved, BatchNorm keeps its running statistics. Bold: mean of the directions.",
        "evaluate.py --run has to run again, with --landscape_images 1000",
    ),
    "fig9_reliability": (
        "Fig. 9: reliability",
        "Ensemble without flip in 15 bins; light parts: how far the mean confidence is from the accuracy.",
        AGAIN,
    ),
    "fig10_confusion": (
        "Fig. 10: confusion",
        "Ensemble without flip, logarithm of one plus the number of images; the diagonal is right.",
        AGAIN,
    ),
    "posthoc": (
        "Post-hoc logit adjustment (Eq. 4)",
        "Top-1 of the ensemble (bold) and of each expert over tau. Dotted: the optimum of theory, 1 where the logits "
        "carry the training prior and 0 where training has taken it out (Eq. 3); there is none where they carry "
        "another prior. Where the best tau lies elsewhere, the bias that was learnt is not the one that was assumed. "
        "A tau chosen on the test set is no fair choice.",
        AGAIN,
    ),
    "shifted": (
        "Shifted test distributions",
        "Top-1 if the classes of the test set were long-tailed, forward (as in training) to backward (reversed), with "
        "and without knowledge of it (target_prior). Class accuracies are weighted: the expectation over subsets.",
        AGAIN,
    ),
}
"""Of each figure its title, its caption, and why it may be absent."""

NUMBER = (int, float)
ENTRIES = {
    **{"class_names": list, "class_counts": list, "test_images": int, "logit_prior": object, "posthoc": dict},
    **{"shifted": list, "parameters": NUMBER, "macs": NUMBER, "images_per_second": NUMBER, "machine.device": str},
    **{"commit": object, "versions": dict, "reliability.plain.ensemble": dict},
    **{f"test.{way}.{kind}": dict for way in ("plain", "flip") for kind in ("ensemble", "expert_mean", "expert_best")},
    **{f"test.{way}.experts": list for way in ("plain", "flip")},
}
"""What is read of an evaluation, by dotted names."""

MOST_ROWS = 300
"""Of a table in the report; of the classes the .csv file beside the evaluation has all."""

MAX_ARRAYS = 1 << 30
"""Bytes of the arrays of an evaluation: the confusion of ten thousand classes has 400 million."""

BROKEN_ZIP = (zipfile.BadZipFile, zlib.error)

MAX_TABLE = 1 << 20
"""Bytes of a CSV file of `reproduce.py`."""

MODELS, DECIMAL = r"ensemble|one expert \(mean\)", r"\d{1,6}(\.\d{1,6})?"
NUMBERS = dict.fromkeys(("top1", "top1_std", "few", "few_std"), f"({DECIMAL})?")
POINTS = {
    "fig4": {"experts": DECIMAL, "model": MODELS, **NUMBERS},
    "fig5": {"swept": "alpha|beta", "value": DECIMAL, "model": MODELS, **NUMBERS},
}
"""Columns of the CSV files that figures are drawn from, and what a cell can be."""

SCORES = {
    **{"balanced": "balanced", "top1": "top-1", "macro_f1": "macro F1", "top5": "top-5"},
    **{"many": "many", "medium": "medium", "few": "few", "ece": "calibration error"},
}
"""What the page calls the scores, in its order."""

TITLES = SCORES | {f"val/{key}": f"validation: {title}" for key, title in SCORES.items()}
"""What the page calls the scores of the run's log and of tables."""


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
    content = read_entries(evaluation, ENTRIES, "JSON file of evaluate.py, which has to run again")
    arrays = read_arrays(evaluation.with_suffix(".npz"))
    beside = RunFolder(evaluation.parent)
    there = beside.results_file.exists()
    entries = {"training_seconds": (int, float), "recipe.data.horizontal_flip": bool}
    results = read_results(beside.results_file, entries) if there else {}
    return Evidence(content, arrays, results, beside.read_log()[0])


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """What an .npz file holds; ValueError names one that is damaged, or unpacks to more than evaluations have."""
    try:
        with zipfile.ZipFile(file) as parts:
            if sum(part.file_size for part in parts.infolist()) > MAX_ARRAYS:
                raise ValueError(f"its arrays have more than {MAX_ARRAYS} bytes")
        with np.load(file) as arrays:
            return dict(arrays)
    except (EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError, *BROKEN_ZIP) as error:
        raise ValueError(f"{file} is damaged ({error}); evaluate.py has to run again") from error


def of_runs(runs: dict[str, Evidence], *names: str) -> dict[str, Any]:
    """These arrays of the runs that have them; a single name gives the array itself."""
    having = {
        run: [evidence.arrays[name] for name in names if name in evidence.arrays] for run, evidence in runs.items()
    }
    return {run: arrays[0] if len(names) == 1 else tuple(arrays) for run, arrays in having.items() if arrays}


def draw_all(
    runs: dict[str, Evidence], tables: dict[str, list[dict[str, str]]], names: Sequence[str]
) -> dict[str, Figure]:
    """Every figure for which there is something to draw, in the order and by the names of `TEXTS`.

    Args:
        runs: by the names that the figures show.
        tables: of `reproduce.py`, by their names.
        names: of the classes, as the figures show them.
    """
    counts = next(iter(runs.values())).evaluation["class_counts"]
    tests = {run: evidence.evaluation for run, evidence in runs.items()}
    predicted = {run: matrix.sum(0) for run, matrix in of_runs(runs, "confusion").items()}
    tested = next((matrix.sum(1) for matrix in of_runs(runs, "confusion").values()), [])
    theory = {run: {"train": 1.0, "uniform": 0.0}.get(str(test["logit_prior"])) for run, test in tests.items()}
    ensembles = {run: test["reliability"]["plain"]["ensemble"] for run, test in tests.items()}
    errors = {run: test["test"]["plain"]["ensemble"]["ece"] for run, test in tests.items()}
    accuracies = {run: rows[0] for run, rows in of_runs(runs, "class_accuracy_plain").items()}
    distances = {run: rows for run, rows in of_runs(runs, "feature_distance").items() if len(rows)}
    samples = of_runs(runs, "sampled_features", "sampled_labels")
    embedded = {run: (embed_features(rows), labels) for run, (rows, labels) in samples.items() if len(rows) >= 3}
    epochs = {
        run: [{TITLES.get(key, key): value for key, value in line.items()} for line in evidence.epochs]
        for run, evidence in runs.items()
        if evidence.epochs
    }
    plan = {
        "class_histogram": (plots.plot_class_histogram, counts, names),
        "class_accuracy": (plots.plot_class_accuracy, accuracies, counts),
        "training": (plots.plot_training, epochs),
        "fig2_transfer": (
            *(plots.plot_transfer, of_runs(runs, "transfer_value"), of_runs(runs, "transfer_weight")),
            *(predicted, counts, names, tested),
        ),
        "fig4_experts": (plots.plot_expert_number, points(tables.get("fig4", []))),
        "fig5_weights": (plots.plot_loss_weights, points(tables.get("fig5", []))),
        "fig6_tsne": (plots.plot_tsne, embedded, counts, names),
        "fig7_feature_distance": (plots.plot_feature_distance, distances, counts, names),
        "fig8_landscape": (
            plots.plot_landscape,
            of_runs(runs, "landscape_magnitudes", "landscape_loss", "landscape_accuracy"),
        ),
        "fig9_reliability": (plots.plot_reliability, ensembles, errors),
        "fig10_confusion": (plots.plot_confusion, of_runs(runs, "confusion"), counts, names),
        "posthoc": (plots.plot_posthoc, {run: (test["posthoc"], theory[run]) for run, test in tests.items()}),
        "shifted": (plots.plot_shifted, {run: test["shifted"] for run, test in tests.items()}),
    }
    return {name: plot(data, *more) for name, (plot, data, *more) in plan.items() if data}


def points(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The measured rows of a figure's CSV file with numbers as numbers; empty cells become None."""
    return [
        {
            key: (float(value) if value else None) if key in ("experts", "value", *NUMBERS) else value
            for key, value in row.items()
        }
        for row in rows
        if row["top1"]
    ]


def score_rows(runs: dict[str, Evidence]) -> list[list[str]]:
    """Header and rows of the table of scores; those that nobody measured are left out.

    There is no flip for a run whose recipe says that a mirrored picture is of another class.
    """
    scores = [evidence.evaluation["test"]["plain"]["ensemble"] for evidence in runs.values()]
    shown = [
        key for key in SCORES if key in ("many", "medium", "few") or any(score.get(key) is not None for score in scores)
    ]
    rows = [["run", "model", "flip", *(SCORES[key] for key in shown)]]
    for name, evidence in runs.items():
        flips = not evidence.results or evidence.results["recipe"]["data"]["horizontal_flip"]
        for way in ("plain", "flip") if flips else ("plain",):
            test = evidence.evaluation["test"][way]
            models = {"ensemble": test["ensemble"], "one expert (mean)": test["expert_mean"]}
            models["best expert"] = test["expert_best"]
            if len(test["experts"]) == 1:
                models = {"single network": test["ensemble"]}
            flip = "yes" if way == "flip" else "no"
            rows += [
                [name, model, flip, *(percent(score.get(key)) for key in shown)] for model, score in models.items()
            ]
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


def failures(evidence: Evidence) -> dict[str, Any] | None:
    """The worst classes, the most confused pairs and the table of the classes; None of an evaluation without them."""
    evaluation = evidence.evaluation
    if "classes" not in evaluation:
        return None
    names = [printable(name) for name in evaluation["class_names"]]

    def shown(entry: dict[str, Any]) -> dict[str, Any]:
        pictures = [
            {**picture, "predicted": names[picture["predicted"]], "confidence": percent(picture["confidence"])}
            for picture in entry["pictures"]
            if re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", picture["src"])
        ]
        there = {key: names[entry[key]] for key in ("class", "predicted") if key in entry}
        return {**entry, **there, "pictures": pictures, "training": evaluation["class_counts"][entry["class"]]}

    rows, order = evaluation["classes"], ranked_classes(evaluation["classes"])
    scores = ("accuracy", "f1", "accuracy_training_prior", "f1_training_prior")
    return {
        "worst": [shown(entry) for entry in evaluation["worst"]],
        "confused": [shown(entry) for entry in evaluation["confused"]],
        "classes": [
            {
                **{
                    "place": c,
                    "name": names[c],
                    "training": rows[c]["training_images"],
                    "test": rows[c]["test_images"],
                },
                "scores": [percent(rows[c][score]) for score in scores],
            }
            for c in order[:MOST_ROWS]
        ],
        "left_out": max(0, len(order) - MOST_ROWS),
    }


def check_comparable(runs: dict[str, dict[str, Any]], keys: Sequence[str]) -> None:
    """Refuse runs that differ in one of these entries; ValueError names the first two."""
    for name, entries in runs.items():
        start = next(iter(runs))
        for key in keys:
            if entries[key] != runs[start][key]:
                raise ValueError(f"{start} and {name} can't be compared: they differ in {key}")


def read_tables(folder: Path | None) -> dict[str, list[dict[str, str]]]:
    """Tables of `reproduce.py`, by their names; FileNotFoundError if there is none."""
    if folder is None:
        return {}
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"results: there is no .csv file of reproduce.py in {folder}")
    return {file.stem: read_table(file) for file in files}


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; ValueError names it if it is none, too long, or not what its figure is drawn from."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(file, MAX_TABLE), newline=""))
        rows, columns = list(reader), reader.fieldnames or ()
    except csv.Error as error:
        raise ValueError(f"{file} is no CSV file: {error}") from error
    if len(rows) > MOST_ROWS:
        raise ValueError(f"{file} has {len(rows)} rows; more than {MOST_ROWS} has no table of reproduce.py")
    cells = POINTS.get(file.stem, {})
    if lacking := [name for name in cells if name not in columns]:
        raise ValueError(f"{file} lacks the column {lacking[0]}; reproduce.py has to run again")
    for place, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"{file}: row {place} has not as many cells as the header")
        if wrong := [name for name, kind in cells.items() if not re.fullmatch(kind, row[name])]:
            raise ValueError(f"{file}: row {place} can't have {wrong[0]} {row[wrong[0]][:80]!r}")
    return rows


def save(name: str, figure: Figure, output: Path) -> str:
    """Write a figure as SVG and PNG; returns the PNG for inlining."""
    drawn = {}
    for kind, how in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 130})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, **how)
        figure.set_layout_engine("none")  # once is enough, and a third of the work
        drawn[kind] = buffer.getvalue()
        with replacing(output / f"{name}.{kind}") as new:
            new.write_bytes(drawn[kind])
    return base64.b64encode(drawn["png"]).decode()


@speaking()
def main(argv: Sequence[str] | None = None) -> Path:
    """Draw, and return the path of the report."""
    parser = FlagParser(prog="figures.py", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=str, action="append", required=True, help="Run folder or JSON of evaluate.py")
    parser.add_argument("--names", type=str, nargs="+", default=[], help="Names of the runs, else those of the folders")
    parser.add_argument("--output", type=Path | None, help="Where to write, else figures/ in the first run folder")
    parser.add_argument("--results", type=Path | None, help="Directory of reproduce.py's results, for its tables")
    parser.add_argument("--data.path", type=str | None, help="Local data directory, for runs that are evaluated here")
    parser.add_argument(
        "--landscape_images",
        type=int,
        default=0,
        help="Test images of Fig. 8, for runs that are evaluated here; hundreds of passes over each, so none by itself",
    )
    args = parser.parse_args(argv)
    paths = [Path(path) for path in args.run]
    names = args.names or [path.stem if path.suffix == ".json" else path.resolve().name for path in paths]
    if len(names) != len(paths):
        parser.error(f"{len(names)} names for {len(paths)} runs")
    if args.output and args.output.suffix == ".html":
        parser.error(f"--output names a folder, which gets the report and its figures, not {args.output}")
    if len(set(names)) != len(names):
        parser.error(f"the runs need different names; give them with --names (now {', '.join(names)})")
    try:
        tables = read_tables(args.results)
        check_comparable(
            {
                name: read_results(file, {"class_names": list, "class_counts": list})
                for name, path in zip(names, paths, strict=True)
                if (file := RunFolder(path).results_file).is_file()
            },
            ("class_names", "class_counts"),
        )
        runs = {n: read_evidence(p, args.data.path, args.landscape_images) for n, p in zip(names, paths, strict=True)}
        first = runs[names[0]].evaluation
        check_comparable(
            {name: evidence.evaluation for name, evidence in runs.items()},
            ("class_names", "class_counts", "test_images"),
        )
        output = args.output or (paths[0] if paths[0].is_dir() else paths[0].parent) / "figures"
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    class_names = [printable(name) for name in first["class_names"]]
    run_names = [printable(name) for name in names]
    with fonts_for([*class_names, *run_names]) as lost:
        shown = short_names(drawable(run_names, lost, "run"), 30)
        renamed = dict(zip(shown, runs.values(), strict=True))
        figures = draw_all(renamed, tables, drawable(class_names, lost))
        with refusing():
            drawings = [
                {
                    **{"name": name, "title": TEXTS[name][0], "caption": TEXTS[name][1]},
                    **{"png": save(name, figure, output), "width": round(96 * figure.get_figwidth())},
                }
                for name, figure in figures.items()
            ]
    absent = {title: why for name, (title, _, why) in TEXTS.items() if name not in figures}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        names=names,
        evaluation=first,
        failures={name: found for name, evidence in runs.items() if (found := failures(evidence))},
        drawings=drawings,
        absent=absent,
        run_table=run_rows(runs),
        score_table=score_rows(runs),
        tables={
            name: [[TITLES.get(key, key) for key in rows[0]], *(list(row.values()) for row in rows)]
            for name, rows in tables.items()
            if rows
        },
        recipes={n: yaml.safe_dump(e.results["recipe"], sort_keys=False) for n, e in runs.items() if e.results},
        origins={n: {key: e.evaluation[key] for key in ("commit", "versions", "machine")} for n, e in runs.items()},
    )
    report = output / "report.html"
    with refusing():
        write_atomically(report, html)
    for name in figures:
        print(f"{output / name}.png")
    if lost:
        some = "".join(sorted(lost)[:10])
        print(
            f"no font of this machine has {len(lost)} characters of the names ({some}): figures show numbers instead "
            "of these names, the report has them; fonts such as Noto Sans CJK have most"
        )
    for title, why in absent.items():
        print(f"not drawn: {title}: {why}")
    print(report)
    return report


if __name__ == "__main__":
    main()
