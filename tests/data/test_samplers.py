"""Samplers: which picture comes next, as pure functions; against counting, closed forms and each other."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ecl_hf.data.loaders import EpochSampler, Pick, ViewDataset, occurrences, train_loader
from ecl_hf.data.samplers import (
    Draw,
    by_weights,
    class_aware,
    class_balanced,
    deferred,
    instance,
    reversed_classes,
)

COUNTS = [600, 250, 80, 25, 9, 3]
LABELS = np.random.RandomState(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
EVERY = {
    "instance": instance,
    "class_balanced": class_balanced(),
    "square_root": class_balanced(0.5),
    "reversed": reversed_classes,
    "class_aware": class_aware(4),
    "deferred": deferred(class_balanced(), 0.5),
}


def draw(epoch=0, seed=0, **more):
    return Draw(seed, epoch, LABELS, **more)


@pytest.mark.parametrize("name", EVERY)
def test_pure_and_of_full_length(name):
    orders = [EVERY[name](draw(epoch, seed)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all(len(order) == len(LABELS) and order.min() >= 0 and order.max() < len(LABELS) for order in orders)
    assert (EVERY[name](draw()) == orders[0]).all()
    assert (orders[0] != orders[1]).any()
    assert (orders[0] != orders[2]).any()


def frequencies(sampler, epochs=40):
    drawn = np.concatenate([LABELS[sampler(draw(epoch))] for epoch in range(epochs)])
    return np.bincount(drawn, minlength=len(COUNTS)) / len(drawn)


@pytest.mark.parametrize(
    ("sampler", "class_weight"),
    [
        (class_balanced(), lambda _: 1.0),
        (class_balanced(0.5), lambda n: n**0.5),
        (class_balanced(0.0), lambda n: n),
        (class_balanced(lambda _: 1.0), lambda _: 1.0),
        (reversed_classes, lambda n: 1 / n),
    ],
)
def test_class_frequencies(sampler, class_weight):
    expected = np.array([class_weight(n) for n in COUNTS], float)
    expected /= expected.sum()
    drawn = 40 * len(LABELS)
    assert np.abs(frequencies(sampler) - expected).max() < 5 * np.sqrt(0.25 / drawn)


@pytest.mark.parametrize("pictures", [1, 2, 4])
def test_class_aware_cycles(pictures):
    sampler = class_aware(pictures)
    order = np.concatenate([sampler(draw(epoch)) for epoch in range(6)])
    window = pictures * len(COUNTS)
    for start in range(0, len(order) - window, window):
        assert (np.bincount(LABELS[order[start : start + window]], minlength=len(COUNTS)) == pictures).all()
    groups = order[: len(order) // pictures * pictures].reshape(-1, pictures)
    assert (LABELS[groups] == LABELS[groups][:, :1]).all()
    for c, count in enumerate(COUNTS):  # each class's own pictures come in rounds of all of them, across epochs
        own = order[LABELS[order] == c]
        for start in range(0, len(own) - count, count):
            assert len(set(own[start : start + count])) == count


def test_deferred_switches_at_its_share():
    sampler = deferred(class_balanced(), 0.5)
    assert (sampler(draw(progress=0.49)) == instance(draw())).all()
    assert (sampler(draw(progress=0.5)) == class_balanced()(draw())).all()


def test_by_weights_draws_what_has_weight():
    weights = np.zeros(len(LABELS))
    weights[[3, 8]] = [1.0, 3.0]
    drawn = by_weights(draw(weights=weights))
    assert set(drawn) == {3, 8}
    assert 0.68 < (drawn == 8).mean() < 0.82
    assert (by_weights(draw()) == instance(draw())).all()


def test_occurrences_count_what_came_before():
    order = np.array([4, 1, 4, 4, 0, 1])
    seen: dict[int, int] = {}
    expected = []
    for number in order.tolist():
        expected.append(seen.get(number, 0))
        seen[number] = expected[-1] + 1
    assert occurrences(order).tolist() == expected


def random_pixels(image):
    return torch.rand(1, 2, 2)


def dataset(counts=(30, 6, 2)):
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    pictures = [Image.new("RGB", (4, 4), (row, 0, 0)) for row in range(len(labels))]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=len(counts))})
    return ViewDataset(
        datasets.Dataset.from_dict({"image": pictures, "label": labels}, columns), {"pixel_values": random_pixels}, 5
    )


def test_a_picture_that_comes_again_is_augmented_anew():
    pictures = dataset()
    loader = train_loader(pictures, 2, sampler=class_balanced())
    seen = [
        (row, tuple(x.flatten().tolist()))
        for b in loader
        for row, x in zip(b["indices"], b["pixel_values"], strict=True)
    ]
    assert len({pixels for _, pixels in seen}) == len(seen) == 38
    assert len({int(row) for row, _ in seen}) < 30
    again = [tuple(x.flatten().tolist()) for batch in loader for x in batch["pixel_values"]]
    assert again == [pixels for _, pixels in seen]


@pytest.mark.parametrize("workers", [0, 2])
def test_second_stream(workers):
    pictures = dataset()
    loader = train_loader(pictures, 2, num_workers=workers, partners=class_balanced())
    alone = train_loader(pictures, 2)
    partners = []
    for both, single in zip(loader, alone, strict=True):
        assert torch.equal(both["indices"], single["indices"])
        assert torch.equal(both["pixel_values"], single["pixel_values"])
        partners += both["partner_labels"].tolist()
    assert 0.15 < np.mean(np.array(partners) == 0) < 0.55  # of three classes, not 79 % as in the first stream
    pick = next(pick for pick in EpochSampler(pictures, 1, instance, instance) if pick.row == pick.partner)
    item = pictures[Pick(pick.row, 0, pick.row, 0)]
    assert not torch.equal(item["pixel_values"], item["partner_pixel_values"])
