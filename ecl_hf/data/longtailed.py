"""From a data set on the Hub or on disk to a long-tailed training split and a test split."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtail import (
    exponential_counts,
    held_out_counts,
    held_out_groups,
    longtail_indices,
    pareto_counts,
    validation_counts,
)
from ecl_hf.data.official import BENCHMARKS, check_cifar, load_official
from ecl_hf.data.sources import Source, labels_of, read_source
from ecl_hf.data.splits import Split, pictures_of
from ecl_hf.data.streaming import open_streams
from ecl_hf.names import listed

FEW = 5
"""Classes with fewer training images than this are named in a warning, where no protocol asked for them."""


@dataclass(frozen=True)
class LongTailedData:
    """A long-tailed training split and its test split, as columns `image` and `label`.

    Attributes:
        train: the pictures that the protocol keeps, in source order; a stream if they are not to be stored.
        test: all pictures of the test split, or those that were held out.
        val: pictures held out of the training split for validation; None without `val_fraction`.
        class_counts: training images of each class, [C].
        class_names: in label order, [C].
        folders: where its picture files lie (`Source`).
        groups: which training pictures belong together, whole numbers, [N]; None without `group_column`.
    """

    train: datasets.Dataset | datasets.IterableDataset
    test: datasets.Dataset
    class_counts: list[int]
    class_names: list[str]
    val: datasets.Dataset | None = None
    folders: tuple[Path, ...] = ()
    groups: np.ndarray | None = None


def load_longtailed(config: DataConfig) -> LongTailedData:
    """Load a data set, check it, and cut its training split to the long-tailed profile.

    Raises:
        FileNotFoundError: the path does not exist or holds no data set.
        ValueError: a split or column is missing or ambiguous, a label lies outside the classes, a class has too few
            images for the profile or not as many as the published benchmark, or the split that was named is another
            one; the message names it.
    """
    if config.streaming:
        if config.source in BENCHMARKS:
            raise ValueError(f"data.streaming does not read the list of {config.source}: build a split first")
        return LongTailedData(*open_streams(config), folders=(Path(config.path),) if config.path else ())
    source = load_source(config)
    if config.split is None:
        rows = choose_rows(config, source)
    else:
        split = Split.read(config.split)
        split.check(config, source)
        rows = split.rows()
    train, test = (_take(pictures_of(source, part), rows[part]) for part in ("train", "test"))
    classes, val = len(source.class_names), None
    groups = None if source.groups is None else source.groups[rows["train"]]
    if config.val_fraction is not None:
        labels = labels_of(train)
        available = np.bincount(labels, minlength=classes)
        counts = validation_counts(available, config.val_fraction)
        if not counts.any():
            raise ValueError("data.val_fraction: no class has the three pictures that it needs for one to validate")
        if groups is None:
            held_out = np.sort(longtail_indices(labels, counts, config.split_seed))
        else:
            held_out = hold_out_groups(config, labels, groups, counts, np.minimum(available, 2))
        kept = np.setdiff1d(np.arange(len(labels)), held_out)
        train, val, groups = train.select(kept), train.select(held_out), None if groups is None else groups[kept]
    counts = np.bincount(labels_of(train), minlength=classes).tolist()
    return LongTailedData(train, test, counts, source.class_names, val, source.folders, groups)


def load_source(config: DataConfig) -> Source:
    """All pictures that a configuration may choose from, checked against published counts where there are any."""
    if config.source in BENCHMARKS:
        return load_official(BENCHMARKS[config.source], config)
    source = read_source(config)
    if config.profile == "exponential" and config.max_count is None and config.test_fraction is None:
        check_cifar(source)
    return source


def choose_rows(config: DataConfig, source: Source) -> dict[str, np.ndarray]:
    """Apply the protocol of a configuration: hold out test pictures, then cut the others to the profile.

    A class with a single image keeps it for training and has no test image, with a warning.

    Returns:
        "train" and "test": ascending positions in the source's training and test pictures; where it has no test
        pictures, both are positions in the training pictures.

    Raises:
        ValueError: a class has no image, or too few for the profile.
    """
    names, name = source.class_names, source.name
    labels = labels_of(source.train)
    available = np.bincount(labels, minlength=len(names))
    if empty := [names[c] for c in np.flatnonzero(available == 0)]:
        raise ValueError(f"{name} has no training image of {len(empty)} classes: {listed(empty)}; fill or remove them")
    rows = np.arange(len(labels))
    if source.test is None:
        wanted = held_out_counts(available, config.test_fraction)
        if source.groups is None:
            rows = np.sort(longtail_indices(labels, available - wanted, config.split_seed))
        else:
            rows = np.setdiff1d(rows, hold_out_groups(config, labels, source.groups, wanted, np.minimum(available, 1)))
        test = np.setdiff1d(np.arange(len(labels)), rows)
        available, tested = np.bincount(labels[rows], minlength=len(names)), labels[test]
    else:
        test, tested = np.arange(len(source.test)), labels_of(source.test)
    if untested := [names[c] for c in np.flatnonzero(np.bincount(tested, minlength=len(names)) == 0)]:
        warnings.warn(f"{name} has no test image of {len(untested)} classes: {listed(untested)}", stacklevel=2)
    if config.profile == "as_is":
        few = [f"{names[c]} ({available[c]})" for c in np.flatnonzero(available < FEW)]
        if few and not source.published:
            warnings.warn(
                f"{name} has fewer than {FEW} training images of {len(few)} classes: {listed(few)}", stacklevel=2
            )
        return {"train": rows, "test": test}
    counts = _class_counts(config, available)
    if short := [c for c in range(len(counts)) if available[c] < counts[c]]:
        worst = listed([f"{names[c]} ({available[c]} of {counts[c]})" for c in short])
        raise ValueError(f"{name} has too few images of {len(short)} classes: {worst}; lower data.max_count")
    chosen = np.sort(longtail_indices(labels[rows], counts, config.split_seed))
    return {"train": rows[chosen], "test": test}


def hold_out_groups(
    config: DataConfig, labels: np.ndarray, groups: np.ndarray, wanted: np.ndarray, least: np.ndarray
) -> np.ndarray:
    """`held_out_groups`; ValueError if no group can go, because too few pictures of a class would stay."""
    held_out = held_out_groups(labels, groups, wanted, least, config.split_seed)
    if not len(held_out):
        raise ValueError(
            f"data.group_column {config.group_column}: {len(np.unique(groups))} groups are too few; none can be held "
            "out, since each has all or nearly all pictures of a class"
        )
    return held_out


def _take(pictures: datasets.Dataset, rows: np.ndarray) -> datasets.Dataset:
    """The pictures at these positions; all of them as they are."""
    return pictures if len(rows) == len(pictures) else pictures.select(rows)


def _class_counts(config: DataConfig, available: np.ndarray) -> list[int]:
    max_count = config.max_count or int(available.min())
    if config.profile == "exponential":
        return exponential_counts(len(available), max_count, config.imbalance_factor)
    return pareto_counts(len(available), max_count, max(1, round(max_count / config.imbalance_factor)))
