"""Long-tailed protocols: how many images each class keeps, and which ones (Sec. VI-A)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.sparse import coo_array


def exponential_counts(num_classes: int, max_count: int, imbalance_factor: float) -> list[int]:
    """Exponential profile of CIFAR-LT (Cao et al. 2019): `int(n_max * gamma^(-i / (C - 1)))`.

    Args:
        num_classes: number of classes C.
        max_count: images of the largest class, n_max.
        imbalance_factor: gamma, the largest count over the smallest.

    Raises:
        ValueError: a number is out of range, or the smallest class would be left without an image.
    """
    _check_profile(num_classes, max_count)
    if not imbalance_factor >= 1:
        raise ValueError(f"imbalance_factor must be at least 1, got {imbalance_factor}")
    # gamma = 1 / (1 / gamma) as in the published code, whose rounding decides some counts.
    ratio = 1 / imbalance_factor
    counts = [int(max_count * ratio ** (i / max(1, num_classes - 1))) for i in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(
            f"imbalance_factor {imbalance_factor} leaves class {num_classes - 1} without images, "
            f"since the largest class has {max_count}; use a factor of at most {max_count}"
        )
    return counts


def pareto_counts(num_classes: int, max_count: int, min_count: int, alpha: float = 6.0) -> list[int]:
    """Pareto profile of ImageNet-LT (Liu et al. 2019), cut to [min_count, max_count].

    Class i takes the (i + 1) / C upper quantile of a Pareto distribution that starts at zero (Lomax), scaled so that
    the first class has `max_count` images; classes below `min_count` are raised to it. For ImageNet-LT's numbers
    (1000, 1280, 5) this gives 117,059 images against the official list's 115,846.

    Args:
        num_classes: number of classes C.
        max_count: images of the largest class.
        min_count: images of the smallest class.
        alpha: power of the distribution.

    Raises:
        ValueError: a number is out of range.
    """
    _check_profile(num_classes, max_count)
    if not 1 <= min_count <= max_count:
        raise ValueError(f"min_count must lie in 1..{max_count} (max_count), got {min_count}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    quantiles = [((i + 1) / num_classes) ** (-1 / alpha) - 1 for i in range(num_classes)]
    top = quantiles[0] or 1.0
    return [max_count] + [max(min_count, int(max_count * q / top)) for q in quantiles[1:]]


def _check_profile(num_classes: int, max_count: int) -> None:
    if num_classes < 1 or max_count < 1:
        raise ValueError(f"num_classes and max_count must be at least 1, got {num_classes} and {max_count}")


def held_out_counts(available: Sequence[int] | np.ndarray, fraction: float) -> np.ndarray:
    """How many images of each class to hold out for testing.

    Args:
        available: images of each class, [C].
        fraction: part of each class, in (0, 1); rounded, half to even.

    Returns:
        [C]; at least 1 and at most all but one where a class has two images, 0 where it has fewer.

    Raises:
        ValueError: a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must lie in (0, 1), got {fraction}")
    available = np.asarray(available)
    held_out = np.rint(available * fraction).astype(np.int64)
    return np.where(available >= 2, np.clip(held_out, 1, np.maximum(1, available - 1)), 0)


def validation_counts(available: Sequence[int] | np.ndarray, fraction: float) -> np.ndarray:
    """How many training images of each class to hold out for validation.

    Args:
        available: images of each class, [C].
        fraction: part of each class, in (0, 1); rounded, half to even.

    Returns:
        [C]; at least 1 and at most all but two where a class has three images, 0 where it has fewer.
    """
    available = np.asarray(available)
    return np.where(available >= 3, np.clip(np.rint(available * fraction), 1, np.maximum(1, available - 2)), 0).astype(
        np.int64
    )


def longtail_indices(
    labels: Sequence[int] | np.ndarray, counts: Sequence[int] | np.ndarray, seed: int | Literal["first"] = 0
) -> np.ndarray:
    """Choose the images of a long-tailed subset.

    For each class in label order, its positions are shuffled by numpy's legacy generator and the first `counts[c]` are
    taken: the procedure of Cao et al. (2019), who use seed 0.

    Args:
        labels: class of each image, [N].
        counts: images to keep of each class, [C].
        seed: of `numpy.random.RandomState`, or "first": take each class's first images without shuffling. The global
            generator is left alone.

    Returns:
        int64 positions, class after class, [sum(counts)].

    Raises:
        ValueError: counts that are no whole numbers, a label outside 0..C-1, or a class with too few images.
    """
    labels = np.asarray(labels)
    wanted = np.asarray(counts)
    if not np.issubdtype(wanted.dtype, np.integer) or wanted.min() < 0:
        raise ValueError(f"counts must be non-negative whole numbers, got {wanted[:10]}")
    if len(labels) and (labels.min() < 0 or labels.max() >= len(wanted)):
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, but there are {len(wanted)} classes")
    available = np.bincount(labels, minlength=len(wanted))
    if short := np.flatnonzero(available < wanted).tolist():
        c = short[0]
        raise ValueError(f"class {c} has {available[c]} images, but {wanted[c]} are wanted ({len(short)} such classes)")
    random = None if seed == "first" else np.random.RandomState(seed)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(available)[:-1])
    chosen = []
    for positions, count in zip(by_class, wanted, strict=True):
        if random:
            random.shuffle(positions)
        chosen.append(positions[:count])
    return np.concatenate(chosen).astype(np.int64)


def held_out_groups(
    labels: np.ndarray,
    groups: np.ndarray,
    wanted: np.ndarray,
    least: np.ndarray,
    seed: int | Literal["first"] = 0,
) -> np.ndarray:
    """Choose whole groups to hold out, so that each class comes near to its wanted number of images.

    Greedy: the group that most lowers the sum over classes of ((held out - wanted) / images)^2 is held out next, until
    none lowers it. Rare classes count as much as frequent ones. With a group of its own for each image the wanted
    numbers are met.

    Args:
        labels: class of each image, [N].
        groups: group of each image, whole numbers from 0, [N].
        wanted: images to hold out of each class, [C].
        least: images that must stay of each class, [C].
        seed: decides among equal groups; "first": the earlier one.

    Returns:
        int64 positions, ascending; none if no group can go.
    """
    number = int(groups.max()) + 1
    order = np.arange(number) if seed == "first" else np.random.RandomState(seed).permutation(number)
    place = np.argsort(order)[groups]
    table = coo_array((np.ones(len(labels)), (place, labels)), shape=(number, len(wanted))).tocsr()
    table.sum_duplicates()
    images = np.maximum(table.sum(0), 1)
    rows, weights, room = table.tocoo().row, 1 / images**2, table.sum(0) - least
    size, held = table.power(2) @ weights, np.zeros(len(wanted))
    free, taken = np.ones(number, bool), np.zeros(number, bool)
    while free.any():
        free[rows[table.data > (room - held)[table.indices]]] = False
        gain = np.where(free, table @ (2 * weights * (wanted - held)) - size, -np.inf)
        best = int(gain.argmax())
        if not gain[best] > 1e-12:
            break
        free[best], taken[best] = False, True
        held += table[[best]].sum(0)
    return np.flatnonzero(taken[place])


def assign_folds(labels: np.ndarray, groups: np.ndarray | None, folds: int, seed: int = 0) -> np.ndarray:
    """Divide images for cross-validation, each class as evenly as its groups allow.

    Args:
        labels: class of each image, [N].
        groups: group of each image, which is not divided, [N]; each image is one of its own when None.
        folds: number of parts.
        seed: of the division.

    Returns:
        int64 fold of each image, [N]; -1 where it would take with it all that there is of the class.
    """
    groups = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    _, first = np.unique(groups, return_index=True)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(first)), labels[first]))
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[order] = np.arange(len(first)) % folds
    found = fold_of_group[groups]
    table = np.zeros((labels.max() + 1, folds), np.int64)
    np.add.at(table, (labels, found), 1)
    found[table[labels, found] == table.sum(1)[labels]] = -1
    return found
