"""Learning from multiple experts: published values, and the schedules at their ends."""

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods.lfme import (
    class_groups,
    expert_losses,
    group_factors,
    lowest_weights,
    picture_weights,
    scheduled_weights,
)
from tests.methods.comparing import agrees, tensors

GROUPS = ("many_shot", "median_shot", "low_shot")


@pytest.fixture
def values(published):
    return tensors(published("experts/lfme"))


def groups_of(values):
    groups = torch.empty(values["logits"].shape[1], dtype=torch.long)
    for group, name in enumerate(GROUPS):
        groups[values[f"classes_{name}"]] = group
    return groups


def experts_of(values):
    """The experts' logits over all classes; outside of their groups there is anything."""
    experts = 9 * torch.randn(3, *values["logits"].shape, dtype=torch.double)
    for group, name in enumerate(GROUPS):
        experts[group][:, values[f"classes_{name}"]] = values[f"expert_{name}"]
    return experts


def test_published_values(values):
    groups, experts = groups_of(values), experts_of(values)
    temperature, epochs = values["temperature"].item(), int(values["total_epochs"])
    factors = group_factors(values["student_accuracy"], values["expert_accuracy"], values["decay_thresh"].item())
    assert_close(factors, values["group_weights"])
    cases = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
    assert cases
    for case in cases:
        weights = scheduled_weights(values["instance_weights"], int(case.removeprefix("e")), epochs)
        assert_close(weights, values[f"{case}_scheduled_weights"])

        def loss(logits, weights=weights):
            weighted = weights[:, None] * logits
            distilled = expert_losses(weighted, experts, groups, factors, temperature)
            return (losses.cross_entropies(weighted, values["labels"]) + distilled).mean()

        agrees(loss, values["logits"], values[f"{case}_loss"], values[f"{case}_grad"])
        for group in range(3):
            alone = torch.eye(3).double()[group]
            distilled = expert_losses(weights[:, None] * values["logits"], experts, groups, alone, temperature)
            assert_close(distilled.mean(), values[f"{case}_kd"][group])


def test_published_picture_weights(values):
    groups, labels = groups_of(values), values["confidence_labels"]
    lowest = torch.tensor([12 / 230, 12 / 53, 1.0]).double()[groups]
    assert_close(picture_weights(values["confidences"], labels, lowest), values["scaled_confidences"])


def test_a_class_of_equally_hard_pictures_has_weights_of_one():
    confidences = torch.tensor([0.3, 0.3, 0.2, 0.6, 0.4])
    weights = picture_weights(confidences, torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0.1, 0.1, 0.5]))
    assert_close(weights, torch.tensor([1.0, 1.0, 0.5, 1.0, 0.75]))


def test_groups_and_their_lowest_weights():
    counts = torch.tensor([101, 100, 20, 19, 3, 400])
    assert class_groups(counts).tolist() == [0, 1, 1, 2, 2, 0]
    assert_close(lowest_weights(counts), torch.tensor([11 / 250.5, 11 / 60, 11 / 60, 1, 1, 11 / 250.5]).double())


def test_without_few_shot_classes_the_medium_ones_are_the_measure():
    assert_close(lowest_weights(torch.tensor([300, 50, 30])), torch.tensor([40 / 300, 1, 1]).double())


def test_factors_at_their_ends():
    student = torch.tensor([0.1, 0.15, 0.16, 0.5, 0.7, 0.2])
    expert = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.0])
    factors = group_factors(student, expert, 0.3)
    assert_close(factors, torch.tensor([1, 1, (0.5 - 0.16) / 0.5 / 0.7, 0, 0, 0]))


def test_an_expert_pulls_within_its_group_alone():
    student = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    experts, groups = torch.randn(3, 6, 5, dtype=torch.double), torch.tensor([0, 2, 1, 1, 1])
    loss = expert_losses(student, experts, groups, [0.0, 1.0, 0.0], 2.0).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[:, groups != 1] == 0).all()
    assert_close(gradient[:, groups == 1].sum(-1), torch.zeros(6).double())
    equal = expert_losses(experts[1], experts, groups, [0.0, 1.0, 0.0], 1.0)
    assert_close(equal, torch.zeros(6).double())
