"""A split as an object that can be cited: which pictures of which source, in which class order, by which protocol.

split.json       protocol, source, class order and counts, SHA-256 of both lists
train_rows.txt   positions in the source's training pictures, a line each: `sha256sum` gives the number in split.json
test_rows.txt    the same for the test pictures
data/*.parquet   the pictures themselves, if asked for
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ecl_hf.data.config import DataConfig
from ecl_hf.data.pictures import content, lies_outside
from ecl_hf.data.sources import Source, labels_of
from ecl_hf.files import MAX_TEXT, read_bytes, read_json
from ecl_hf.names import listed, printable

PROTOCOL = ("profile", "imbalance_factor", "max_count", "split_seed", "test_fraction", "group_column")
"""Keys of the data section that decide which pictures are taken."""

LAYOUT = ("subset", "train_split", "test_split", "image_column", "label_column")
"""Keys that say where in the source they are."""

PARTS = ("train", "test")
SHARD, ROW_GROUP = 5000, 100
"""Pictures of one parquet file, and of the part of it that is read at once."""


@dataclass(frozen=True)
class Split:
    """A split that was written.

    Attributes:
        path: its directory.
        record: content of `split.json`.
    """

    path: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> "Split":
        """Open a split; FileNotFoundError if there is none, ValueError if its record is damaged."""
        file = Path(path) / "split.json"
        if not file.is_file():
            raise FileNotFoundError(f"{path} holds no split.json; make a split with `training/data.py build`")
        try:
            record = read_json(file)
            for part in PARTS:
                record["parts"][part]["sha256"], record["source"][part]["labels_sha256"]
            record["class_names"], record["protocol"], record["source"]["name"]
            DataConfig(**record["data"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        return cls(Path(path), record)

    @classmethod
    def write(
        cls,
        path: str | Path,
        config: DataConfig,
        source: Source,
        rows: dict[str, np.ndarray],
        with_pictures: bool = False,
    ) -> "Split":
        """Write a split, all of it or nothing.

        Args:
            path: directory that does not exist, or is empty.
            config: by which the rows were chosen.
            source: from which they were chosen.
            rows: "train" and "test", ascending positions.
            with_pictures: also copy the pictures, as parquet files that `datasets` and the Hub read.

        Raises:
            FileExistsError: the directory is in use.
            FileNotFoundError: a picture that is to be copied is not there.
            ValueError: it lies outside of the source's folders, or can't be read.
        """
        path = check_output(path)
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".split-") as temporary:
            work = Path(temporary) / "split"
            work.mkdir()
            record = describe(config, source, rows)
            for part in PARTS:
                (work / f"{part}_rows.txt").write_bytes(_lines(rows[part]))
                if with_pictures:
                    chosen = pictures_of(source, part).select(rows[part])
                    _write_parquet(work / "data", part, chosen, source.folders)
            text = json.dumps(record, indent=1, ensure_ascii=False)
            (work / "split.json").write_text(text + "\n", encoding="utf-8")
            if path.exists():
                path.rmdir()
            work.rename(path)
        return cls(path, record)

    @property
    def has_pictures(self) -> bool:
        """Whether the directory holds the pictures and not their positions alone."""
        return (self.path / "data").is_dir()

    def rows(self) -> dict[str, np.ndarray]:
        """Ascending positions of "train" and "test"; ValueError if a list is damaged, or not that of the record."""
        rows = {}
        for part in PARTS:
            file = self.path / f"{part}_rows.txt"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing")
            text = read_bytes(file, MAX_TEXT)
            if hashlib.sha256(text).hexdigest() != self.record["parts"][part]["sha256"]:
                raise ValueError(f"{file} was changed: its SHA-256 is not the one in split.json")
            listed, images = text.split(), self.record["source"][part]["images"]
            if not all(line.isdigit() and len(line) < 19 for line in listed):  # else beyond 64 bits
                raise ValueError(f"{file} has lines that are no positions")
            rows[part] = np.array(listed, np.int64)
            if np.any(np.diff(rows[part]) <= 0) or np.any(rows[part] >= images):
                raise ValueError(f"{file}: positions must ascend, and be less than the source's {images} pictures")
        return rows

    def config(self, **where: str | None) -> DataConfig:
        """The data section that repeats the split: `where` names its source (`source`, `path`, lists).

        Raises:
            ValueError: the split was made of a local directory, and nothing says where that is.
        """
        recorded = self.record["source"]
        where = {key: value for key, value in where.items() if value is not None}
        if recorded["local"] and not where:
            raise ValueError(f"{self.path} was made of the local directory {recorded['name']}: name it in data.path")
        if not recorded["local"] or self.record["protocol"] == recorded["name"]:  # a published list over local pictures
            where = {"source": recorded["name"]} | where
        return DataConfig(**self.record["data"], **where)

    def check(self, config: DataConfig, source: Source) -> None:
        """Refuse another protocol or a source with other labels; ValueError names the differences."""
        recorded = self.record["data"]
        wanted = _choice(config)
        different = [
            f"data.{k} is {wanted[k]}, there {recorded.get(k)}" for k in PROTOCOL if wanted[k] != recorded.get(k)
        ]
        if different := different + self.differences(source):
            raise ValueError(f"data.split {self.path} is another split: {'; '.join(different)}")

    def differences(self, source: Source) -> list[str]:
        """How a source differs from the one that the split was made of."""
        names, found = self.record["class_names"], source.class_names
        if set(names) != set(found):
            only = {"the split": set(names) - set(found), "the source": set(found) - set(names)}
            return [f"classes of {k} alone: {listed(sorted(v), 5)} ({len(v)})" for k, v in only.items() if v]
        if names != found:
            c = next(c for c, pair in enumerate(zip(names, found, strict=True)) if pair[0] != pair[1])
            theirs, ours = printable(found[c]), printable(names[c])
            return [f"the classes are in another order: class {c} is {theirs} in the source, {ours} in the split"]
        different = []
        for part in PARTS:
            labels, recorded = labels_of(pictures_of(source, part)), self.record["source"][part]
            if len(labels) != recorded["images"]:
                different.append(f"the source has {len(labels)} {part} pictures, the split's had {recorded['images']}")
            elif _digest(labels) != recorded["labels_sha256"]:
                different.append(f"the source has other labels than the split's, or in another order ({part} pictures)")
        return different


def check_output(path: str | Path) -> Path:
    """The path, if a split can be written there; FileExistsError if something is there."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"output {path} exists and is not an empty directory")
    return path


def describe(config: DataConfig, source: Source, rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """What `split.json` says."""
    parts = {}
    for part in PARTS:
        labels = labels_of(pictures_of(source, part))[rows[part]]
        counts = np.bincount(labels, minlength=len(source.class_names)).tolist()
        parts[part] = {"images": len(labels), "sha256": _digest(rows[part]), "class_counts": counts}
    origin = {}
    for part in PARTS:
        labels = labels_of(pictures_of(source, part))
        origin[part] = {"images": len(labels), "labels_sha256": _digest(labels)}
    name = source.name if config.path is None or source.published else Path(config.path).resolve().name
    return {
        "protocol": protocol(config, source),
        "data": _choice(config) | {key: getattr(config, key) for key in LAYOUT},
        "source": {"name": name, "local": config.path is not None, **origin},
        "parts": parts,
        "class_names": source.class_names,
        "made_with": f"ecl_hf {version('ecl-hf')}",
    }


def _choice(config: DataConfig) -> dict[str, Any]:
    """What decides which pictures are taken; groups do where test pictures are held out, not validation pictures."""
    choice = {key: getattr(config, key) for key in PROTOCOL}
    return choice | {"group_column": config.group_column if config.test_fraction else None}


def protocol(config: DataConfig, source: Source) -> str:
    """How the pictures were chosen: "cao-seed0", "cao-first", "as_is", or the name of a published benchmark."""
    if source.published:
        return source.name
    if config.profile == "as_is" and config.test_fraction is None:
        return "as_is"
    return "cao-first" if config.split_seed == "first" else f"cao-seed{config.split_seed}"


def pictures_of(source: Source, part: str) -> datasets.Dataset:
    """The pictures that a part is chosen from."""
    return source.train if part == "train" or source.test is None else source.test


def compare_rows(stored: np.ndarray, computed: np.ndarray) -> str | None:
    """How two ascending lists differ; None if they don't."""
    if np.array_equal(stored, computed):
        return None
    only, missing = np.setdiff1d(stored, computed), np.setdiff1d(computed, stored)
    first = [f"row {part[0]} {what}" for part, what in ((only, "is there"), (missing, "is missing")) if len(part)]
    return f"{len(only)} rows that the protocol does not take, {len(missing)} missing; {', '.join(first)}"


def records(pictures: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """The image column as it is stored: `bytes`, `path`."""
    for row in pictures.cast_column("image", datasets.Image(decode=False)).select_columns("image"):
        yield row["image"]


def _write_parquet(directory: Path, part: str, pictures: datasets.Dataset, folders: Sequence[Path]) -> None:
    """Copy pictures file by file, without decoding; of their paths the names remain."""
    directory.mkdir(exist_ok=True)
    schema = pictures.cast_column("image", datasets.Image()).features.arrow_schema
    stored = pictures.cast_column("image", datasets.Image(decode=False))
    shards = max(1, -(-len(stored) // SHARD))
    row = 0
    for i in range(shards):
        file = directory / f"{part}-{i:05d}-of-{shards:05d}.parquet"
        with pq.ParquetWriter(file, schema) as writer:
            for batch in stored.shard(shards, i, contiguous=True).iter(ROW_GROUP):
                images = [_copied(image, folders, f"{part} row {row + n}") for n, image in enumerate(batch["image"])]
                columns = {"image": pa.array(images, schema.field("image").type), "label": batch["label"]}
                writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
                row += len(images)


def _copied(record: dict[str, Any] | None, folders: Sequence[Path], where: str) -> dict[str, Any]:
    """A picture with its file in it."""
    if lies_outside(record, folders):
        raise ValueError(
            f"{where}: {printable(record['path'], 300)} lies outside of the data set, or leads there; pictures that "
            "are to be copied must be files in its folder"
        )
    try:
        return {"bytes": content(record), "path": record and record["path"] and Path(record["path"]).name}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _lines(numbers: np.ndarray) -> bytes:
    return "".join(f"{number}\n" for number in numbers.tolist()).encode()


def _digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(_lines(numbers)).hexdigest()
