"""M2m's translation against its published code, and its draws in closed form."""

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.base import MixingContext, Time
from ecl_hf.methods.m2m import (
    M2mSettings,
    is_convincing,
    replacement_probabilities,
    seed_probabilities,
    starting_noise,
    translate,
    translate_batch,
)


@pytest.fixture
def values(published):
    return {key: torch.from_numpy(value) for key, value in published("features_and_teachers/m2m").items()}


def linear(weight, values):
    return lambda x: ((x - values["mean"]) / values["std"]).flatten(1) @ weight.T


@pytest.mark.parametrize("iterations", [1, 10])
def test_published_translation(values, iterations):
    teacher, student = linear(values["W_g"], values), linear(values["W_f"], values)
    classes = values["target_labels"], values["seed_labels"]
    made = translate(
        values["images"], *classes, teacher, student, values["lam"].item(), values["step_size"].item(), iterations
    )
    assert_close(made, values[f"after_{iterations}"], rtol=1e-7, atol=1e-9)
    assert not made.requires_grad


def test_published_acceptance(values):
    logits = linear(values["W_g"], values)(values["after_10"])
    accepted = is_convincing(logits, values["target_labels"], values["gamma"].item())
    assert accepted.tolist() == values["accepted"].bool().tolist()
    assert not is_convincing(logits, values["target_labels"], 1.01).any()


def test_published_probabilities(values):
    counts, labels, chosen = values["counts"], values["batch_labels"], values["generate_index"]
    assert_close(replacement_probabilities(counts, labels), values["replace_probability"], rtol=1e-7, atol=1e-9)
    seeds = seed_probabilities(counts, labels, labels[chosen], values["beta"].item())
    assert_close(seeds, values["accept_probability"], rtol=1e-6, atol=1e-9)


def test_order_of_the_classes_changes_no_probability():
    counts, labels = torch.tensor([50.0, 5000.0, 100.0, 500.0]), torch.tensor([0, 1, 2, 3, 1])
    assert replacement_probabilities(counts, labels).tolist() == pytest.approx([0.99, 0, 0.98, 0.9, 0])
    order = torch.tensor([2, 0, 3, 1])
    again = seed_probabilities(counts[order], order.argsort()[labels], order.argsort()[labels[:3]], 0.999)
    assert_close(again, seed_probabilities(counts, labels, labels[:3], 0.999))


@pytest.mark.parametrize(("beta", "expected"), [(1.0, [0, 0, 0, 0]), (0.0, [0, 1, 1, 1])])
def test_ends_of_beta(beta, expected):
    counts = torch.tensor([50.0, 5000.0, 100.0, 500.0])
    assert seed_probabilities(counts, torch.arange(4), torch.tensor([0]), beta).tolist() == [expected]


def test_first_step_of_linear_networks_is_known(values):
    """Where nothing is clipped, a picture moves by exactly the step, against the gradient of both parts."""
    pictures, step, weight = torch.full((2, 3, 4, 4), 0.5).double(), 0.05, 0.5
    targets, seeds = torch.tensor([3, 2]), torch.tensor([0, 1])
    teacher, student = linear(values["W_g"], values), linear(values["W_f"], values)
    made = translate(pictures, targets, seeds, teacher, student, weight, step, 1)
    for i in range(2):
        error = teacher(pictures[i : i + 1]).softmax(1)[0]
        error[targets[i]] -= 1
        gradient = values["W_g"].T @ error + weight * values["W_f"][seeds[i]]
        assert_close((made - pictures)[i].flatten(), -step * gradient / gradient.norm())


def test_noise_has_its_norm_for_each_picture():
    noise = starting_noise(torch.zeros(5, 3, 8, 8), 0.5)
    assert_close(noise.flatten(1).norm(dim=1), torch.full((5,), 0.5))
    assert noise.std() > 0


COUNTS = [60, 30, 4]
LABELS = torch.tensor([0] * 8 + [2] * 8 + [1] * 4)


def network(seed):
    torch.manual_seed(seed)
    config = ECLConfig(architecture="resnet20_cifar", num_experts=1, num_labels=3, class_counts=COUNTS)
    return ECLForImageClassification(config)


def translated(time, **settings):
    """A batch before and after, and the task."""
    settings = M2mSettings(**settings)
    task = CollaborativeTask(network(0), METHODS["m2m"], settings, teacher=network(1)).train()
    batch = {"pixel_values": torch.randn(20, 3, 8, 8), "labels": LABELS}
    generator = torch.Generator().manual_seed(0)
    return batch, translate_batch(batch, MixingContext(settings, time, generator, task, torch.tensor(COUNTS))), task


def test_pictures_of_rare_classes_are_made_of_those_of_frequent_ones():
    before, after, task = translated(Time(4, 5), beta=0.0, confidence=0.0)
    assert (after["labels"] == LABELS).all()
    changed = (after["pixel_values"] != before["pixel_values"]).flatten(1).any(1)
    assert not changed[LABELS == 0].any()
    assert changed[LABELS == 2].float().mean() > 0.5  # a share of 14/15 is expected
    std = torch.tensor(task.model.config.pretrained_cfg["std"])[:, None, None]
    mean = torch.tensor(task.model.config.pretrained_cfg["mean"])[:, None, None]
    made = after["pixel_values"][changed] * std + mean
    assert made.min() > -1e-5
    assert made.max() < 1 + 1e-5
    larger = LABELS != 2
    seeds = (before["pixel_values"][larger] * std + mean).clamp(0, 1)
    ways = torch.cdist(made.flatten(1), seeds.flatten(1)).min(1).values
    assert ways.max() < (0.5 + 10 * 0.1) * 8 / 32 + 1e-4  # noise and ten steps, at a quarter of the published side


def test_making_pictures_leaves_the_network_as_it_was():
    state = {name: value.clone() for name, value in network(0).state_dict().items()}
    _, _, task = translated(Time(4, 5), beta=0.0, confidence=0.0)
    assert all(torch.equal(value, state[name]) for name, value in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert task.model.training
    assert not task.teacher.training


@pytest.mark.parametrize(
    ("time", "settings"),
    [
        (Time(3, 5), {"beta": 0.0, "confidence": 0.0}),  # before the last fifth
        (Time(4, 5), {"beta": 1.0, "confidence": 0.0}),  # no seed is accepted
        (Time(4, 5), {"beta": 0.0, "confidence": 1.01}),  # nothing convinces the teacher
    ],
)
def test_batch_stays_as_it_was(time, settings):
    before, after, _ = translated(time, **settings)
    assert torch.equal(after["pixel_values"], before["pixel_values"])
