"""From the columns `image` and `label` to batches of views.

Random augmentation depends on (seed, epoch, picture) alone: the same with any number of workers and processes, and
after an interruption.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ecl_hf.views import View

if TYPE_CHECKING:
    import datasets


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB; 16-bit greys keep their upper eight bits, where PIL would cut everything above 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


class ViewDataset(torch.utils.data.Dataset):
    """Pictures through one or more views.

    Args:
        dataset: columns `image` and `label`.
        views: output name -> view; all views of a picture are drawn one after the other.
        seed: of the random augmentation, together with the picture's position and the attribute `epoch`, which the
            training loop sets before it starts to iterate.
    """

    def __init__(self, dataset: "datasets.Dataset", views: dict[str, View], seed: int = 0) -> None:
        self.dataset = dataset
        self.views = views
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """A batch at once, which the Arrow table reads faster; global random generators are left as they were."""
        rows = self.dataset[list(indices)]
        python_state, numpy_state = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                return [
                    self._item(index, to_rgb(image), label)
                    for index, image, label in zip(indices, rows["image"], rows["label"], strict=True)
                ]
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

    def _item(self, index: int, image: Image.Image, label: int) -> dict[str, Any]:
        seed = int(np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)[0])
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        return {name: view(image) for name, view in self.views.items()} | {"labels": label}


class EpochSampler(Sampler[int]):
    """A permutation that depends on the data set's (seed, epoch) alone, cut to a multiple of the global batch."""

    def __init__(self, dataset: ViewDataset, batch_size: int = 1) -> None:
        self.dataset = dataset
        self.length = len(dataset) // batch_size * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.dataset.seed, self.dataset.epoch]).permutation(len(self.dataset))
        yield from order[: self.length].tolist()


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack a batch; images in channels-last memory order."""
    batch = {}
    for name in items[0]:
        if name == "labels":
            batch[name] = torch.tensor([item[name] for item in items])
        else:
            batch[name] = torch.stack([item[name] for item in items]).contiguous(memory_format=torch.channels_last)
    return batch


def train_loader(dataset: ViewDataset, batch_size: int, parts: int = 1, num_workers: int = 0) -> DataLoader:
    """Shuffled full batches of the data set's `epoch`, each in equal parts for processes and accumulation."""
    return DataLoader(
        dataset,
        batch_size // parts,
        sampler=EpochSampler(dataset, batch_size),
        drop_last=True,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(dataset.seed),  # else each epoch draws from the global generator
    )


def evaluation_loader(dataset: "datasets.Dataset", view: Callable, batch_size: int, num_workers: int = 0) -> DataLoader:
    """All pictures in order."""
    return DataLoader(
        ViewDataset(dataset, {"pixel_values": view}),
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
