"""Figures with a class as the unit: class sizes and accuracies, Fig. 2, 6, 7 and 10."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ecl_hf.evidence.analysis import class_ranking, expert_pairs
from ecl_hf.evidence.metrics import shot_groups
from ecl_hf.evidence.plots.style import (
    COLOURS,
    GROUP_COLOURS,
    NAMED_CLASSES,
    Runs,
    draw_by_class,
    legend_below,
    make_panels,
    mark_classes,
    shared_legend,
    short_names,
    smooth,
    styled,
)

BLOCKS = 200
"""Larger confusion matrices are summed up to so many rows and columns."""


@styled
def plot_class_histogram(class_counts: Sequence[int], class_names: Sequence[str]) -> Figure:
    """Training images of each class, coloured by shot group."""
    figure, (axes,) = make_panels(1, width=6.4, height=3.4)
    ranking = class_ranking(class_counts)
    counts = np.asarray(class_counts)
    for group, mask in shot_groups(class_counts).items():
        places = np.flatnonzero(mask.numpy()[ranking])
        label = f"{group}: {len(places)} classes, {counts[mask.numpy()].sum():,} images"
        if len(ranking) <= 100:
            axes.bar(places, counts[ranking][places], color=GROUP_COLOURS[group])
        else:
            axes.fill_between(places, counts[ranking][places], step="mid", color=GROUP_COLOURS[group], linewidth=0)
        axes.plot([], [], "s", color=GROUP_COLOURS[group], label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(counts.min(), 1) / 2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("training images")
    axes.grid(visible=False, axis="x")
    mark_classes(axes, class_counts, class_names)
    axes.legend(loc="upper right")
    return figure


@styled
def plot_class_accuracy(runs: Runs, class_counts: Sequence[int]) -> Figure:
    """Accuracy of each class against its training images.

    Args:
        runs: name -> accuracy of each class, [C].
        class_counts: [C].
    """
    figure, (axes,) = make_panels(1, width=6.4, height=3.6)
    ranking = class_ranking(class_counts)
    counts = np.asarray(class_counts)[ranking]
    for colour, (name, accuracy) in zip(cycle(COLOURS), runs.items(), strict=False):
        values = 100 * np.asarray(accuracy)[ranking]
        many = len(ranking) > NAMED_CLASSES
        faint = {"alpha": 0.25, "s": 10, "linewidths": 0, "rasterized": True} if many else {"s": 22}
        axes.scatter(counts, values, color=colour, **faint)
        axes.plot(counts, smooth(values, len(counts) // 10) if many else values, color=colour, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 102)
    axes.set_xlabel("training images of the class")
    axes.set_ylabel("test accuracy in %")
    shared_legend(figure, axes, len(runs))
    return figure


@styled
def plot_transfer(
    values: Runs,
    weights: Runs,
    predicted: Runs,
    class_counts: Sequence[int],
    class_names: Sequence[str],
    tested: Sequence[int],
) -> Figure:
    """Transferred logit value, transfer weight and number of predictions for each class (Fig. 2).

    Args:
        values: name -> mean distilled logit of each class, [C].
        weights: name -> mean weight of Eq. 6, [C], of the runs with a reference head.
        predicted: name -> test images given each class, [C].
        class_counts: [C].
        class_names: [C].
        tested: test images of each class, the ideal numbers of predictions, [C].
    """
    parts = [("transferred logit value", values), ("transfer weight (Eq. 6)", weights)]
    parts = [part for part in [*parts, ("number of predictions", predicted)] if part[1]]
    figure, panels = make_panels(len(parts), width=4.0, height=3.6)
    order = list(dict.fromkeys([*values, *weights, *predicted]))
    for axes, (title, runs) in zip(panels, parts, strict=True):
        draw_by_class(axes, {name: runs.get(name, np.full(len(class_counts), np.nan)) for name in order}, class_counts)
        axes.set_title(title)
        mark_classes(axes, class_counts, class_names)
    panels[-1].plot(np.asarray(tested)[class_ranking(class_counts)], color="#333333", linestyle="--", linewidth=1)
    panels[-1].set_ylim(bottom=0)
    shared_legend(figure, panels[0], len(order))
    return figure


@styled
def plot_tsne(runs: Runs, class_counts: Sequence[int], class_names: Sequence[str]) -> Figure:
    """t-SNE of test features (Fig. 6), a panel for each run.

    Args:
        runs: name -> (points [n, 2], labels [n]).
        class_counts: [C].
        class_names: [C].
    """
    figure, panels = make_panels(len(runs), height=3.4)
    present = set(np.concatenate([labels for _, labels in runs.values()]).tolist())
    classes = [c for c in class_ranking(class_counts).tolist() if c in present]
    colours, names = matplotlib.colormaps["tab10"].colors, short_names(class_names, 24)
    for axes, (name, (points, labels)) in zip(panels, runs.items(), strict=True):
        for c, colour in zip(classes, colours, strict=False):
            mine = points[labels == c]
            label = f"{names[c]} ({class_counts[c]})"
            axes.scatter(*mine.T, s=7, color=colour, alpha=0.75, linewidths=0, label=label)
        axes.set_title(name)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
    legend_below(figure, *panels[0].get_legend_handles_labels(), markerscale=2, fontsize=9)
    return figure


@styled
def plot_feature_distance(runs: Runs, class_counts: Sequence[int], class_names: Sequence[str]) -> Figure:
    """Class-wise feature distance of each expert pair (Eq. 12, Fig. 7), a panel for each pair.

    Args:
        runs: name -> distances, [pairs, C]; runs with another number of experts lack some panels.
        class_counts: [C].
        class_names: [C].
    """
    experts = next(k for k in range(2, 99) if k * (k - 1) // 2 >= max(len(rows) for rows in runs.values()))
    pairs = expert_pairs(experts)
    figure, panels = make_panels(len(pairs), width=4.0, height=3.5, sharey=True)
    for pair, axes in zip(pairs, panels, strict=True):
        rows = {}
        for name, distances in runs.items():
            own = expert_pairs(next(k for k in range(2, 99) if k * (k - 1) // 2 == len(distances)))
            rows[name] = distances[own.index(pair)] if pair in own else np.full(len(class_counts), np.nan)
        draw_by_class(axes, rows, class_counts)
        axes.set_title(f"experts {pair[0]} and {pair[1]}")
        mark_classes(axes, class_counts, class_names)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("mean L2 distance of features")
    shared_legend(figure, panels[0], len(runs))
    return figure


def block_sums(matrix: np.ndarray, blocks: int = BLOCKS) -> np.ndarray:
    """A square matrix summed up to at most `blocks` rows and columns of (nearly) equal width."""
    size = len(matrix)
    if size <= blocks:
        return matrix
    starts = np.arange(blocks) * size // blocks
    return np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)


@styled
def plot_confusion(runs: Runs, class_counts: Sequence[int], class_names: Sequence[str]) -> Figure:
    """Log confusion matrices (Fig. 10): ground truth across, prediction upwards, a panel for each run.

    Args:
        runs: name -> images of each true class (row) given each class (column), [C, C].
        class_counts: [C].
        class_names: [C].
    """
    ranking = class_ranking(class_counts)
    logs = {
        name: np.log1p(block_sums(matrix[np.ix_(ranking, ranking)].astype(float)).T) for name, matrix in runs.items()
    }
    top = max(log.max() for log in logs.values())
    named = len(ranking) <= NAMED_CLASSES
    size = {"width": 5.4, "height": 4.9, "columns": 2} if named else {"width": 4.2, "height": 3.9}
    figure, panels = make_panels(len(runs), sharey=True, **size)
    for axes, (name, log) in zip(panels, logs.items(), strict=True):
        edges = (-0.5, len(ranking) - 0.5) * 2
        image = axes.imshow(log, cmap="Blues", vmin=0, vmax=top, origin="lower", extent=edges, interpolation="nearest")
        axes.set_title(name)
        axes.grid(visible=False)
        axes.set_xlabel("ground truth" if named else "ground truth, class rank")
        if named:
            names = [short_names(class_names)[c] for c in ranking]
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
    panels[0].set_ylabel("prediction" if named else "prediction, class rank")
    figure.colorbar(image, ax=panels, label="log(1 + images)", shrink=0.8)
    return figure
