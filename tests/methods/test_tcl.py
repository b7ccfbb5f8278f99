"""The reading of TCL: distillations by loop, and who teaches whom."""

import math

import pytest
import torch
from torch.testing import assert_close

from ecl_hf.methods import tcl
from tests import reference

LABELS = [0, 3, 1, 1, 2]


def draw(num_experts):
    return 2 * torch.randn(num_experts, len(LABELS), 4, dtype=torch.double)


def draw_with_right_ones(num_experts):
    logits = draw(num_experts)
    logits[0, :2, :] += 5 * torch.nn.functional.one_hot(torch.tensor(LABELS[:2]), 4)
    return logits


def knowledge_by_loop(logits, importance):
    def image(i, y):
        rows = [expert[i] for expert in logits]
        return math.fsum(
            importance[y] * reference.divergence(teacher, student)
            for j, teacher in enumerate(rows)
            for k, student in enumerate(rows)
            if j != k and max(teacher) == teacher[y]
        )

    return [image(i, y) for i, y in enumerate(LABELS)]


def calibration_by_loop(logits):
    def image(i, y):
        rows = [expert[i] for expert in logits]
        mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        above = [z for z in mean if z > mean[y]]
        if not above:
            return 0.0
        teacher = [math.fsum(above) / len(above) if z > mean[y] else z for z in mean]
        teacher[y] = -30.0
        students = [[-30.0 if c == y else z for c, z in enumerate(row)] for row in rows]
        return math.fsum(reference.divergence(teacher, student) for student in students)

    return [image(i, y) for i, y in enumerate(LABELS)]


@pytest.mark.parametrize("num_experts", [1, 3])
def test_distillations_by_loop(num_experts):
    logits, labels = draw_with_right_ones(num_experts), torch.tensor(LABELS)
    importance = [0.5, 1.5, 1.0, 2.0]
    expected = torch.tensor(knowledge_by_loop(logits.tolist(), importance), dtype=torch.double)
    assert expected.any() == (num_experts > 1)
    weights = torch.tensor(importance, dtype=torch.double)
    assert_close(tcl.knowledgeable_distillation(logits, labels, weights), expected)
    expected = torch.tensor(calibration_by_loop(logits.tolist()), dtype=torch.double)
    assert expected.any()
    assert not expected.all()
    assert_close(tcl.confusion_calibration(logits, labels), expected)


def test_an_expert_that_is_right_teaches_and_does_not_learn():
    labels = torch.tensor([1])
    logits = torch.tensor([[[0.0, 3.0, 1.0]], [[2.0, 0.0, 1.0]]], requires_grad=True)
    tcl.knowledgeable_distillation(logits, labels, torch.ones(3)).sum().backward()
    assert [bool(gradient.any()) for gradient in logits.grad] == [False, True]


def test_importance_of_classes():
    weights = tcl.class_importance(torch.tensor([1.0, 0.75, 0.0]))
    assert_close(weights, torch.tensor([0.0, 1.0, 2.0]))
    assert_close(tcl.class_importance(torch.ones(3)), torch.ones(3))
