"""Learning from multiple experts: published values, and the schedules at their ends."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification, losses
from ecl_hf.methods import METHODS, TaskOutputs
from ecl_hf.methods.base import EpochContext, FinishContext, PartsContext, Time
from ecl_hf.methods.lfme import (
    LFMESettings,
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


COUNTS = torch.tensor([120, 30, 110, 25, 5])  # many, medium, many, medium, few
LABELS = torch.repeat_interleave(torch.arange(5), COUNTS)


def build(num_experts):
    config = ECLConfig(architecture="resnet20_cifar", num_experts=num_experts, class_counts=COUNTS.tolist())
    return ECLForImageClassification(config).eval()


def test_over_all_pictures_each_expert_has_the_mean_loss_of_its_group():
    logits = torch.randn(3, len(LABELS), 5, dtype=torch.double)
    [term] = METHODS["lfme_experts"].stages[0].terms
    counts = COUNTS.double()
    out = TaskOutputs(LABELS, logits, torch.zeros(3, len(LABELS), 2), torch.zeros(5), counts.log())
    expected = 0.0
    for group, classes in enumerate(([0, 2], [1, 3], [4])):
        own = torch.isin(LABELS, torch.tensor(classes))
        within = torch.tensor([classes.index(label) for label in LABELS[own].tolist()])
        expected += F.cross_entropy(logits[group][own][:, classes], within)
    assert_close(term.loss(out, None).losses.mean(), expected)


def test_finished_experts_answer_for_their_groups_alone():
    model = build(3)
    [finish] = METHODS["lfme_experts"].finish
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        before = model(images).expert_logits
        finish(FinishContext(model, None, COUNTS, predict=None))
        after = model(images)
    owners = [0, 1, 0, 1, 2]
    for c, owner in enumerate(owners):
        assert_close(after.logits[:, c], before[:, owner, c])
        for k in {0, 1, 2} - {owner}:
            assert (after.expert_logits[:, k, c] == -30).all()


def test_the_curriculum_asks_the_experts_first_and_then_the_student():
    model = build(1)
    part = METHODS["lfme"].stages[0].terms[0].part(PartsContext(model, LFMESettings(), COUNTS, LABELS))
    labels = LABELS.clone()
    labels[0] = -1  # can't be decoded
    experts = torch.randn(len(labels), 3, 5)
    right = F.one_hot(LABELS, 5).float()
    student = 9 * right * (torch.arange(len(labels)) % 2 == 0)[:, None]  # right for every other picture

    def context(epoch):
        return EpochContext(
            Time(epoch, 4),
            model,
            LFMESettings(),
            COUNTS,
            predict=lambda: (labels, student[:, None], None),
            teacher=lambda: (labels, experts, None),
        )

    part.before_epoch(context(0))
    assert part.factors.tolist() == [1, 1, 1]
    assert part.weights[0] == 1
    few = LABELS == 4
    assert (part.weights[few] == 1).all()  # of one class with the lowest weight 1
    medium = experts[LABELS == 3][:, 1, [1, 3]].softmax(-1)[:, 1]  # of the second class of its group
    place = (medium - medium.min()) / (medium.max() - medium.min())
    lowest = 5 / 27.5
    assert_close(part.weights[LABELS == 3], lowest + (1 - lowest) * place)
    many = torch.isin(labels, torch.tensor([0, 2]))
    chosen = torch.tensor([0, 2])[experts[many][:, 0, [0, 2]].argmax(-1)]
    accuracy = (chosen == labels[many]).float().mean()
    assert_close(part.expert_accuracy[0], accuracy)

    part.before_epoch(context(1))
    own = (student[many].argmax(-1) == labels[many]).float().mean()
    assert_close(part.factors[0], ((accuracy - own) / accuracy / 0.7).clamp(0, 1))
