"""Figures with a run as the unit: loss terms, Fig. 4, 5, 8 and 9, and what the class prior does."""

from collections.abc import Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ecl_hf.evidence.plots.style import COLOURS, Runs, make_panels, shared_legend, short, styled
from ecl_hf.names import printable

MOST_TERMS, MOST_POINTS = 16, 2000
"""Panels with a loss term, and points of a curve in them."""


@styled
def plot_training(runs: Runs) -> Figure:
    """Each loss term over the epochs.

    Args:
        runs: name -> lines of `metrics.jsonl`; what no log of a training holds is left out, or cut short.
    """
    apart = {"epoch", "step", "lr", "images_per_second"}
    terms = list(
        dict.fromkeys(
            key for lines in runs.values() for line in lines for key in line
            if key not in apart and _is_number(line[key])
        )
    )[:MOST_TERMS] or ["loss"]  # fmt: skip
    figure, panels = make_panels(len(terms), height=2.5)
    for term, axes in zip(terms, panels, strict=True):
        for colour, (name, lines) in zip(cycle(COLOURS), runs.items(), strict=False):
            points = [(line["epoch"], line.get(term)) for line in lines]
            points = [point for point in points if all(map(_is_number, point))]
            points = points[:: len(points) // MOST_POINTS + 1]
            marker = "o" if len(points) == 1 else None  # a line through a single point is none
            axes.plot(*zip(*points, strict=True) if points else ([], []), color=colour, label=name, marker=marker)
        axes.set_title(short(printable(term).encode("ascii", "replace").decode(), 40))
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    shared_legend(figure, panels[0], len(runs))
    return figure


def _is_number(value: Any) -> bool:
    """Whether a value can be drawn."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def _with_errors(axes: Axes, points: Sequence[dict[str, Any]], x: str, score: str) -> None:
    """Mean and standard deviation of a score, for the ensemble and for one expert."""
    for colour, model in zip(cycle(COLOURS), dict.fromkeys(point["model"] for point in points), strict=False):
        mine = [point for point in points if point["model"] == model and point[score] is not None]
        columns = ([point[key] for point in mine] for key in (x, score, f"{score}_std"))
        places, means, deviations = columns
        errors = [deviation or 0 for deviation in deviations]
        axes.errorbar(places, means, errors, marker="o", markersize=4, capsize=3, color=colour, label=model)


@styled
def plot_expert_number(points: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy against the number of experts (Fig. 4).

    Args:
        points: `experts`, `model` ("ensemble", "one expert (mean)"), `top1`, `few` (None without such classes) and
            their standard deviations `top1_std`, `few_std`, in %.
    """
    scores = [score for score in ("top1", "few") if any(point[score] is not None for point in points)]
    figure, panels = make_panels(len(scores))
    for axes, score in zip(panels, scores, strict=True):
        _with_errors(axes, points, "experts", score)
        axes.set_title({"top1": "top-1 in %", "few": "few-shot accuracy in %"}[score])
        axes.set_xlabel("experts K")
        axes.set_xticks(sorted({point["experts"] for point in points}))
    shared_legend(figure, panels[0], 2)
    return figure


@styled
def plot_loss_weights(points: Sequence[dict[str, Any]]) -> Figure:
    """Top-1 against alpha and beta of Eq. 11 (Fig. 5).

    Args:
        points: `swept` ("alpha" or "beta"), its `value`, `model`, `top1` and `top1_std`, in %.
    """
    swept = list(dict.fromkeys(point["swept"] for point in points))
    figure, panels = make_panels(len(swept), sharey=True)
    for axes, name in zip(panels, swept, strict=True):
        _with_errors(axes, [point for point in points if point["swept"] == name], "value", "top1")
        axes.set_xlabel({"alpha": "α (distillation)", "beta": "β (contrast)"}[name])  # noqa: RUF001 (alpha it is)
        axes.set_title("top-1 in %")
    shared_legend(figure, panels[0], 2)
    return figure


@styled
def plot_methods(points: Sequence[dict[str, Any]]) -> Figure:
    """Few-shot against many-shot accuracy, a point with its deviations for each method.

    Methods that no other one is at least as good as in both are drawn in colour. Names of equal points stand in one
    line.

    Args:
        points: `method`, and in % `many` and `few` with their standard deviations `many_std`, `few_std` (None for one
            seed).
    """
    figure, (axes,) = make_panels(1, width=8.0, height=6.4)
    names: dict[tuple[float, float], list[str]] = {}
    for point in points:
        ahead = [other for other in points if other["many"] >= point["many"] and other["few"] >= point["few"]]
        best = all((other["many"], other["few"]) == (point["many"], point["few"]) for other in ahead)
        place, colour = (point["many"], point["few"]), COLOURS[0] if best else "#7F7F7F"
        errors = (point["few_std"] or 0, point["many_std"] or 0)
        axes.errorbar(*place, *errors, marker="o", markersize=4, elinewidth=0.6, color=colour)
        names.setdefault(place, []).append(point["method"])
    axes.set_xlabel("accuracy of many-shot classes in %")
    axes.set_ylabel("accuracy of few-shot classes in %")
    figure.draw_without_rendering()  # now the layout is known
    _name_points(axes, {place: ", ".join(methods) for place, methods in names.items()})
    return figure


def _name_points(axes: Axes, names: dict[tuple[float, float], str]) -> None:
    """Write a name beside each point, with a line to it, where it covers neither points nor other names.

    Args:
        axes: whose limits and place in the figure will not change.
        names: of the points, by their coordinates.
    """
    covered = [Bbox.from_bounds(*(axes.transData.transform(place) - 4), 8, 8) for place in names]
    directions = ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
    for place, name in names.items():
        text = axes.annotate(name, place, (0, 0), textcoords="offset points", va="center", fontsize=7)
        for far, (x, y) in product((5, 10, 16, 24, 36, 54, 80, 120), directions):
            text.set(position=(far * x, far * y), horizontalalignment="left" if x > 0 else "right")
            box = text.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not box.count_overlaps(covered):
                break
        covered.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#7F7F7F", "shrinkA": 0, "shrinkB": 2}
        axes.annotate("", place, text.get_position(), textcoords="offset points", arrowprops=line)


@styled
def plot_landscape(runs: Runs) -> Figure:
    """Loss and accuracy along random filter-normalised directions (Fig. 8), a column for each run.

    Args:
        runs: name -> (magnitudes [M], loss [S, M], accuracy [S, M]).
    """
    figure = Figure(figsize=(max(3.6 * len(runs), 4.4), 5.2), layout="constrained")
    grid = figure.subplots(2, len(runs), squeeze=False, sharex=True, sharey="row")
    for column, (name, (magnitudes, loss, accuracy)) in zip(grid.T, runs.items(), strict=True):
        for axes, curves, colour in ((column[0], loss, COLOURS[0]), (column[1], 100 * accuracy, COLOURS[1])):
            axes.plot(magnitudes, curves.T, color=colour, alpha=0.45, linewidth=1)
            axes.plot(magnitudes, curves.mean(0), color=colour, linewidth=2.2)
        column[0].set_title(name)
        column[1].set_xlabel("magnitude of the perturbation")
        column[1].locator_params(axis="x", nbins=4)
    top = max(min(1.05 * np.max(loss), 2 * np.min(loss) + 4) for _, loss, _ in runs.values())
    grid[0, 0].set_ylim(0, top)
    grid[1, 0].set_ylim(bottom=0)
    grid[0, 0].set_ylabel("cross-entropy")
    grid[1, 0].set_ylabel("accuracy in %")
    return figure


@styled
def plot_reliability(runs: Runs, errors: dict[str, float]) -> Figure:
    """Reliability diagrams (Fig. 9): accuracy and confidence of each bin, a panel for each run.

    Args:
        runs: name -> `reliability_table`.
        errors: name -> expected calibration error in 0..1.
    """
    figure, panels = make_panels(len(runs), height=3.6, sharey=True)
    for axes, (name, table) in zip(panels, runs.items(), strict=True):
        bins = len(table["share"])
        centres = (np.arange(bins) + 0.5) / bins
        accuracy, confidence = (
            np.array([np.nan if value is None else value for value in table[key]]) for key in ("accuracy", "confidence")
        )
        axes.bar(centres, accuracy, 1 / bins, color=COLOURS[0], edgecolor="white", label="accuracy")
        gaps = (("too confident", confidence - accuracy, "#F2C3A4", accuracy),)
        gaps += (("too modest", accuracy - confidence, "#A9D1EA", confidence),)
        for label, gap, colour, bottom in gaps:
            axes.bar(centres, gap.clip(min=0), 1 / bins, bottom=bottom, color=colour, edgecolor="white", label=label)
        axes.plot(centres, table["share"], color="#333333", marker=".", linewidth=1, label="share of the images")
        axes.plot([0, 1], [0, 1], color="#C00000", linestyle="--", linewidth=1.2, label="calibrated")
        axes.set_title(f"{name}\nECE {100 * errors[name]:.1f} %")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", aspect="equal")
    panels[0].set_ylabel("accuracy")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(runs) == 1 else 3)
    return figure


@styled
def plot_posthoc(runs: Runs) -> Figure:
    """Top-1 after post-hoc logit adjustment over tau (Eq. 4): ensembles thick, experts thin.

    Args:
        runs: name -> (`posthoc_accuracy`, tau that theory has for the model; None for no such line).
    """
    figure, (axes,) = make_panels(1, width=6.0, height=3.6)
    for colour, (name, (curves, theory)) in zip(cycle(COLOURS), runs.items(), strict=False):
        for expert in curves["experts"]:
            axes.plot(curves["taus"], 100 * np.array(expert), color=colour, alpha=0.35, linewidth=0.9)
        axes.plot(curves["taus"], 100 * np.array(curves["ensemble"]), color=colour, label=name)
        if theory is not None:
            axes.axvline(theory, color=colour, linestyle=":", linewidth=1.2)
    axes.set_xlabel("τ")
    axes.set_ylabel("top-1 in %")
    shared_legend(figure, axes, len(runs))
    return figure


@styled
def plot_shifted(runs: Runs) -> Figure:
    """Top-1 under shifted test distributions, with (full) and without (dashed) the target prior.

    Args:
        runs: name -> `shifted_accuracy`.
    """
    figure, (axes,) = make_panels(1, width=6.4, height=3.8)
    for colour, (name, rows) in zip(cycle(COLOURS), runs.items(), strict=False):
        axes.plot([100 * row["top1"] for row in rows], "--", color=colour, linewidth=1.2, label=f"{name}, as it is")
        informed = [100 * row["top1_target_prior"] for row in rows]
        axes.plot(informed, marker="o", markersize=4, color=colour, label=f"{name}, target prior")
        labels = ["uniform" if row["direction"] == "uniform" else f"{row['factor']:g}" for row in rows]
        axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("forward  ←  imbalance factor of the test set  →  backward")
    axes.set_ylabel("top-1 in %")
    shared_legend(figure, axes, 2)
    return figure
