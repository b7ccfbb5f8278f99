"""From a data set on the Hub or on disk to a long-tailed training split and a balanced test split."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ecl_hf.longtail import exponential_counts, longtail_indices, pareto_counts
from ecl_hf.recipe import DataConfig


@dataclass(frozen=True)
class LongTailedData:
    """A long-tailed training split and its test split, as columns `image` and `label`.

    Attributes:
        train: the pictures that the protocol keeps, in source order.
        test: all pictures of the test split.
        class_counts: training images of each class, [C].
        class_names: in label order, [C].
    """

    train: datasets.Dataset
    test: datasets.Dataset
    class_counts: list[int]
    class_names: list[str]


def load_longtailed(config: DataConfig) -> LongTailedData:
    """Load a data set, check it, and cut its training split to the long-tailed profile.

    Raises:
        FileNotFoundError: the path does not exist or holds no data set.
        ValueError: a split or column is missing or ambiguous, a label lies outside the classes, or a class has too few
            images for the profile; the message names it.
    """
    name = config.path or config.source
    splits = _digits() if config.path is None and name == "digits" else _load_splits(config, name)
    image_column, label_column = _columns(splits["train"], config, name)
    train, test = (split.select_columns([image_column, label_column]) for split in splits.values())
    train, test = (s.rename_columns({image_column: "image", label_column: "label"}) for s in (train, test))

    class_names = _class_names(train)
    for split_name, split in ((config.train_split, train), (config.test_split, test)):
        _check_labels(split["label"][:], class_names, f"{name}, split {split_name}, column {label_column}")
    labels = np.asarray(train["label"][:])
    available = np.bincount(labels, minlength=len(class_names))
    if empty := [class_names[c] for c in np.flatnonzero(available == 0)]:
        raise ValueError(f"{name} has no training image of {len(empty)} classes: {', '.join(empty[:10])}")
    counts = _class_counts(config, available)
    if config.profile != "as_is":
        if short := [c for c in range(len(counts)) if available[c] < counts[c]]:
            worst = ", ".join(f"{class_names[c]} ({available[c]} of {counts[c]})" for c in short[:10])
            raise ValueError(f"{name} has too few images of {len(short)} classes: {worst}; lower data.max_count")
        train = train.select(np.sort(longtail_indices(labels, counts, config.split_seed)))
    return LongTailedData(train, test, counts, class_names)


def _class_counts(config: DataConfig, available: np.ndarray) -> list[int]:
    max_count = config.max_count or int(available.min())
    if config.profile == "exponential":
        return exponential_counts(len(available), max_count, config.imbalance_factor)
    if config.profile == "pareto":
        return pareto_counts(len(available), max_count, max(1, round(max_count / config.imbalance_factor)))
    return available.tolist()


def _load_splits(config: DataConfig, name: str) -> dict[str, datasets.Dataset]:
    if config.path is not None:
        if not Path(config.path).is_dir():
            raise FileNotFoundError(f"data.path {config.path} is not a directory")
        if not any(Path(config.path).iterdir()):
            raise FileNotFoundError(f"data.path {config.path} is empty")
    try:
        loaded = datasets.load_dataset(str(Path(name).resolve()) if config.path else name)
    except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError, ConnectionError) as e:
        raise FileNotFoundError(f"can't load the data set {name}: {e}") from e
    except (datasets.exceptions.DatasetsError, RuntimeError, ValueError) as e:  # scripts, damaged or empty files
        raise ValueError(f"can't read the data set {name}: {e.__cause__ or e}") from e
    for field, split in (("train_split", config.train_split), ("test_split", config.test_split)):
        if split not in loaded:
            raise ValueError(f"{name} has no split {split!r} (data.{field}); it has {', '.join(loaded)}")
    return {"train": loaded[config.train_split], "test": loaded[config.test_split]}


def _digits() -> dict[str, datasets.Dataset]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; 40 of each class, chosen once, are the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ValueError("the digits need scikit-learn: pip install 'ecl-hf[digits]'") from e
    digits = load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)
    test = np.sort(longtail_indices(digits.target, [40] * 10))
    train = np.setdiff1d(np.arange(len(pictures)), test)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(c) for c in range(10)])}
    )
    return {
        name: datasets.Dataset.from_dict({"image": list(pictures[rows]), "label": digits.target[rows]}, features)
        for name, rows in (("train", train), ("test", test))
    }


def _columns(dataset: datasets.Dataset, config: DataConfig, name: str) -> tuple[str, str]:
    """Names of the image and label columns: as configured, else by their types."""
    features = dataset.features

    def choose(configured: str | None, kind: type, what: str) -> str:
        if configured is not None:
            if configured not in features:
                raise ValueError(f"{name} has no column {configured!r} ({what}); it has {', '.join(features)}")
            return configured
        found = [column for column, feature in features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            seen = ", ".join(found) or "none"
            raise ValueError(f"{name}: set {what}; columns that could be it: {seen}; all: {', '.join(features)}")
        return found[0]

    image = choose(config.image_column, datasets.Image, "data.image_column")
    label = choose(config.label_column, datasets.ClassLabel, "data.label_column")
    if not isinstance(features[image], datasets.Image):
        raise ValueError(f"column {image!r} of {name} (data.image_column) holds {features[image]}, not images")
    feature = features[label]
    integer = isinstance(feature, datasets.Value) and "int" in feature.dtype
    if not isinstance(feature, datasets.ClassLabel) and not integer:
        raise ValueError(f"column {label!r} of {name} (data.label_column) holds {feature}, not class labels")
    return image, label


def _class_names(dataset: datasets.Dataset) -> list[str]:
    """As stored; plain integers are their own names."""
    feature = dataset.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    largest = max((label for label in dataset["label"][:] if label is not None), default=-1)
    return [str(c) for c in range(min(largest + 1, len(dataset)))]  # more classes than images can't be


def _check_labels(labels: list[int | None], class_names: list[str], where: str) -> None:
    wrong = [row for row, label in enumerate(labels) if label is None or not 0 <= label < len(class_names)]
    if wrong:
        row, last = wrong[0], len(class_names) - 1
        raise ValueError(f"{where}: row {row} has label {labels[row]}, outside 0..{last} ({len(wrong)} such rows)")
    if not labels:
        raise ValueError(f"{where}: no images")
