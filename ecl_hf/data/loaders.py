"""From the columns `image` and `label` to batches of views.

Random augmentation depends on (seed, epoch, picture) alone: the same with any number of workers and processes, and
after an interruption.
"""

import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ecl_hf.data.config import MAX_PIXELS
from ecl_hf.data.pictures import DECODED_LIMIT, BrokenPictureError, KeptPictures, decode, decoded_size
from ecl_hf.data.samplers import Draw, Sampler, instance
from ecl_hf.data.views import RandomView, View

SAMPLE = 64
"""Pictures that tell how much memory the whole set would take."""

READ = 64
"""Pictures whose files are read at once, which an Arrow table does faster than one after the other."""

AHEAD = 1 << 20
"""Pixels that are decoded at once: small pictures take a sixth less time than if each went through its view at once."""

BATCH_PIXELS = 64 * 224 * 224
"""Pixels of a forward without gradients, whatever the input's size: what lies between the layers takes their memory."""

OnError = Literal["raise", "replace", "mark"]


class Pick(NamedTuple):
    """A picture of an epoch: its row, how often the row came before in the epoch, and the same of its partner.

    A picture that comes again is augmented anew.
    """

    row: int
    again: int = 0
    partner: int | None = None
    partner_again: int = 0


class ViewDataset(torch.utils.data.Dataset):
    """Pictures through one or more views; of a random view the 8-bit pixels, which `collate` normalises.

    Args:
        dataset: columns `image` and `label`.
        views: output name -> view; all views of a picture are drawn one after the other.
        seed: of the random augmentation, together with the picture's position and the attribute `epoch`, which the
            training loop sets before it starts to iterate, as it does with `progress` and `weights` for the sampler.
            An item's own position is its entry `indices`. A picture of the second stream goes through the first view.
        split: name for messages.
        on_error: what becomes of a picture that can't be decoded. "raise": BrokenPictureError with its split, row and
            file. "replace": the next one that can be decoded takes its place, with that one's label; `broken` of an
            item is the message then, and else empty. "mark": a black picture with the label -1.
        keep: decode the pictures here, once, if all of them take no more than `DECODED_LIMIT` bytes.
        max_pixels: a picture with more counts as one that can't be decoded.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        views: dict[str, View],
        seed: int = 0,
        split: str = "train",
        on_error: OnError = "raise",
        keep: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.labels = np.array(dataset["label"][:], np.int64)
        self.views = views
        self.seed = seed
        self.split = split
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.epoch = 0
        self.progress = 0.0
        self.weights: np.ndarray | None = None
        self.kept = KeptPictures()
        if keep and self._fits():
            self.kept = KeptPictures(self._pictures(range(len(self))))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | Pick) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | Pick]) -> list[dict[str, Any]]:
        """A batch, one large picture after the other in memory; global random generators are left as they were."""
        picks = [index if isinstance(index, Pick) else Pick(index) for index in indices]
        with own_generators():
            images = self._pictures([pick.row for pick in picks])
            items = [self._item(pick, image) for pick, image in zip(picks, images, strict=True)]
            if picks[0].partner is not None:
                partners = self._pictures([pick.partner for pick in picks])
                for item, pick, image in zip(items, picks, partners, strict=True):
                    item |= self._partner(pick, image)
        return items

    def _item(self, pick: Pick, image: Image.Image | None) -> dict[str, Any]:
        index, broken = pick.row, image is None
        label = int(self.labels[index])
        if broken:
            image, label = self._substitute(index)
        entropy = [self.seed, self.epoch, index, *([pick.again] if pick.again else [])]
        item = draw(self.views, image, entropy) | {"labels": label, "indices": index}
        if self.on_error == "replace":
            item["broken"] = self.defects([index])[0] if broken else ""
        return item

    def _partner(self, pick: Pick, image: Image.Image | None) -> dict[str, Any]:
        label = int(self.labels[pick.partner])
        if image is None:
            image, label = self._substitute(pick.partner)
        view = {"partner_pixel_values": self.views["pixel_values"]}
        entropy = [self.seed, self.epoch, pick.partner, pick.partner_again, 1]  # others than in the first stream
        return draw(view, image, entropy) | {"partner_labels": label}

    def _substitute(self, index: int) -> tuple[Image.Image, int]:
        if self.on_error == "mark":
            return Image.new("RGB", (32, 32)), -1
        for row in (*range(index + 1, len(self)), *range(index)):
            if image := next(self._pictures([row])):
                return image, int(self.labels[row])
        raise BrokenPictureError(f"none of the {len(self)} {self.split} pictures can be decoded")

    def _pictures(self, rows: Sequence[int]) -> Iterator[Image.Image | None]:
        """Pictures, decoded a few at a time; None for a broken one, unless `on_error` is "raise"."""
        for start in range(0, len(rows), READ):
            part = rows[start : start + READ]
            missing = [row for row in part if row >= len(self.kept)]
            records = dict(zip(missing, self.dataset[missing]["image"] if missing else [], strict=True))
            yield from a_few(self._decode(row, records[row]) if row in records else self.kept[row] for row in part)

    def _decode(self, row: int, record: dict[str, Any]) -> Image.Image | None:
        try:
            return decode(record, f"{self.split} row {row}", self.max_pixels)
        except BrokenPictureError:
            if self.on_error == "raise":
                raise
            return None

    def defects(self, rows: Sequence[int]) -> list[str]:
        """Split, row, file and reason of those pictures among the rows that can't be decoded."""
        found = []
        for row in rows:
            try:
                decode(self.dataset[row]["image"], f"{self.split} row {row}", self.max_pixels)
            except BrokenPictureError as error:
                found.append(str(error))
        return found

    def _fits(self) -> bool:
        rows = np.unique(np.linspace(0, len(self) - 1, SAMPLE).astype(int)).tolist()
        sizes = [decoded_size(record) for record in self.dataset[rows]["image"]]
        return sum(sizes) / len(sizes) * len(self) <= DECODED_LIMIT


def a_few(images: Iterable[Any]) -> Iterator[Any]:
    """The same pictures, and what stands for broken ones; `AHEAD` pixels and one picture more are decoded at once."""
    waiting, pixels = [], 0
    for image in images:
        waiting.append(image)
        pixels += image.width * image.height if isinstance(image, Image.Image) else 0
        if pixels >= AHEAD:
            del image
            yield from waiting
            waiting, pixels = [], 0
    yield from waiting


@contextmanager
def own_generators() -> Iterator[None]:
    """Within, the global random generators may be seeded and drawn from; afterwards they are as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def draw_seed(*entropy: int) -> int:
    """A seed that depends on these numbers alone."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def draw(views: dict[str, View], image: Image.Image, entropy: Sequence[int]) -> dict[str, Tensor]:
    """All views of a picture, random ones before they are normalised; the numbers alone decide the augmentation.

    The global generators are seeded.
    """
    seed = draw_seed(*entropy)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return {name: (view.pixels if isinstance(view, RandomView) else view)(image) for name, view in views.items()}


class EpochSampler(torch.utils.data.Sampler):
    """An epoch's pictures by a sampler of `data.samplers`, cut to a multiple of the global batch.

    They depend on what the data set knows alone: seed, epoch, progress, weights and labels.

    Args:
        dataset: to draw from.
        batch_size: of one optimiser step over all processes.
        sampler: which picture comes next.
        partners: the same of a second stream, one partner for each picture.
        settings: of the method, for the samplers.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        batch_size: int = 1,
        sampler: Sampler = instance,
        partners: Sampler | None = None,
        settings: Any = None,
    ) -> None:
        self.dataset = dataset
        self.samplers = [sampler, *([partners] if partners else [])]
        self.settings = settings
        self.length = len(dataset) // batch_size * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int | Pick]:
        known = self.dataset
        columns = []
        for stream, sampler in enumerate(self.samplers):
            draw = Draw(
                known.seed, known.epoch, known.labels, known.progress, self.settings, known.weights, stream=stream
            )
            order = sampler(draw)[: self.length]
            columns += [order, occurrences(order)]
        if len(columns) == 2 and not columns[1].any():
            yield from columns[0].tolist()
        else:
            yield from (Pick(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def occurrences(order: np.ndarray) -> np.ndarray:
    """How often each number came before, [N] -> [N]."""
    sorting = np.argsort(order, kind="stable")
    ranked = order[sorting]
    first = np.searchsorted(ranked, ranked)
    before = np.empty_like(order)
    before[sorting] = np.arange(len(order)) - first
    return before


def collate(items: list[dict[str, Any]], views: Mapping[str, View] = MappingProxyType({})) -> dict[str, Any]:
    """Stack a batch, and normalise the pixels of random views; images in channels-last memory order."""
    batch = {}
    for name, value in items[0].items():
        if isinstance(views.get(name), RandomView):
            batch[name] = views[name].normalise([item[name] for item in items])
        elif name == "broken":
            batch[name] = [item[name] for item in items if item[name]]
        elif isinstance(value, Tensor):
            batch[name] = torch.stack([item[name] for item in items]).contiguous(memory_format=torch.channels_last)
        else:
            batch[name] = torch.tensor([item[name] for item in items])
    return batch


def outlive_first_signal(_: int) -> None:
    """Ready a loading process for signals to the whole group: the training process still needs its data then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def collated(views: Mapping[str, View]) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """`collate` for these views."""
    return partial(collate, views=views)


def train_loader(
    dataset: ViewDataset,
    batch_size: int,
    parts: int = 1,
    num_workers: int = 0,
    sampler: Sampler = instance,
    partners: Sampler | None = None,
    settings: Any = None,
) -> DataLoader:
    """Full batches of an epoch (see `EpochSampler`), each in equal parts for processes and accumulation."""
    views = dataset.views | ({"partner_pixel_values": dataset.views["pixel_values"]} if partners else {})
    return DataLoader(
        dataset,
        batch_size // parts,
        sampler=EpochSampler(dataset, batch_size, sampler, partners, settings),
        drop_last=True,
        num_workers=num_workers,
        collate_fn=collated(views),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=outlive_first_signal,
        generator=torch.Generator().manual_seed(dataset.seed),  # else each epoch draws from the global generator
    )


def fitting(batch_size: int, input_size: Sequence[int]) -> int:
    """So many pictures, or as many as `BATCH_PIXELS` are; at least one.

    Args:
        batch_size: at most.
        input_size: channels, height and width.
    """
    return max(1, min(batch_size, BATCH_PIXELS // (input_size[-2] * input_size[-1])))


def evaluation_loader(
    dataset: datasets.Dataset,
    view: Callable,
    batch_size: int,
    num_workers: int = 0,
    split: str = "test",
    on_error: OnError = "raise",
    max_pixels: int = MAX_PIXELS,
) -> DataLoader:
    """All pictures in order; of broken and too large ones see `ViewDataset`."""
    return DataLoader(
        ViewDataset(dataset, {"pixel_values": view}, split=split, on_error=on_error, max_pixels=max_pixels),
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
