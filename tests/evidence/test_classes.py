"""Scores of each class, the worst ones, and which classes are confused."""

import base64
import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from ecl_hf.evidence.classes import class_rows, classes_csv, confused_pairs, mistakes, ranked_classes, thumbnail
from ecl_hf.heads import log_prior_shift

COUNTS = [500, 60, 7, 3, 1]


@pytest.fixture
def found():
    """Logits of 60 pictures of four classes; none is of the fifth."""
    labels = torch.arange(60) % 4
    return torch.randn(60, 5, dtype=torch.float64) + torch.nn.functional.one_hot(labels, 5), labels


def test_scores_of_classes_are_those_of_scikit_learn(found):
    logits, labels = found
    rows = class_rows(logits, labels, COUNTS, torch.ones(5))
    assert [row["training_images"] for row in rows] == COUNTS
    assert [row["test_images"] for row in rows] == [15, 15, 15, 15, 0]
    moved = logits - log_prior_shift([1] * 5, torch.tensor(COUNTS))
    assert (moved.argmax(-1) != logits.argmax(-1)).any()
    for ending, scores in (("", logits), ("_training_prior", moved)):
        _, recall, f1, _ = precision_recall_fscore_support(
            labels.numpy(), scores.argmax(-1).numpy(), labels=range(5), zero_division=0
        )
        assert [row[f"accuracy{ending}"] for row in rows[:4]] == pytest.approx(recall[:4].tolist())
        assert [row[f"f1{ending}"] for row in rows[:4]] == pytest.approx(f1[:4].tolist())
        assert rows[4][f"accuracy{ending}"] is rows[4][f"f1{ending}"] is None


def test_table_has_the_worst_class_first_and_nothing_to_compute():
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 0, 0, 0, 0]), 4).float()
    rows = class_rows(logits, labels, [9, 8, 7, 6], torch.ones(4))
    assert ranked_classes(rows) == [1, 2, 0, 3]
    text = classes_csv(rows, ["a, b", "=HYPERLINK(1)", "c\nd", "e"])
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["class"] for row in table] == ["'=HYPERLINK(1)", "c\nd", "a, b", "e"]
    assert table[2] | {"f1": "", "f1_training_prior": ""} == {
        **{"class": "a, b", "training_images": "9", "test_images": "2", "accuracy": "0.5000", "f1": ""},
        **{"accuracy_training_prior": "0.5000", "f1_training_prior": ""},
    }
    assert table[3]["accuracy"] == ""


def test_confused_pairs_are_counted(found):
    logits, labels = found
    predictions = logits.argmax(-1)
    pairs = confused_pairs(predictions, labels, 5, most=99)
    counted = {}
    for truth, guess in zip(labels.tolist(), predictions.tolist(), strict=True):
        if truth != guess:
            counted[truth, guess] = counted.get((truth, guess), 0) + 1
    assert {pair[:2]: pair[2] for pair in pairs} == counted
    assert [pair[2] for pair in pairs] == sorted(counted.values(), reverse=True)
    assert confused_pairs(predictions, labels, 5, most=2) == pairs[:2]
    assert confused_pairs(labels, labels, 5) == []


def test_mistakes_are_the_most_confident_ones(found):
    logits, labels = found
    rows = class_rows(logits, labels, COUNTS, torch.ones(5))
    made = mistakes(logits, labels, rows, lambda i: None if i == 2 else f"picture {i}")
    confidence, predictions = logits.softmax(-1).max(-1)
    assert [entry["class"] for entry in made["worst"]] == ranked_classes(rows)[:4]
    for entry in made["worst"]:
        c = entry["class"]
        assert entry["right"] / entry["images"] == pytest.approx(rows[c]["accuracy"])
        wrong = [i for i in range(60) if labels[i] == c != predictions[i]]
        wrong = sorted(wrong, key=lambda i: -confidence[i].item())[:4]
        assert [shown["src"] for shown in entry["pictures"]] == [f"picture {i}" for i in wrong if i != 2]
    first = made["confused"][0]
    assert (first["class"], first["predicted"], first["images"]) == confused_pairs(predictions, labels, 5)[0]
    assert first["of"] == 15
    assert {shown["predicted"] for shown in first["pictures"]} == {first["predicted"]}


@pytest.mark.parametrize(("size", "kind"), [((8, 8), "png"), ((32, 20), "png"), ((900, 600), "jpeg")])
def test_thumbnails_are_small_and_hold_nothing_but_pixels(size, kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    image.info |= {"comment": b"secret place", "exif": b"Exif\x00\x00secret place"}
    head, _, text = thumbnail(image).partition(",")
    assert head == f"data:image/{kind};base64"
    file = base64.b64decode(text)
    assert len(file) < 10_000
    assert b"secret" not in file
    with Image.open(io.BytesIO(file)) as small:
        assert max(small.size) == min(96, max(size))
        if kind == "png":
            assert np.array_equal(np.asarray(small), np.asarray(image))
