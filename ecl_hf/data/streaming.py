"""Training pictures that are read while they are needed, from the Hub or local files, and never all stored.

The main process reads the files as they are stored and shuffles them in a buffer; loading processes decode and augment.
So the order depends on (seed, epoch, process) alone, and the batches before an interruption are skipped undecoded.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image
from torch.utils.data import DataLoader, Sampler

from ecl_hf.data.config import MAX_PIXELS, DataConfig
from ecl_hf.data.loaders import OnError, a_few, collated, draw, own_generators
from ecl_hf.data.pictures import BrokenPictureError, content, decode
from ecl_hf.data.sources import (
    Source,
    choose_columns,
    labels_of,
    numbers,
    open_builder,
    read_in_place,
    reading,
    stored_names,
    whole_numbers,
    with_labels,
)
from ecl_hf.data.views import View
from ecl_hf.names import listed

SHARDS = 64
"""Most parts of local pictures, of which a stream takes one after the other in random order."""


def open_streams(config: DataConfig) -> tuple[datasets.IterableDataset, datasets.Dataset, list[int], list[str]]:
    """Open a data set whose training pictures are streamed; the test pictures are stored on disk.

    Returns:
        Training pictures as they are stored, test pictures, class counts and class names.

    Raises:
        FileNotFoundError: there is no data set.
        ValueError: a split or column is missing, a label lies outside the classes, or the class counts do not fit.
    """
    if source := read_in_place(config):
        return _streamed(source, config)
    name = config.path or config.source
    builder = open_builder(config)
    with reading(name):
        streams = builder.as_streaming_dataset()
    parts = {"train": config.train_split, "test": config.test_split}
    for key, split in parts.items():
        if split not in streams:
            raise ValueError(f"{name} has no split {split!r} (data.{key}_split); it has {', '.join(streams)}")
        parts[key] = streams[split] if streams[split].features else streams[split]._resolve_features()
    image, label = choose_columns(parts["train"].features, config, name)
    feature = parts["train"].features[label]
    if "string" in feature.dtype:
        raise ValueError(f"{name}: streaming needs labels that are numbers, column {label!r} holds strings")
    stored = stored_names(builder, config)
    names = stored.get("train") or getattr(feature, "names", None)
    counts = config.class_counts or count_labels(builder, config, parts["train"], label, names)
    if names is not None and len(counts) != len(names):
        raise ValueError(f"data.class_counts has {len(counts)} numbers, but {name} has {len(names)} classes")
    own = stored.get("test") or names
    names = names or [str(c) for c in range(len(counts))]
    _check_counts(counts, names, name)
    for key, part in parts.items():
        new = {old: name for old, name in ((image, "image"), (label, "label")) if old != name}
        columns = part.cast_column(image, datasets.Image(decode=False))  # first of all: each step would decode
        columns = columns.select_columns([image, label]).rename_columns(new)
        kind = datasets.ClassLabel(names=names) if key == "train" else datasets.Value("int64")
        parts[key] = columns.cast_column("label", kind)
    with reading(f"{name}, split {config.test_split}"):
        test = datasets.Dataset.from_generator(
            _rows, features=parts["test"].features, gen_kwargs={"stream": parts["test"]}
        )
    labels = numbers(test, names, own, f"{name}, split {config.test_split}, column {label}")
    return parts["train"], with_labels(test, labels, names), list(counts), names


def _streamed(
    source: Source, config: DataConfig
) -> tuple[datasets.IterableDataset, datasets.Dataset, list[int], list[str]]:
    """Pictures that lie here as a stream, mixed once since they are often sorted by class."""
    names, labels = source.class_names, labels_of(source.train)
    counts = np.bincount(labels, minlength=len(names)).tolist()
    _check_counts(counts, names, source.name)
    if config.class_counts not in (None, counts):
        raise ValueError(f"data.class_counts are not those of {source.name}: leave them out, they are counted")
    rows = np.random.default_rng(0).permutation(len(labels))
    mixed = source.train.cast_column("image", datasets.Image(decode=False)).select(rows)
    equal = max(n for n in range(1, SHARDS + 1) if len(rows) % n == 0)  # else processes would have unequal parts
    return mixed.to_iterable_dataset(equal), source.test, counts, names


def _check_counts(counts: list[int], names: list[str], name: str) -> None:
    if empty := [names[c] for c, count in enumerate(counts) if not count]:
        raise ValueError(f"{name} has no training image of {len(empty)} classes: {listed(empty)}")


def _rows(stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    for row in stream:
        image = row["image"]
        there = image and (image["bytes"] is not None or image["path"] is not None)
        yield row if there else {**row, "image": None}


def count_labels(
    builder: datasets.DatasetBuilder,
    config: DataConfig,
    stream: datasets.IterableDataset,
    label: str,
    names: list[str] | None,
) -> list[int]:
    """Training images of each class, [C]; of parquet files nothing but the label column is read."""
    where = f"{config.path or config.source}, column {label}"
    found: Counter[int] = Counter()
    first: dict[int, int] = {}  # row in which a label comes first
    rows = 0
    for part in _label_parts(builder, config, stream, label):
        values, at, counts = np.unique(whole_numbers(part, where), return_index=True, return_counts=True)
        found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        first = dict(zip(values.tolist(), (rows + at).tolist(), strict=True)) | first
        rows += len(part)
    most = len(names) if names else rows
    if wrong := [number for number in found if not 0 <= number < most]:
        bound = f"0..{most - 1}" if names else f"what {rows} pictures can have"
        row = first[wrong[0]]
        said = "no label" if wrong[0] == -1 else f"label {wrong[0]}"
        raise ValueError(f"{where}: row {row} has {said}, outside {bound} ({found[wrong[0]]} such rows)")
    return [found[c] for c in range(len(names) if names else max(found) + 1)]


def _label_parts(
    builder: datasets.DatasetBuilder, config: DataConfig, stream: datasets.IterableDataset, label: str
) -> Iterator[pa.ChunkedArray]:
    """The label column, part by part."""
    if isinstance(builder, Parquet):
        for file in builder.config.data_files[config.train_split]:
            with fsspec.open(file, "rb") as opened:
                yield pq.read_table(opened, columns=[label])[label]
    else:
        for batch in stream.select_columns([label]).iter(1000):
            yield pa.chunked_array([batch[label]])


class StreamedViews(torch.utils.data.Dataset):
    """Records of a stream through one or more views; what `DataLoader` calls an index is a record here.

    Args:
        views: output name -> view.
        seed: of the random augmentation, together with the picture's place in the epoch and the attribute `epoch`.
        on_error: "raise", or "replace": the next picture of the batch that can be decoded takes the place.
        max_pixels: a picture with more counts as one that can't be decoded.
    """

    def __init__(
        self, views: dict[str, View], seed: int = 0, on_error: OnError = "raise", max_pixels: int = MAX_PIXELS
    ) -> None:
        self.views = views
        self.seed = seed
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.epoch = 0

    def __getitems__(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A batch, one large picture after the other in memory; global random generators are left as they were."""
        items: dict[int, dict[str, Any]] = {}
        broken: dict[int, str] = {}
        with own_generators():
            images = a_few(self._decode(record["image"]) for record in records)
            for i, (record, image) in enumerate(zip(records, images, strict=True)):
                if isinstance(image, str):
                    broken[i] = image
                else:
                    items[i] = self._item(image, record["label"], record["place"])
            if not items:
                raise BrokenPictureError(f"no picture of a batch can be decoded, the first is {broken[0]}")
            for i, reason in broken.items():
                chosen = records[min(items.keys() - broken, key=lambda j, i=i: (j - i) % len(records))]
                items[i] = self._item(self._decode(chosen["image"]), chosen["label"], records[i]["place"])
                items[i]["broken"] = reason
        return [items[i] for i in range(len(records))]

    def _item(self, image: Image.Image, label: int, place: int) -> dict[str, Any]:
        item = draw(self.views, image, [self.seed, self.epoch, place]) | {"labels": label, "indices": place}
        return item | {"broken": ""} if self.on_error == "replace" else item

    def _decode(self, image: dict[str, Any]) -> Any:
        """A picture, or what is wrong with it."""
        where = "train picture"
        if image and image["bytes"] and not image["path"]:
            where += f" with SHA-256 {hashlib.sha256(content(image)).hexdigest()[:16]}"
        try:
            return decode(image, where, self.max_pixels)
        except BrokenPictureError as error:
            if self.on_error == "raise":
                raise
            return str(error)


class StreamSampler(Sampler[dict[str, Any]]):
    """One process's part of a stream in the order of the data set's epoch: full batches, no more.

    Whole files go to each process if their number allows, else each takes every n-th picture. A process whose files
    hold too few pictures for its batches reads them again.
    """

    def __init__(
        self,
        dataset: StreamedViews,
        stream: datasets.IterableDataset,
        images: int,
        batch_size: int,
        process: int = 0,
        processes: int = 1,
        shuffle_buffer: int = 1000,
    ) -> None:
        self.dataset = dataset
        shuffled = stream.shuffle(seed=dataset.seed, buffer_size=shuffle_buffer)
        self.stream = split_dataset_by_node(shuffled, process, processes)
        self.images = images
        self.process, self.processes = process, processes
        self.length = images // batch_size * batch_size // processes

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.stream.set_epoch(self.dataset.epoch)
        given = 0
        while given < self.length:
            before = given
            for record in self.stream:
                yield record | {"place": given * self.processes + self.process}
                given += 1
                if given == self.length:
                    return
            if self.processes == 1 or given == before:
                raise ValueError(
                    f"the stream ended after {given} pictures, but the class counts are {self.images} in all"
                )


def stream_loader(sampler: StreamSampler, batch_size: int, parts: int = 1, num_workers: int = 0) -> DataLoader:
    """Batches of one process, each in equal parts; already divided among processes, so nothing else may divide them."""
    return DataLoader(
        sampler.dataset,
        batch_size // parts,
        sampler=sampler,
        drop_last=True,
        num_workers=num_workers,
        collate_fn=collated(sampler.dataset.views),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(sampler.dataset.seed),
    )
