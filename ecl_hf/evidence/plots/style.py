"""One style for all figures, and what they share."""

import unicodedata
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecl_hf.evidence.analysis import class_ranking
from ecl_hf.evidence.metrics import shot_groups

Runs = dict[str, Any]
"""What is drawn of each run, by its name."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
GROUP_COLOURS = {"many": "#0072B2", "medium": "#E69F00", "few": "#D55E00"}
NAMED_CLASSES = 20
"""Up to so many classes are written out, and drawn one by one."""

LABEL = 18
"""Columns of text, each as wide as a Latin letter, that a class name or a run's name may take."""

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # a name with two dollars is no formula
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "ecl_hf",  # the same picture is the same file
}
styled = matplotlib.rc_context(STYLE)


def columns_of(text: str) -> int:
    """Width of a text in Latin letters: a Chinese character takes two, what is written over another one none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def short(name: str, most: int = LABEL) -> str:
    """A name that fits; a longer one loses its middle. Also what a legend would leave out is kept."""
    name = f" {name}" if name.startswith("_") else name
    if columns_of(name) <= most:
        return name
    head, tail = name[:most], name[-most:]
    while columns_of(head) > most - most // 2 - 1:
        head = head[:-1]
    while columns_of(tail) > most // 2:
        tail = tail[1:]
    return f"{head}…{tail}"


def short_names(names: Sequence[str], most: int = LABEL) -> list[str]:
    """Names that fit and differ: where two become the same, their positions stand in front."""
    cut = [short(name, most) for name in names]
    return [
        name if cut.count(name) == 1 else short(f"{place}: {names[place]}", most + 4) for place, name in enumerate(cut)
    ]


def make_panels(
    how_many: int, width: float = 3.6, height: float = 3.1, columns: int = 3, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, in rows of `columns`."""
    columns = min(columns, how_many)
    rows = -(-how_many // columns)
    figure = Figure(figsize=(max(width * columns, 4.4), height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for unused in grid.flat[how_many:]:
        unused.remove()
    return figure, list(grid.flat[:how_many])


def shared_legend(figure: Figure, axes: Axes, how_many: int) -> None:
    """One legend for all panels, below them, as wide as the figure allows; a single run needs none."""
    if how_many > 1:
        handles, labels = axes.get_legend_handles_labels()
        legend_below(figure, handles, labels)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **look: Any) -> None:
    """A legend below the panels, which keep their size: the figure grows by what does not fit into a row."""
    inches = 0.085 * max(map(columns_of, labels)) + 0.6
    columns = max(1, min(len(labels), int(figure.get_figwidth() / inches)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **look)


def mark_classes(axes: Axes, class_counts: Sequence[int], class_names: Sequence[str]) -> None:
    """Names of few classes, or ranks of many with the borders of the shot groups."""
    ranking = class_ranking(class_counts)
    if len(ranking) <= NAMED_CLASSES:
        names = short_names(class_names)
        axes.set_xticks(
            range(len(ranking)), [names[c] for c in ranking], rotation=45, ha="right", rotation_mode="anchor"
        )
        axes.set_xlabel("class, from many to few training images")
        return
    axes.set_xlabel("class rank, from many to few training images")
    sizes = [int(mask.sum()) for mask in shot_groups(class_counts).values()]
    for border in {sum(sizes[:1]), sum(sizes[:2])} - {0, len(ranking)}:
        axes.axvline(border - 0.5, color="#999999", linestyle=":", linewidth=1)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean, [C] -> [C], over fewer values at the ends; NaNs have no part."""
    known, total = np.isfinite(values), np.nan_to_num(values)
    kernel = np.ones(window)
    count = np.convolve(known, kernel, "same")
    with np.errstate(invalid="ignore"):
        return np.where(count > 0.5, np.convolve(total, kernel, "same") / count, np.nan)


def draw_by_class(axes: Axes, runs: Runs, class_counts: Sequence[int]) -> None:
    """A value for each class and run: connected points for few classes, faint ones and their running mean for many."""
    ranking = class_ranking(class_counts)
    many = len(ranking) > NAMED_CLASSES
    for colour, (name, values) in zip(cycle(COLOURS), runs.items(), strict=False):
        ordered = np.asarray(values, dtype=float)[ranking]
        if not many:
            axes.plot(ordered, marker="o", markersize=4, color=colour, label=name)
            continue
        size = 8 if len(ranking) <= 200 else 2
        axes.scatter(range(len(ranking)), ordered, s=size, color=colour, alpha=0.3, linewidths=0, rasterized=True)
        axes.plot(smooth(ordered, max(3, len(ranking) // 15)), color=colour, label=name)
