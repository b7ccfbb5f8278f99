"""The reading of instance difficulty by a loop, and what must hold for any predictions."""

import math

import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.methods import METHODS, tde_idr
from ecl_hf.methods.base import EpochContext, PartsContext, Time

NUM_IMAGES, NUM_CLASSES = 12, 4
LABELS = torch.arange(NUM_IMAGES) % NUM_CLASSES


def draw():
    return torch.randn(NUM_IMAGES, NUM_CLASSES).double().softmax(-1)


def by_loop(before, now, labels):
    """(unlearned, learned) of each image."""
    moves = []
    for q0, q1, y in zip(before.tolist(), now.tolist(), labels.tolist(), strict=True):
        unlearned = learned = 0.0
        for j in range(NUM_CLASSES):
            a, b = max(q0[j], 1e-6), max(q1[j], 1e-6)
            d = (b - a) * math.log(b / a)
            if (b < a) if j == y else (b > a):
                unlearned += d
            else:
                learned += d
        moves.append((unlearned, learned))
    return torch.tensor(moves, dtype=torch.double).unbind(-1)


def test_moves_by_a_loop():
    before, now = draw(), draw()
    before[0], now[1] = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    unlearned, learned = tde_idr.prediction_moves(before, now, LABELS)
    for actual, expected in zip((unlearned, learned), by_loop(before, now, LABELS), strict=True):
        assert_close(actual, expected)
        assert (actual >= 0).all()


def test_the_other_way_round_learning_is_unlearning():
    before, now = draw(), draw()
    there, back = tde_idr.prediction_moves(before, now, LABELS), tde_idr.prediction_moves(now, before, LABELS)
    assert_close(there, back[::-1])


def test_what_is_hard():
    still = tde_idr.prediction_moves(q := draw(), q, LABELS)
    assert_close(tde_idr.difficulty(*still, 1.0), torch.ones(NUM_IMAGES).double())
    certain = torch.eye(NUM_CLASSES).double()[LABELS]
    learner = tde_idr.difficulty(*tde_idr.prediction_moves(q, certain, LABELS), 1.0)
    assert (learner < 1).all()
    assert_close(tde_idr.difficulty(*tde_idr.prediction_moves(certain, q, LABELS), 1.0), 1 / learner)
    distant = tde_idr.difficulty(*tde_idr.prediction_moves(certain, q, LABELS), 1e9)
    assert_close(distant, torch.ones(NUM_IMAGES).double(), rtol=1e-6, atol=0)


def test_the_part_follows_all_images_over_the_epochs():
    method = METHODS["tde_idr"]
    model = ECLForImageClassification(ECLConfig(architecture="resnet20_cifar", num_experts=1, num_labels=NUM_CLASSES))
    settings = method.settings(difficulty_prior=0.5)
    counts = LABELS.bincount()
    part = tde_idr.Difficulty(PartsContext(model, settings, counts, LABELS))
    assert_close(part.picture_weights, torch.ones(NUM_IMAGES))
    before, sums = torch.full((NUM_IMAGES, NUM_CLASSES), 1 / NUM_CLASSES), torch.zeros(2, NUM_IMAGES)
    for epoch in range(3):
        logits = torch.randn(NUM_IMAGES, 1, NUM_CLASSES)
        labels = LABELS.clone()
        labels[5] = -1  # could not be decoded
        part.after_epoch(EpochContext(Time(epoch, 3), model, settings, counts, lambda: (labels, logits, None)))  # noqa: B023
        now = logits[:, 0].softmax(-1)
        sums += torch.stack(by_loop(before, now, LABELS)).float()
        before = now
    expected = (0.5 + sums[0]) / (0.5 + sums[1])
    expected[5] = 1.0
    assert_close(part.picture_weights, expected, rtol=1e-4, atol=1e-5)
    again = tde_idr.Difficulty(PartsContext(model, settings, counts, LABELS))
    again.load_state_dict(part.state_dict())
    assert torch.equal(again.picture_weights, part.picture_weights)
