"""Batches of kept features in the place of pictures, drawn by the same samplers."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ecl_hf.data.loaders import EpochSampler, Pick
from ecl_hf.data.overview import file_size
from ecl_hf.data.pictures import content
from ecl_hf.data.samplers import Sampler, instance

MOST_READ, MOST_BYTES = 10_000, 1 << 28
"""Pictures of a part, and bytes of them, that are read to know them again: seconds, however large the set is."""


class FeatureDataset(torch.utils.data.Dataset):
    """Features of the training pictures; each time a picture comes, one of its fixed views is drawn.

    Which one depends on seed, epoch and picture alone. `views`, `epoch`, `progress` and `weights` are as those of
    `ViewDataset`: each further view is another draw.

    Args:
        features: [V, N, D].
        labels: [N].
        there: which pictures to learn from, [N], as those that could be decoded; the next one of the same class takes
            the place of another, or the next one at all where the class has none.
        seed: of the draws.

    Raises:
        ValueError: no picture could be decoded.
    """

    def __init__(self, features: Tensor, labels: np.ndarray, there: Tensor, seed: int = 0) -> None:
        if not there.any():
            raise ValueError(f"none of the {len(labels)} training pictures can be decoded")
        self.features = features
        self.labels = labels
        self.seed = seed
        self.views: dict[str, Any] = {"pixel_values": None}
        self.epoch = 0
        self.progress = 0.0
        self.weights: np.ndarray | None = None
        self.rows = np.arange(len(labels))
        good, absent = np.flatnonzero(there.numpy()), np.flatnonzero(~there.numpy())
        for label in np.unique(labels[absent]):
            lost = absent[labels[absent] == label]
            own = good[labels[good] == label]
            choice = own if len(own) else good
            self.rows[lost] = choice[np.searchsorted(choice, lost) % len(choice)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int | Pick]) -> dict[str, Tensor]:
        """A whole batch: `pixel_values` [B, D] and the further views, `labels`, `indices`."""
        picks = [index if isinstance(index, Pick) else Pick(index) for index in indices]
        rows, again = (np.array([getattr(pick, name) for pick in picks]) for name in ("row", "again"))
        batch = {name: self._draw(rows, again, n) for n, name in enumerate(self.views)}
        batch |= {"labels": torch.from_numpy(self.labels[self.rows[rows]]), "indices": torch.from_numpy(rows)}
        if picks[0].partner is not None:
            partners, again = (np.array([getattr(pick, n) for pick in picks]) for n in ("partner", "partner_again"))
            batch["partner_pixel_values"] = self._draw(partners, again, len(self.views))
            batch["partner_labels"] = torch.from_numpy(self.labels[self.rows[partners]])
        return batch

    def _draw(self, rows: np.ndarray, again: np.ndarray, which: int) -> Tensor:
        draws = np.random.default_rng([self.seed, self.epoch, which]).integers(1 << 30, size=len(self))
        view = (draws[rows] + again) % len(self.features)
        return self.features[torch.from_numpy(view), torch.from_numpy(self.rows[rows])]


def feature_loader(
    dataset: FeatureDataset,
    batch_size: int,
    parts: int = 1,
    sampler: Sampler = instance,
    partners: Sampler | None = None,
    settings: Any = None,
) -> DataLoader:
    """Full batches of an epoch (see `EpochSampler`), each in equal parts for processes and accumulation."""
    return DataLoader(
        dataset,
        batch_size // parts,
        sampler=EpochSampler(dataset, batch_size, sampler, partners, settings),
        drop_last=True,
        collate_fn=as_it_is,
        generator=torch.Generator().manual_seed(dataset.seed),
    )


def as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch, which the data set has put together already."""
    return batch


def in_batches(features: Tensor, labels: Tensor, batch_size: int = 4096) -> list[dict[str, Tensor]]:
    """All pictures' features [V, N, D] with their labels [N], as batches for `predict`.

    The first view is that of the pictures as they are; the second, if there is one, that of the mirrored ones.
    """
    views = dict(zip(("pixel_values", "mirrored_pixel_values"), features, strict=False)) | {"labels": labels}
    parts = zip(*(tensor.split(batch_size) for tensor in views.values()), strict=True)
    return [dict(zip(views, part, strict=True)) for part in parts]


def digest_pictures(pictures: datasets.Dataset) -> str:
    """SHA-256 of which pictures a part has, row by row, wherever its folder lies.

    Counted are the names below the folder that all files have in common, the sizes of files, and the contents: of all
    pictures, or in a large set of some from all over it.

    Args:
        pictures: with a column `image`.
    """
    stored = pictures.select_columns("image").cast_column("image", datasets.Image(decode=False))
    columns = stored.flatten()  # so that no content is read for the names
    names = columns.select_columns("image.path").with_format("arrow")[:]["image.path"].to_pylist()
    found = hashlib.sha256(str(len(names)).encode())
    if columns.data.column("image.bytes").null_count == columns.data.num_rows:
        paths = [os.path.abspath(name) for name in names if name]  # noqa: PTH100 (fast)
        start = len(os.path.commonpath(map(os.path.dirname, paths))) if paths else 0
        names = [name and f"{os.path.abspath(name)[start:]} {file_size(name)}" for name in names]  # noqa: PTH100
    found.update("\n".join(map(repr, names)).encode())
    read = 0
    for row in np.random.default_rng(0).permutation(len(names))[:MOST_READ].tolist():
        try:
            file = content(stored[row]["image"])
        except (OSError, ValueError):  # it is a broken picture, and named where it is decoded
            file = b""
        found.update(hashlib.sha256(file).digest())
        if (read := read + len(file)) > MOST_BYTES:
            break
    return found.hexdigest()
