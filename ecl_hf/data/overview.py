"""What a user should know of own pictures before they are trained on: sizes, broken files, exact duplicates."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from ecl_hf.data.config import MAX_PIXELS
from ecl_hf.data.pictures import BrokenPictureError, content, decode
from ecl_hf.names import printable, readable

SAMPLE = 200
"""Pictures that are decoded, spread evenly over the set."""

SAMPLE_PIXELS = 1 << 26
"""Decoded pixels after which the sample ends, so that large photos take seconds too."""

MOST = 50_000
"""Pictures among which duplicates are looked for."""

MOST_BYTES = 1 << 30
"""Bytes of files that are read for it; a file whose size no other one has is not read."""

GROUPS = {"many": "more than 100", "medium": "20 to 100", "few": "fewer than 20"}


def describe_classes(
    class_counts: Sequence[int], class_names: Sequence[str], groups: Mapping[str, int], others: Mapping[str, int]
) -> list[str]:
    """Lines on how many pictures there are, on the largest and smallest classes, and on the shot groups.

    Args:
        class_counts: training pictures of each class, [C].
        class_names: [C].
        groups: number of classes of "many", "medium" and "few" training pictures.
        others: pictures of the other parts, by what they are for.
    """
    ranking = np.argsort(-np.asarray(class_counts), kind="stable").tolist()
    counts = [f"{printable(class_names[c], 40)} {class_counts[c]:,}" for c in ranking]
    kept = "".join(f", {number:,} for {name}" for name, number in others.items())
    lines = [f"pictures: {sum(class_counts):,} of {len(counts):,} classes for training{kept}"]
    if len(counts) <= 6:
        lines.append(f"classes: {', '.join(counts)}")
    else:
        lines += [f"largest classes: {', '.join(counts[:3])}", f"smallest classes: {', '.join(counts[-3:])}"]
    sizes = (f"{number:,} have {GROUPS[name]}" for name, number in groups.items())
    return [*lines, f"classes by training pictures: {', '.join(sizes)}"]


class Stored(NamedTuple):
    """A picture without its content: part ("train", "val", "test"), row, label, and path, size and digest of its file.

    The digest is there where the picture lies in the data set itself, and not in a file of its own.
    """

    part: str
    row: int
    label: int
    path: str | None
    size: int
    digest: bytes | None

    @property
    def name(self) -> str:
        """Folder and file, or part and row."""
        return "/".join(map(printable, Path(self.path or "").parts[-2:])) or f"{self.part} row {self.row}"


def describe_pictures(parts: Mapping[str, datasets.Dataset], max_pixels: int = MAX_PIXELS) -> list[str]:
    """Lines on sizes, broken files and duplicates; of a large set a part is looked at, and the lines say so.

    Args:
        parts: "train", and if they are there "val" and "test": columns `image` and `label`.
        max_pixels: a picture with more counts as broken.
    """
    stored = {name: part.cast_column("image", datasets.Image(decode=False)) for name, part in parts.items()}
    return [*_sizes_and_broken(stored, max_pixels), *_duplicates(stored)]


def _sizes_and_broken(parts: Mapping[str, datasets.Dataset], max_pixels: int) -> list[str]:
    total, sizes, broken = sum(map(len, parts.values())), [], []
    ends = np.cumsum([len(part) for part in parts.values()])
    for place in np.unique(np.linspace(0, total - 1, min(SAMPLE, total)).astype(int)).tolist():
        which = int(np.searchsorted(ends, place, side="right"))
        name, part = list(parts.items())[which]
        row = place - int(ends[which]) + len(part)
        try:
            sizes.append(decode(part[row]["image"], f"{name} row {row}", max_pixels).size)
        except BrokenPictureError as error:
            broken.append(readable(str(error), 300))
        if sum(width * height for width, height in sizes) > SAMPLE_PIXELS:
            break
    looked = len(sizes) + len(broken)
    some = "" if looked == total else f", of {looked} that were looked at"
    lines = []
    if sizes:
        sides = [sorted(side) for side in zip(*sizes, strict=True)]
        low, middle, high = (" x ".join(str(side[place]) for side in sides) for place in (0, len(sizes) // 2, -1))
        span = low if low == high else f"{low} to {high}, median {middle}"
        lines.append(f"pixels{some}: {span}")
    return [*lines, f"broken files{some}: " + (f"{len(broken)}, such as {broken[0]}" if broken else "none")]


def _duplicates(parts: Mapping[str, datasets.Dataset]) -> list[str]:
    """Lines on pictures with the same bytes; the worst are those that are tested on after they were trained on."""
    total = sum(map(len, parts.values()))
    if total > MOST:
        return [f"duplicates: not looked for among more than {MOST:,} pictures"]
    try:
        found = _inventory(parts)
        empty = [picture for picture in found if not picture.size]
        same_size = [group for group in _grouped([picture for picture in found if picture.size], "size") if group[1:]]
        if sum(picture.size for group in same_size for picture in group) > MOST_BYTES:
            raise ValueError
    except ValueError:
        return [f"duplicates: not looked for, since more than {MOST_BYTES >> 30} GiB would have to be read"]
    sets = [twins for group in same_size for twins in _grouped(map(_with_digest, group), "digest") if twins[1:]]
    lines = [f"missing or empty files: {len(empty)}, such as {empty[0].name}"] if empty else []
    copies = sum(len(twins) - 1 for twins in sets)
    lines.append(f"copies of other files: {copies:,}" + (f", such as {_pair(sets[0])}" if sets else ""))
    if leaked := [twins for twins in sets if len({picture.part == "test" for picture in twins}) == 2]:
        pair = [next(p for p in leaked[0] if p.part != "test"), next(p for p in leaked[0] if p.part == "test")]
        lines.append(
            f"warning: {len(leaked):,} pictures are in training and test both, such as {_pair(pair)}: test scores will "
            "flatter the model; remove one of each"
        )
    if torn := [twins for twins in sets if len({picture.label for picture in twins}) > 1]:
        pair = [torn[0][0], next(p for p in torn[0] if p.label != torn[0][0].label)]
        lines.append(f"warning: {len(torn):,} pictures lie in several classes, such as {_pair(pair)}")
    return lines


def _pair(pictures: Sequence[Stored]) -> str:
    return f"{pictures[0].name} ({pictures[0].part}) and {pictures[1].name} ({pictures[1].part})"


def _inventory(parts: Mapping[str, datasets.Dataset]) -> list[Stored]:
    """All pictures; ValueError: those that lie in the data set itself are too large to be looked at."""
    found, read = [], 0
    for part, pictures in parts.items():
        for row, entry in enumerate(pictures):
            record = entry["image"] or {"path": None, "bytes": None}
            if record["bytes"] is None:
                size, digest = file_size(record["path"]), None
            else:
                size, digest = len(record["bytes"]), hashlib.sha256(record["bytes"]).digest()
                read += size
                if read > MOST_BYTES:
                    raise ValueError
            found.append(Stored(part, row, entry["label"], record["path"], size, digest))
    return found


def _grouped(pictures: Iterable[Stored], key: str) -> list[list[Stored]]:
    groups = defaultdict(list)
    for picture in pictures:
        groups[getattr(picture, key)].append(picture)
    return list(groups.values())


def file_size(path: str | None) -> int:
    """Bytes of a file; 0 if it is not there."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 (fast)
    except (OSError, TypeError, ValueError):
        return 0


def _with_digest(picture: Stored) -> Stored:
    """The same with the digest of its file; one that can't be read is like no other."""
    if picture.digest is not None:
        return picture
    try:
        digest = hashlib.sha256(content({"path": picture.path, "bytes": None})).digest()
    except (OSError, ValueError):
        digest = f"{picture.part} {picture.row}".encode()
    return picture._replace(digest=digest)
