"""The reading of ACE: losses by loop, class sets, and what each expert learns of other classes."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.methods import ace
from tests import reference

COUNTS = torch.tensor([6, 60, 1, 25, 2])
LABELS = [1, 0, 4, 3]


def draw(num_experts):
    return 2 * torch.randn(num_experts, len(LABELS), len(COUNTS), dtype=torch.double)


def by_loop(logits, sets):
    total = 0.0
    for rows, known in zip(logits, sets, strict=True):
        losses = [
            -reference.log_softmax(z)[y] + math.fsum(v * v for v, own in zip(z, known, strict=True) if not own)
            for z, y in zip(rows, LABELS, strict=True)
            if known[y]
        ]
        total += math.fsum(losses) / max(1, len(losses))
    return total


@pytest.mark.parametrize(
    ("num_experts", "expected"),
    [
        (1, [{0, 1, 2, 3, 4}]),
        (2, [{0, 1, 2, 3, 4}, {0, 4, 2}]),
        (3, [{0, 1, 2, 3, 4}, {0, 3, 4, 2}, {4, 2}]),
        (5, [{0, 1, 2, 3, 4}, {0, 3, 4, 2}, {0, 4, 2}, {4, 2}, {2}]),
    ],
)
def test_sets_lose_the_most_frequent_classes_first(num_experts, expected):
    sets = ace.nested_class_sets(COUNTS, num_experts)
    assert [set(known.nonzero().flatten().tolist()) for known in sets] == expected


@pytest.mark.parametrize("num_experts", [1, 2, 3, 5])
def test_losses_by_loop(num_experts):
    logits, labels = draw(num_experts), torch.tensor(LABELS)
    sets = ace.nested_class_sets(COUNTS, num_experts)
    losses = ace.complementary_losses(logits, labels, sets)
    expected = by_loop(logits.tolist(), sets.tolist())
    assert_close(ace.mean_over_known(losses, sets, labels).item(), expected)


def test_a_single_expert_learns_by_cross_entropy():
    logits, labels = draw(1), torch.tensor(LABELS)
    losses = ace.complementary_losses(logits, labels, ace.nested_class_sets(COUNTS, 1))
    assert_close(losses[0], F.cross_entropy(logits[0], labels, reduction="none"))


def test_an_expert_whose_classes_are_not_in_the_batch_learns_nothing():
    logits, labels = draw(5).requires_grad_(), torch.tensor(LABELS)
    sets = ace.nested_class_sets(COUNTS, 5)
    ace.mean_over_known(ace.complementary_losses(logits, labels, sets), sets, labels).backward()
    assert [bool(gradient.any()) for gradient in logits.grad] == [True, True, True, True, False]


def test_logits_of_unknown_classes_shrink():
    logits, labels = draw(2), torch.tensor([0, 4, 2, 2])
    sets = ace.nested_class_sets(COUNTS, 2)
    logits.requires_grad_()
    size = logits[1][:, ~sets[1]].abs().mean().item()
    optimizer = torch.optim.SGD([logits], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        ace.complementary_losses(logits, labels, sets).sum().backward()
        optimizer.step()
    assert logits[1][:, ~sets[1]].abs().mean().item() < 0.1 * size
