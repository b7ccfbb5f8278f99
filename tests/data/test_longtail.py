"""Golden counts of the published splits, and the choice of images against a transcription of the published code."""

import numpy as np
import pytest

from ecl_hf.data.longtail import exponential_counts, held_out_counts, longtail_indices, pareto_counts, validation_counts
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
