"""Golden counts of the published splits, and the choice of images against a transcription of the published code."""

import warnings

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from ecl_hf.data.longtail import (
    assign_folds,
    exponential_counts,
    held_out_counts,
    held_out_groups,
    longtail_indices,
    pareto_counts,
    validation_counts,
)
from ecl_hf.evidence.metrics import shot_groups


def cao_subset(targets, counts, seed):
    """`IMBALANCECIFAR10.gen_imbalanced_data` of Cao et al. 2019 (kaidic/LDAM-DRW), with a generator of its own."""
    random = np.random.RandomState(seed)
    targets = np.array(targets, dtype=np.int64)
    chosen = []
    for the_class, the_img_num in enumerate(counts):
        idx = np.where(targets == the_class)[0]
        random.shuffle(idx)
        chosen.extend(idx[:the_img_num])
    return chosen


def shuffled_labels(num_classes, per_class, seed=1):
    return np.random.RandomState(seed).permutation(np.repeat(np.arange(num_classes), per_class))


@pytest.mark.parametrize(
    ("num_classes", "max_count", "imbalance_factor", "total"),
    [
        (100, 500, 10, 19573),
        (100, 500, 50, 12608),
        (100, 500, 100, 10847),
        (100, 500, 200, 9502),
        (10, 5000, 10, 20431),
        (10, 5000, 50, 13996),
        (10, 5000, 100, 12406),
        (10, 5000, 200, 11203),
    ],
)
def test_cifar_totals(num_classes, max_count, imbalance_factor, total):
    counts = exponential_counts(num_classes, max_count, imbalance_factor)
    assert len(counts) == num_classes
    assert sum(counts) == total
    assert counts[0] == max_count
    assert counts == sorted(counts, reverse=True)
    assert all(type(count) is int for count in counts)


@pytest.mark.parametrize(
    ("imbalance_factor", "many", "medium", "few"),
    [(10, 69, 31, 0), (50, 41, 41, 18), (100, 35, 35, 30), (200, 30, 31, 39)],
)
def test_cifar100_group_sizes(imbalance_factor, many, medium, few):
    groups = shot_groups(exponential_counts(100, 500, imbalance_factor))
    assert {name: int(mask.sum()) for name, mask in groups.items()} == {"many": many, "medium": medium, "few": few}


@pytest.mark.parametrize("imbalance_factor", [10, 50, 100, 200])
def test_cifar10_has_no_few_shot_class(imbalance_factor):
    assert not shot_groups(exponential_counts(10, 5000, imbalance_factor))["few"].any()


def test_balanced_and_single_class_profiles():
    assert exponential_counts(4, 7, 1) == [7, 7, 7, 7]
    assert exponential_counts(1, 7, 1) == [7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 100, 200), "class 9.*at most 100"),
        ((10, 100, 0.5), "imbalance_factor"),
        ((10, 100, float("nan")), "imbalance_factor"),
        ((10, 100, float("inf")), "imbalance_factor"),
        ((0, 100, 10), "num_classes"),
        ((10, 0, 1), "max_count"),
    ],
)
def test_exponential_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        exponential_counts(*arguments)


def test_pareto_of_imagenet_lt():
    counts = pareto_counts(1000, 1280, 5)
    assert len(counts) == 1000
    assert sum(counts) == pytest.approx(115_846, rel=0.02)


@pytest.mark.parametrize(
    ("num_classes", "max_count", "min_count", "alpha"),
    [(1000, 1280, 5, 6.0), (10, 5000, 50, 6.0), (100, 500, 1, 2.0), (2, 9, 3, 6.0), (5, 4, 4, 6.0)],
)
def test_pareto_falls_from_max_to_min(num_classes, max_count, min_count, alpha):
    counts = pareto_counts(num_classes, max_count, min_count, alpha)
    assert len(counts) == num_classes
    assert (counts[0], counts[-1]) == (max_count, min_count)
    assert counts == sorted(counts, reverse=True)
    assert all(type(count) is int for count in counts)


def test_pareto_alpha_sets_the_weight_of_the_tail():
    assert sum(pareto_counts(100, 1000, 1, alpha=2.0)) < sum(pareto_counts(100, 1000, 1, alpha=20.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 1), "num_classes"),
        ((10, 0, 1), "max_count"),
        ((10, 10, 0), "min_count"),
        ((10, 10, 11), "min_count"),
        ((10, 10, 1, 0.0), "alpha"),
        ((10, 10, 1, float("nan")), "alpha"),
    ],
)
def test_pareto_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        pareto_counts(*arguments)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    "counts",
    [exponential_counts(10, 500, 50), [500] * 10, [3, 0, 500, 1, 0, 2, 499, 5, 0, 7]],
    ids=["exp", "all", "any"],
)
def test_indices_are_those_of_cao_et_al(counts, seed):
    labels = shuffled_labels(10, 500)
    indices = longtail_indices(labels, counts, seed)
    assert indices.dtype == np.int64
    assert indices.tolist() == cao_subset(labels, counts, seed)


def test_indices_with_unequal_and_absent_classes():
    labels = np.array([4, 0, 2, 2, 4, 2, 0, 4, 4])
    counts = [1, 0, 3, 0, 2]
    assert longtail_indices(labels, counts, 3).tolist() == cao_subset(labels, counts, 3)


def test_seed_0_is_the_default():
    labels = shuffled_labels(5, 40)
    assert np.array_equal(longtail_indices(labels, [20] * 5), longtail_indices(labels, [20] * 5, seed=0))
    assert not np.array_equal(longtail_indices(labels, [20] * 5), longtail_indices(labels, [20] * 5, seed=1))


@pytest.mark.parametrize("kind", [list, lambda labels: labels.astype(np.uint8)], ids=["list", "uint8"])
def test_label_container_does_not_matter(kind):
    labels = shuffled_labels(5, 40)
    assert np.array_equal(longtail_indices(kind(labels), [20] * 5), longtail_indices(labels, [20] * 5))


def test_arguments_and_global_generator_are_left_alone():
    labels, counts = shuffled_labels(5, 40), [9, 7, 5, 3, 1]
    before = labels.copy()
    original = np.random.get_state()
    results = []
    for global_seed in (123, 456):
        np.random.seed(global_seed)
        state = np.random.get_state()
        results.append(longtail_indices(labels, counts))
        for now, then in zip(np.random.get_state(), state, strict=True):
            assert np.array_equal(now, then)
    np.random.set_state(original)
    assert np.array_equal(*results)
    assert np.array_equal(labels, before)
    assert counts == [9, 7, 5, 3, 1]


@pytest.mark.parametrize(
    ("labels", "counts", "message"),
    [
        ([0, 1, 2], [1, 1], "2 classes"),
        ([0, -1], [1, 1], "-1"),
        ([0, 0, 0, 1, 2, 2], [3, 2, 2], "class 1 has 1 images, but 2"),
        ([0, 0, 2, 2], [1, 1, 1], "class 1 has 0 images, but 1"),
    ],
)
def test_indices_refuse(labels, counts, message):
    with pytest.raises(ValueError, match=message):
        longtail_indices(labels, counts)


def test_first_takes_each_class_in_source_order():
    labels = shuffled_labels(5, 40)
    counts = [7, 0, 40, 1, 3]
    expected = [row for c in range(5) for row in [i for i, label in enumerate(labels) if label == c][: counts[c]]]
    assert longtail_indices(labels, counts, "first").tolist() == expected


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_every_class_is_held_out_in_part(fraction):
    available = np.arange(60)
    held_out = held_out_counts(available, fraction)
    for n, found in zip(available.tolist(), held_out.tolist(), strict=True):
        assert found == (0 if n < 2 else min(max(round(n * fraction), 1), n - 1))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_held_out_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        held_out_counts([5, 5], fraction)


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, [0, 0, 1, 1, 1, 10]), (0.9, [0, 0, 1, 2, 8, 90])])
def test_every_class_of_three_pictures_gets_one_to_validate(fraction, expected):
    assert validation_counts([1, 2, 3, 4, 10, 100], fraction).tolist() == expected


def grouped(seed, classes=8, number=60):
    """Labels and groups of long-tailed pictures; a group prefers a class or two, as an animal or a site does."""
    random = np.random.default_rng(seed)
    counts = (random.integers(30, 200) * random.uniform(0.4, 0.9) ** np.arange(classes)).astype(int) + 1
    labels = random.permutation(np.repeat(np.arange(classes), counts))
    groups = np.where(random.random(len(labels)) < 0.7, labels * 7 % number, 0) + random.integers(0, 6, len(labels))
    return labels, groups, counts


@pytest.mark.parametrize("seed", range(8))
def test_held_out_groups_are_whole_leave_all_classes_and_none_more_would_help(seed):
    labels, groups, counts = grouped(seed)
    wanted, least = held_out_counts(counts, 0.2), np.minimum(counts, 1)
    chosen = held_out_groups(labels, groups, wanted, least, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    kept = np.setdiff1d(np.arange(len(labels)), chosen)
    assert not set(groups[chosen]) & set(groups[kept])
    assert (np.bincount(labels[kept], minlength=len(counts)) >= least).all()

    def distance(held):
        return sum(((held[c] - wanted[c]) / counts[c]) ** 2 for c in range(len(counts)))

    held = np.bincount(labels[chosen], minlength=len(counts))
    for group in set(groups[kept]):
        more = held + np.bincount(labels[groups == group], minlength=len(counts))
        assert distance(more) >= distance(held) - 1e-9 or (counts - more < least).any()
    assert held_out_groups(labels, groups, wanted, least, seed).tolist() == chosen.tolist()


def test_groups_of_one_picture_give_the_wanted_numbers():
    labels, _, counts = grouped(0)
    wanted = held_out_counts(counts, 0.3)
    for seed in (0, 1, "first"):
        chosen = held_out_groups(labels, np.arange(len(labels)), wanted, np.minimum(counts, 1), seed)
        assert np.bincount(labels[chosen], minlength=len(counts)).tolist() == wanted.tolist()
    assert chosen.tolist() == np.sort(longtail_indices(labels, wanted, "first")).tolist()


def test_shares_of_the_classes_are_as_near_as_those_of_scikit_learn():
    ours, theirs = [], []
    for seed in range(12):
        labels, groups, counts = grouped(seed)
        wanted = held_out_counts(counts, 0.2)
        with warnings.catch_warnings():  # classes of three pictures
            warnings.simplefilter("ignore")
            _, fold = next(StratifiedGroupKFold(5).split(labels, labels, groups))
        chosen = held_out_groups(labels, groups, wanted, np.minimum(counts, 1))
        for errors, rows in ((ours, chosen), (theirs, fold)):
            held = np.bincount(labels[rows], minlength=len(counts))
            errors.append(np.abs((held - wanted) / counts).mean())
    assert np.mean(ours) <= np.mean(theirs)


def test_no_group_can_go_that_has_all_of_a_class():
    labels, groups = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
    assert not len(held_out_groups(labels, groups, np.array([1, 1]), np.array([1, 1])))


@pytest.mark.parametrize("sizes", [None, 1, 4])
def test_folds_take_each_image_once_and_leave_some_of_its_class(sizes):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [40, 23, 9, 5, 2, 1])
    groups = None if sizes is None else rng.integers(1 + len(labels) // sizes, size=len(labels))
    found = assign_folds(labels, groups, 4, seed=3)
    assert set(found) <= {-1, 0, 1, 2, 3}
    for fold in range(4):
        assert set(labels[found != fold]) == set(labels)
    together = np.arange(len(labels)) if groups is None else groups
    for group in np.unique(together):
        assert len({*found[together == group]} - {-1}) <= 1
    if groups is None:
        for label, count in enumerate(np.bincount(labels)):
            parts = np.bincount(found[(labels == label) & (found >= 0)], minlength=4)
            assert parts.sum() == (count if count > 1 else 0)
            assert parts.max() - parts.min() <= 1
    assert found.tolist() == assign_folds(labels, groups, 4, seed=3).tolist()
    assert found.tolist() != assign_folds(labels, groups, 4, seed=4).tolist()
