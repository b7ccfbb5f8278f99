"""Picture files as data sets, and trees of class folders."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torchvision.datasets.folder import make_dataset

from ecl_hf.recipe import DataConfig

TABLES = ("*.parquet", "*.arrow", "*.zip", "*.tar", "*.tar.gz", "*.tgz", "metadata.csv", "metadata.jsonl")
"""Files whose presence says that a directory is no bare tree of class folders."""


def pictures(files: Sequence[str], labels: np.ndarray, class_names: Sequence[str]) -> datasets.Dataset:
    """Picture files as a data set; nothing is opened, and a picture takes the length of its path in memory."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(class_names))})
    paths = pa.array(files, pa.string())
    image = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())}).cast(features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=features))


def is_class_folders(root: Path) -> bool:
    """Whether a directory is a bare tree of class folders, which needs no table to say what the classes are."""
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return bool(folders) and not any(next(place.glob(kind), None) for place in (root, *folders) for kind in TABLES)


def read_class_folders(root: Path, config: DataConfig) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read ROOT/<split>/<class>/..., or ROOT/<class>/... where a part of each class is held out for testing.

    The folder below the split is the class, at whatever depth the pictures lie in it. Classes and pictures are sorted
    by name. Hidden files and folders are left out; what is no picture by its suffix is left out with a warning.

    Returns:
        "train" and, unless `test_fraction` is set, "test"; the class names.
    """
    parts = {"train": root / config.train_split, "test": root / config.test_split}
    if config.test_fraction is not None:
        parts = {"train": parts["train"] if _holds_classes(parts["train"]) else root}
    ignored = Counter()
    files = {}
    class_names = sorted({name for part in parts.values() for name in _folders(part)})
    for key, part in parts.items():

        def is_picture(file: str, part: Path = part) -> bool:
            path = Path(file)
            if any(name.startswith(".") for name in path.relative_to(part).parts):
                return False
            known = path.suffix.lower() in ImageFolder.EXTENSIONS
            ignored.update([] if known else [path.suffix or path.name])
            return known

        there = set(_folders(part))
        numbers = {name: c for c, name in enumerate(class_names) if name in there}
        files[key] = make_dataset(part, numbers, is_valid_file=is_picture, allow_empty=True) if numbers else []
    if not any(files.values()):
        raise FileNotFoundError(
            f"data.path {root} has no pictures in {' and '.join(str(part) for part in parts.values())}"
        )
    for key, part in parts.items():
        if not files[key]:
            there = ", ".join(_folders(root)[:10])
            raise ValueError(
                f"{root} has no split {part.name!r} (data.{key}_split); it has {there}; "
                "data.test_fraction cuts a test split from the training pictures"
            )
    if ignored:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in ignored.most_common(5))
        warnings.warn(f"{root}: {ignored.total()} files are no pictures by their suffix: {kinds}", stacklevel=2)
    splits = {}
    for key, found in files.items():
        paths, labels = zip(*found, strict=True)
        splits[key] = pictures(paths, np.array(labels), class_names)
    return splits, class_names


def _holds_classes(path: Path) -> bool:
    """Whether a folder is a split, and not a class that is called like one."""
    return bool(_folders(path)) and not any(p.suffix.lower() in ImageFolder.EXTENSIONS for p in path.glob("[!.]*.*"))


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
