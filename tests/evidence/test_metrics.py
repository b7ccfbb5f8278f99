"""Reported numbers against loops over single images."""

import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch.testing import assert_close

from ecl_hf.evidence.metrics import (
    class_accuracy,
    confusion_matrix,
    expected_calibration_error,
    feature_distance,
    group_accuracy,
    macro_f1,
    reliability_table,
    shot_groups,
    topk_accuracy,
)


def group_of(count):
    return next(name for name, mask in shot_groups([count]).items() if mask.item())


def accuracy_by_loop(predictions, labels, counts):
    """Of the images, and of the classes that have some."""
    hits = {}
    for prediction, label in zip(predictions.tolist(), labels.tolist(), strict=True):
        hits.setdefault(label, []).append(prediction == label)
    classes = {"overall": [], "balanced": [], "many": [], "medium": [], "few": []}
    for label, found in hits.items():
        group = "many" if counts[label] > 100 else "few" if counts[label] < 20 else "medium"
        classes["overall"] += found
        for name in ("balanced", group):
            classes[name].append(sum(found) / len(found))
    return {name: sum(values) / len(values) if values else None for name, values in classes.items()}


def ece_by_loop(probabilities, labels, num_bins):
    """Bins of equal width on the confidence; the confidence 1 belongs to the last bin."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    bins = [[] for _ in range(num_bins)]
    for row, label in zip(probabilities, labels.tolist(), strict=True):
        confidence = row.max()
        bins[min(int(confidence * num_bins), num_bins - 1)].append((confidence, row.argmax() == label))
    error = 0.0
    for members in bins:
        if members:
            confidence, accuracy = np.mean(members, axis=0)
            error += len(members) / len(labels) * abs(accuracy - confidence)
    return error


def binary_rows(confidences):
    confidences = torch.tensor(confidences, dtype=torch.double)
    return torch.stack([confidences, 1 - confidences], dim=1)


@pytest.mark.parametrize(
    ("count", "group"),
    [(0, "few"), (19, "few"), (20, "medium"), (100, "medium"), (101, "many"), (5000, "many")],
)
def test_shot_group_boundaries(count, group):
    assert group_of(count) == group


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_shot_groups_are_masks_that_part_the_classes(kind):
    groups = shot_groups(kind([500, 101, 100, 20, 19, 0]))
    assert {name: mask.tolist() for name, mask in groups.items()} == {
        "many": [True, True, False, False, False, False],
        "medium": [False, False, True, True, False, False],
        "few": [False, False, False, False, True, True],
    }
    assert all(mask.dtype == torch.bool for mask in groups.values())


@pytest.mark.parametrize(
    "counts",
    [
        [300, 101, 100, 20, 19, 2],
        [300, 200, 150, 120, 110, 101],
        [300, 200, 50, 40, 30, 20],
        [50] * 6,
        [1] * 6,
        [19, 300, 20, 101, 2, 100],
    ],
)
def test_group_accuracy_against_a_loop(counts):
    labels = torch.randint(6, (200,))
    predictions = torch.where(torch.rand(200) < 0.5, labels, torch.randint(6, (200,)))
    measured, expected = group_accuracy(predictions, labels, counts), accuracy_by_loop(predictions, labels, counts)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == (None if value is None else pytest.approx(value, rel=1e-12))


def test_group_accuracy_without_test_images_is_none():
    """Group *few* has a class, but the test set holds no image of it; *medium* has no class at all."""
    result = group_accuracy(torch.tensor([0, 1]), torch.tensor([0, 0]), [500, 3])
    assert result == {"overall": 0.5, "balanced": 0.5, "many": 0.5, "medium": None, "few": None}


def test_group_accuracy_of_no_hit_is_zero():
    result = group_accuracy(torch.tensor([1, 0]), torch.tensor([0, 1]), [500, 3])
    assert result == {"overall": 0.0, "balanced": 0.0, "many": 0.0, "medium": None, "few": 0.0}


def test_balanced_accuracy_and_macro_f1_are_those_of_scikit_learn():
    labels = torch.randint(7, (300,)).clamp_max(5)  # the last class has no image, but is predicted
    predictions = torch.where(torch.rand(300) < 0.6, labels, torch.randint(7, (300,)))
    seen = [0, 1, 2, 3, 4, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the class that is only predicted
        expected = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert group_accuracy(predictions, labels, [9] * 7)["balanced"] == pytest.approx(expected, rel=1e-12)
    expected = sklearn.metrics.f1_score(labels, predictions, labels=seen, average="macro")
    assert macro_f1(predictions, labels, 7) == pytest.approx(expected, rel=1e-12)


def test_group_accuracy_refuses_unlike_shapes():
    with pytest.raises(ValueError, match=r"\[2\].*\[1\]"):
        group_accuracy(torch.tensor([0, 1]), torch.tensor([0]), [5, 5])


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("num_classes", [2, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ece_against_a_loop(num_bins, num_classes, dtype):
    probabilities = (4 * torch.randn(300, num_classes, dtype=dtype)).softmax(-1)
    probabilities[:20] = torch.eye(num_classes, dtype=dtype)[torch.randint(num_classes, (20,))]  # confidence 1
    labels = torch.where(torch.rand(300) < 0.6, probabilities.argmax(-1), torch.randint(num_classes, (300,)))
    expected = ece_by_loop(probabilities, labels, num_bins)
    assert expected > 0.01
    assert expected_calibration_error(probabilities, labels, num_bins) == pytest.approx(expected, abs=1e-12)


def test_ece_has_15_bins_by_default():
    probabilities, labels = torch.randn(300, 5).softmax(-1), torch.randint(5, (300,))
    assert expected_calibration_error(probabilities, labels) == pytest.approx(ece_by_loop(probabilities, labels, 15))
    assert ece_by_loop(probabilities, labels, 15) != pytest.approx(ece_by_loop(probabilities, labels, 10))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_ece_of_the_smallest_confidence(num_classes):
    """Uniform rows: the confidence is 1 / C, and the first class is predicted."""
    probabilities = torch.full((4, num_classes), 1 / num_classes)
    assert expected_calibration_error(probabilities, torch.tensor([0, 0, 0, 1])) == pytest.approx(
        0.75 - 1 / num_classes
    )


def test_ece_of_confidence_one():
    """A certain mistake shares the last bin with confidences just below one, and is not lost."""
    certain = binary_rows([1.0, 1.0])
    assert expected_calibration_error(certain, torch.tensor([0, 0])) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(certain, torch.tensor([1, 1])) == pytest.approx(1)
    mixed = expected_calibration_error(binary_rows([1.0, 0.95]), torch.tensor([1, 0]))
    assert mixed == pytest.approx(abs(0.5 - (1.0 + 0.95) / 2))


@pytest.mark.parametrize("num_bins", [4, 15])
def test_ece_bins_end_at_equal_distances(num_bins):
    """A hit and a miss around an inner edge lie in two bins; on the same side of it, in one."""
    for edge in (e / num_bins for e in range(num_bins // 2 + 1, num_bins)):
        below, above, further = edge - 1e-6, edge + 1e-6, edge + 2e-6
        apart = expected_calibration_error(binary_rows([below, above]), torch.tensor([0, 1]), num_bins)
        assert apart == pytest.approx((1 - below + above) / 2)
        together = expected_calibration_error(binary_rows([further, above]), torch.tensor([0, 1]), num_bins)
        assert together == pytest.approx(abs(0.5 - (further + above) / 2))


@pytest.mark.parametrize(
    ("bins", "expected"),
    [
        ([(0.9, 9, 10), (0.75, 3, 4), (0.5, 1, 2)], 0.0),  # calibrated
        ([(0.9, 5, 10)], 0.4),  # too confident
        ([(0.6, 10, 10)], 0.4),  # too modest
        ([(0.9, 0, 5), (0.6, 15, 15)], (5 * 0.9 + 15 * 0.4) / 20),  # the two do not cancel
    ],
)
def test_ece_known_answers(bins, expected):
    confidences = [confidence for confidence, _, size in bins for _ in range(size)]
    labels = [int(i >= hits) for _, hits, size in bins for i in range(size)]
    assert expected_calibration_error(binary_rows(confidences), torch.tensor(labels)) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_feature_distance_against_a_loop(dtype):
    a, b = torch.randn(2, 30, 6, dtype=dtype)
    labels = torch.randint(4, (30,))
    by_class = [[] for _ in range(5)]
    for i, label in enumerate(labels.tolist()):
        by_class[label].append(math.sqrt(sum((a[i, d].item() - b[i, d].item()) ** 2 for d in range(6))))
    expected = torch.tensor([np.mean(distances) if distances else math.nan for distances in by_class], dtype=dtype)
    assert expected[4].isnan()
    assert_close(feature_distance(a, b, labels, 5), expected, equal_nan=True)
    assert_close(feature_distance(b, a, labels, 5), expected, equal_nan=True)


def test_feature_distance_of_equal_features_is_zero():
    features = torch.randn(6, 3)
    assert feature_distance(features, features, torch.tensor([0, 0, 1, 1, 2, 2]), 3).tolist() == [0, 0, 0]


def test_top5_against_a_loop():
    logits, labels = torch.randn(40, 9), torch.randint(9, (40,))
    hits = [label in sorted(range(9), key=lambda c: -row[c])[:5] for row, label in zip(logits, labels, strict=True)]
    assert 0.3 < np.mean(hits) < 0.8
    assert topk_accuracy(logits, labels) == pytest.approx(np.mean(hits))
    assert topk_accuracy(logits, labels, k=1) == pytest.approx((logits.argmax(-1) == labels).double().mean().item())


@pytest.mark.parametrize(("num_classes", "counts"), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(num_classes, counts):
    assert (topk_accuracy(torch.randn(3, num_classes), torch.tensor([0, 1, 1])) is not None) == counts


def test_confusion_and_class_accuracy_by_hand():
    labels, predictions = torch.tensor([0, 0, 0, 1, 3]), torch.tensor([0, 2, 0, 0, 3])
    assert confusion_matrix(predictions, labels, 4).tolist() == [[2, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    accuracy = class_accuracy(predictions, labels, 4)
    assert_close(accuracy, torch.tensor([2 / 3, 0, math.nan, 1], dtype=torch.double), equal_nan=True)


def test_class_accuracy_is_the_diagonal_of_the_confusion():
    labels, predictions = torch.randint(6, (2, 200))
    matrix = confusion_matrix(predictions, labels, 6)
    assert_close(class_accuracy(predictions, labels, 6), matrix.diagonal().double() / matrix.sum(1))
    assert matrix.sum() == 200


def test_reliability_table_by_hand():
    """Four bins; the edge 0.75 belongs to the bin above it, the confidence 1 to the last one."""
    table = reliability_table(binary_rows([0.6, 0.7, 0.75, 1.0]), torch.tensor([0, 1, 1, 0]), num_bins=4)
    assert table["share"] == [0, 0, 0.5, 0.5]
    assert table["confidence"] == [None, None, pytest.approx(0.65), pytest.approx(0.875)]
    assert table["accuracy"] == [None, None, 0.5, 0.5]


@pytest.mark.parametrize("num_classes", [2, 10])
def test_calibration_error_is_that_of_the_table(num_classes):
    probabilities, labels = (3 * torch.randn(500, num_classes)).softmax(-1), torch.randint(num_classes, (500,))
    table = reliability_table(probabilities, labels)
    assert len(table["share"]) == 15
    bins = zip(table["share"], table["confidence"], table["accuracy"], strict=True)
    error = sum(share * abs(accuracy - confidence) for share, confidence, accuracy in bins if share)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(error, abs=1e-12)
