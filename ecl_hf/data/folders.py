"""Picture files as data sets, and trees of class folders."""

import functools
import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ecl_hf.data.config import DataConfig
from ecl_hf.data.pictures import FORMATS
from ecl_hf.files import opening
from ecl_hf.names import listed, printable

PICTURES = frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS)
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation"})
TABLES = (".parquet", ".arrow", "metadata.csv", "metadata.jsonl")
"""Endings of files that say themselves what the classes are."""

LISTS = (".csv", ".tsv", ".jsonl", ".xlsx")
"""Endings of files that could be meant as tables of the classes, and are none by their names."""

ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
"""Endings of files in which pictures may lie that are not seen here."""

TEXTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".md", ".yaml", ".xml")
"""Endings of files that `datasets` reads whole."""

MAX_TABLE = 1 << 29
"""Bytes of such a file: a line for each of five million pictures."""


def find_pictures(names: Sequence[str]) -> list[Path]:
    """Picture files: those that are named, all in the folders that are named and below, and what a glob finds.

    What is hidden is left out. Neither folders nor `**` go through links, which may lead upwards; a picture that is
    found again through a folder that is a link counts once.

    Raises:
        FileNotFoundError: a name stands for nothing.
    """
    found: dict[tuple[str, str], Path] = {}
    real = functools.cache(os.path.realpath)
    for name in names:
        if Path(name).is_dir():
            files = (Path(place) / file for place, inside in walk(name) for file in inside if _suffix(file) in PICTURES)
        else:
            files = map(Path, [name] if Path(name).is_file() else _matches(name))
        new = [path for path in sorted(files) if path.is_file()]
        if not new:
            raise FileNotFoundError(f"{name} is no picture, and no folder or pattern with pictures")
        for path in new:
            found.setdefault((real(path.parent), path.name), path)
    return list(found.values())


def walk(root: str | Path, links: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A folder, and those below it in no order, each with the names in it that are no folders; nothing hidden.

    Args:
        root: where to begin.
        links: whether to go into folders that are links.
    """
    waiting = [str(root)]
    while waiting:  # unlike os.walk of older Pythons, which a tree of a thousand folders in each other ends
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                inside = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:  # may not be read, or is too deep for a path
            continue
        folders = {entry.name for entry in inside if _is_folder(entry)}
        yield place, [entry.name for entry in inside if entry.name not in folders]
        waiting += [entry.path for entry in inside if entry.name in folders and (links or not entry.is_symlink())]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _matches(pattern: str) -> Iterator[str]:
    """What a glob finds, where `**` goes through no links."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.iglob(pattern)  # noqa: PTH207 (it may be absolute)
        return
    first = parts.index("**")
    rest = [*dropwhile("**".__eq__, parts[first:])] or ["*"]
    for root in glob.iglob(os.path.join("", *parts[:first]) or "."):  # noqa: PTH118, PTH207
        for place, _ in walk(root):
            yield from _matches(os.path.join(glob.escape(place), *rest))  # noqa: PTH118


def pictures(files: Sequence[str], labels: np.ndarray, class_names: Sequence[str]) -> datasets.Dataset:
    """Picture files as a data set; nothing is opened, and a picture takes the length of its path in memory."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(class_names))})
    paths = pa.array(files, pa.string())
    image = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())}).cast(features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=features))


def holds(root: Path, endings: tuple[str, ...]) -> bool:
    """Whether a directory or a folder in it has files with these endings."""
    places = [root, *(root / name for name in _folders(root))]
    names = [entry.name for place in places for entry in os.scandir(place)]
    return any(name.endswith(endings) for name in names)


def read_class_folders(root: Path, config: DataConfig) -> tuple[dict[str, datasets.Dataset], list[str]] | None:
    """Read ROOT/<split>/<class>/..., or ROOT/<class>/... where a part of each class is held out for testing.

    The folder below the split is the class, at whatever depth the pictures lie in it. Classes and pictures are sorted
    by name. Hidden files and folders are left out; what is no picture by its suffix is left out with a warning.

    Returns:
        "train" and, unless `test_fraction` is set, "test", with the class names; None if there are no such pictures,
        or tables that say more about them.

    Raises:
        ValueError: a split has no pictures, all pictures lie outside class folders, or there is a single class.
    """
    if holds(root, TABLES):
        return None
    parts = {"train": root / config.train_split, "test": root / config.test_split}
    if config.test_fraction is not None:
        parts = {"train": parts["train"] if _is_split(parts["train"]) else root}
        if parts["train"] == root and (found := _folders(root)) and SPLITS.issuperset(found):
            _refuse_loose(root, {root / config.train_split})
            raise ValueError(f"{root} has no split {config.train_split!r} (data.train_split); it has {listed(found)}")
        if parts["train"] != root and _is_split(root / config.test_split):
            warnings.warn(
                f"{root / config.test_split} is not used: data.test_fraction cuts a test split from the training "
                "pictures; --data.test_fraction null tests on the folder",
                stacklevel=2,
            )
    there = {key: _folders(part) for key, part in parts.items()}
    class_names = sorted(set().union(*there.values()))
    if strange := [name for name in class_names if not _encodable(name)]:
        raise ValueError(f"{root}: the name of the class folder {printable(strange[0])} ({strange[0]!r}) is no UTF-8")
    files, ignored, seen = {}, Counter(), Seen([*parts.values(), root])
    for key, part in parts.items():
        files[key] = []
        for c, name in enumerate(class_names):
            for file in seen.files(part / name) if name in there[key] else ():
                if (ending := _suffix(file)) in PICTURES:
                    files[key].append((file, c))
                else:
                    ignored[ending] += 1
    if not any(files.values()):
        _refuse_loose(root, {root, *parts.values()})
        return None
    for key, part in parts.items():
        if not files[key]:
            raise ValueError(
                f"{root} has no split {part.name!r} (data.{key}_split); it has {listed(_folders(root))}; "
                "data.test_fraction cuts a test split from the training pictures"
            )
    if len(class_names) == 1:
        raise ValueError(
            f"{parts['train']} has one class folder, {class_names[0]!r}: a table that names the classes must be called "
            "metadata.csv and have a column file_name"
        )
    for part in parts.values():
        if loose := _loose(part):
            warnings.warn(f"{part}: {loose} pictures lie in no class folder and are left out", stacklevel=2)
    if tables := sorted(entry.name for entry in os.scandir(root) if entry.name.lower().endswith(LISTS)):
        warnings.warn(
            f"{root}: {listed(tables)} is not read: the folders are the classes; a table that names the classes must "
            "be called metadata.csv and have a column file_name",
            stacklevel=2,
        )
    if ignored:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in ignored.most_common(5))
        warnings.warn(f"{root}: {ignored.total()} files are no pictures by their suffix: {kinds}", stacklevel=2)
    splits = {}
    for key, found in files.items():
        paths, labels = zip(*found, strict=True)
        splits[key] = pictures(paths, np.array(labels), class_names)
    return splits, class_names


class Seen:
    """Folders that were walked through, links among them. None counts twice, as it would under two classes or splits.

    Args:
        roots: folders that hold the others; they and those above them are no place to come back to.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.folders: dict[tuple[int, int], str] = {}
        for root in roots:
            for folder in (root, *root.resolve().parents):
                if folder.exists():
                    self.folders.setdefault(_identity(folder), str(folder))

    def files(self, folder: Path) -> list[str]:
        """All files below a folder, sorted folder by folder; hidden ones and hidden folders are left out.

        Raises:
            ValueError: a link leads to a folder that was seen already, or a name is no text.
        """
        found = []
        for place, names in walk(folder, links=True):
            self._enter(place)
            found.append((place, sorted(names)))
        files = [os.path.join(place, name) for place, names in sorted(found) for name in names]  # noqa: PTH118 (fast)
        if strange := [file for file in files if not _encodable(file)]:
            raise ValueError(f"the name of {printable(strange[0], 300)} ({strange[0]!r}) is no UTF-8")
        return files

    def _enter(self, place: str) -> None:
        identity = _identity(place)
        if identity in self.folders:
            raise ValueError(
                f"{place} is the same folder as {self.folders[identity]}: its pictures would count twice; remove the "
                "link"
            )
        self.folders[identity] = place


def warn_of_unlisted(root: Path, there: int) -> None:
    """Say how many pictures lie in a folder beyond the number that its tables name."""
    found = sum(_suffix(name) in PICTURES for _, names in walk(root, links=True) for name in names)
    if found > there:
        warnings.warn(
            f"{root}: {found} pictures lie in it, and its tables name {there}: the others are left out", stacklevel=2
        )


def check_tree(root: Path) -> None:
    """Refuse a tree in which others would walk for ever, or read a table that never ends; ValueError names the place.

    They themselves leave out pipes and devices, but for the one hidden file that they look at.
    """
    seen = Seen(root.resolve().parents)
    for file in seen.files(root):
        if file.endswith(TEXTS) and Path(file).is_file():
            with opening(file, MAX_TABLE):
                pass
    if (settings := root / ".huggingface.yaml").exists():
        with opening(settings, MAX_TABLE):
            pass


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116 (fast)
    return status.st_dev, status.st_ino


def _encodable(name: str) -> bool:
    """Whether a name is UTF-8 on the disk."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suffix(file: str) -> str:
    name = file.rpartition(os.sep)[2]
    return f".{name.rpartition('.')[2].lower()}" if "." in name else name


def _is_split(path: Path) -> bool:
    """Whether a folder is a split, and not a class that is called like one."""
    return bool(_folders(path)) and not _loose(path)


def _refuse_loose(root: Path, parts: set[Path]) -> None:
    if (loose := sum(map(_loose, parts))) and not holds(root, ARCHIVES):
        raise ValueError(
            f"{root}: {loose} pictures lie in no class folder: give each class a folder of its name, or write "
            f"{root / 'metadata.csv'} with the columns file_name and label, a line for each picture"
        )


def _loose(path: Path) -> int:
    """Number of pictures in a folder itself."""
    if not path.is_dir():
        return 0
    return sum(_suffix(entry.name) in PICTURES for entry in os.scandir(path) if not entry.name.startswith("."))


def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder; neither hidden ones, nor what macOS leaves in archives."""
    if not path.is_dir():
        return []
    inside = (entry.name for entry in os.scandir(path) if entry.is_dir())
    return sorted(name for name in inside if not name.startswith(".") and name != "__MACOSX")
