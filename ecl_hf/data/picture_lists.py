"""Lists of picture files with their classes, as benchmarks publish them: lines "path label", or COCO-like JSON."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ecl_hf.files import read_object, read_text

MAX_JSON = 1 << 27
"""Bytes of a list in JSON; that of iNaturalist 2018 has 120 million, lists of lines have fewer than `MAX_TEXT`."""

DIGITS = 6
"""Of a label: no model has more classes."""


@dataclass(frozen=True)
class PictureList:
    """One list: file, paths in it, labels [N], and class names if it has them."""

    file: Path
    paths: list[str]
    labels: np.ndarray
    class_names: list[str] | None


def read_list(file: Path) -> PictureList:
    """Read lines "path label", or JSON with `images`, `annotations` and `categories`; ValueError: a wrong entry."""
    if file.suffix == ".json":
        return _read_json(file, read_object(file, MAX_JSON))
    return _read_lines(file, read_text(file))


def _read_lines(file: Path, text: str) -> PictureList:
    paths, labels = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal() or len(label) > DIGITS:
            raise ValueError(
                f"{file}, line {number}: expected a path and a label of up to {DIGITS} digits, got {line[:80]!r}"
            )
        paths.append(path.strip())
        labels.append(int(label))
    if not paths:
        raise ValueError(f"{file} lists no pictures")
    return PictureList(file, paths, np.array(labels), None)


def _read_json(file: Path, content: dict) -> PictureList:
    try:
        categories = {entry["id"]: entry["name"] for entry in content["categories"]}
        number = {category: c for c, category in enumerate(sorted(categories))}
        label = {entry["image_id"]: number[entry["category_id"]] for entry in content["annotations"]}
        paths = [entry["file_name"] for entry in content["images"]]
        labels = np.array([label[entry["id"]] for entry in content["images"]], np.int64)
        if strange := [path for path in paths if not isinstance(path, str)]:
            raise TypeError(f"a file_name of text, but {strange[0]}")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: an image, annotation or category lacks or does not know {error}") from error
    if len(content["annotations"]) != len(paths):
        raise ValueError(f"{file} has {len(content['annotations'])} annotations for {len(paths)} images")
    return PictureList(file, paths, labels, distinct([str(categories[category]) for category in sorted(categories)]))


def find_list(root: Path | None, given: str | None, names: Sequence[str], flag: str) -> Path:
    """The list that was named, or the one with a published name in the directory or a folder of it."""
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"{flag} {given} is not a file")
        return Path(given)
    found = [path for name in names for place in ("", "*/") for path in sorted(root.glob(place + name))] if root else []
    if len(found) != 1:
        seen = ", ".join(map(str, found)) or "none"
        raise FileNotFoundError(f"{flag}: name the published list, {' or '.join(names)}; found in data.path: {seen}")
    return found[0]


def locate(root: Path, part: PictureList, flat: bool) -> list[str]:
    """Where the pictures of a list are; each folder is read once."""

    @cache
    def content(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(root / folder))  # noqa: PTH208 (names alone: a million Path objects are slow)
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()

    found, missing = [], []
    for path in part.paths:
        folder, _, name = path.rpartition("/")
        higher = folder.rpartition("/")[0]
        if name in content(folder):
            found.append(f"{root}/{path}")
        elif flat and name in content(higher):
            found.append(f"{root}/{higher}/{name}")
        else:
            missing.append(path)
    if missing:
        first = ", ".join(missing[:5])
        raise FileNotFoundError(
            f"{len(missing)} of {len(part.paths)} pictures in {part.file} are not in {root}: {first}"
        )
    return found


def distinct(names: list[str]) -> list[str]:
    """Names that occur twice get their label behind them."""
    often = Counter(names)
    return [name if often[name] == 1 else f"{name} ({c})" for c, name in enumerate(names)]
