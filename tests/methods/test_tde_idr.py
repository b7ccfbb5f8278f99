"""The reading of instance difficulty by a loop, and what must hold for any predictions."""

import math

import torch
from torch.testing import assert_close

from ecl_hf.methods import tde_idr

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
