"""Which picture comes next: pure functions of seed, epoch and labels.

The same with any number of processes and workers. Nothing is saved: a resumed run computes where it stood.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Draw:
    """What a sampler may look at.

    Attributes:
        seed: of the run.
        epoch: of the run, from 0.
        progress: share of the stage's epochs that is done, in [0, 1).
        labels: of the training pictures, [N], int64.
        settings: of the method.
        weights: of the pictures, [N], from a train-only part; None if there are none.
        stream: 0, or 1 for the second stream, whose draws are others.
    """

    seed: int
    epoch: int
    labels: np.ndarray
    progress: float = 0.0
    settings: Any = None
    weights: np.ndarray | None = None
    stream: int = 0

    def generator(self, *more: int) -> np.random.Generator:
        """A generator that depends on seed, epoch, stream and these numbers alone."""
        return np.random.default_rng([self.seed, self.epoch, *more, *[99] * self.stream])


Sampler = Callable[[Draw], np.ndarray]
"""Positions of an epoch, [N]: as many as there are pictures, each in 0..N-1."""


def instance(draw: Draw) -> np.ndarray:
    """Every picture once, in random order."""
    return draw.generator().permutation(len(draw.labels))


def _by_picture_weights(draw: Draw, weights: np.ndarray) -> np.ndarray:
    """N draws with replacement, in proportion to the weights [N]."""
    return draw.generator(1).choice(len(weights), len(weights), p=weights / weights.sum())


def class_balanced(power: float | Callable[[Any], float] = 1.0) -> Sampler:
    """Draws with replacement, each picture with weight `1 / n_y^q`: q = 1 makes classes equally likely, 0 pictures.

    Args:
        power: q, or a function of the method's settings.
    """

    def sampler(draw: Draw) -> np.ndarray:
        q = power(draw.settings) if callable(power) else power
        counts = np.bincount(draw.labels)
        return _by_picture_weights(draw, counts[draw.labels] ** -float(q))

    return sampler


def reversed_classes(draw: Draw) -> np.ndarray:
    """Draws with replacement, each class with a probability in proportion to `1 / n_c` (BBN, Sec. 3)."""
    return class_balanced(2.0)(draw)


def by_weights(draw: Draw) -> np.ndarray:
    """Draws with replacement by the weights of a train-only part; every picture once where there are none yet."""
    return instance(draw) if draw.weights is None else _by_picture_weights(draw, draw.weights)


def class_aware(pictures: int = 4) -> Sampler:
    """Classes in a shuffled cycle, and of each so many pictures from its own shuffled cycle (decoupling's sampler).

    Every aligned window of `pictures * C` draws has each class exactly `pictures` times. Cycles go on across epochs:
    where a class stands follows from the number of the draw, so nothing is kept.
    """

    def sampler(draw: Draw) -> np.ndarray:
        classes = np.unique(draw.labels)
        members = {c: np.flatnonzero(draw.labels == c) for c in classes}
        length, window = len(draw.labels), pictures * len(classes)
        first = draw.epoch * length
        start, end = first // window, -(-(first + length) // window)
        order = []
        for cycle in range(start, end):
            for c in np.random.default_rng([draw.seed, 2, cycle]).permutation(classes):
                order.append(_from_cycle(members[c], cycle * pictures, pictures, (draw.seed, 3, int(c))))
        skipped = first - start * window
        return np.concatenate(order)[skipped : skipped + length]

    return sampler


def _from_cycle(members: np.ndarray, first: int, count: int, entropy: tuple[int, ...]) -> np.ndarray:
    """So many members, from draw `first` on, of an endless row of shuffles of all of them."""
    rounds = range(first // len(members), (first + count - 1) // len(members) + 1)
    shuffled = np.concatenate([np.random.default_rng([*entropy, turn]).permutation(members) for turn in rounds])
    offset = first - rounds.start * len(members)
    return shuffled[offset : offset + count]


def deferred(sampler: Sampler, start: float = 0.8) -> Sampler:
    """Every picture once at first, and another sampler from this share of the stage on (deferred re-sampling)."""
    return lambda draw: sampler(draw) if draw.progress >= start else instance(draw)
