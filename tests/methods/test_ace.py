"""The reading of ACE: losses by loop, class sets, and what each expert learns of other classes."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.config import OptimConfig
from ecl_hf.learning.optimiser import build_optimizer
from ecl_hf.learning.task import CollaborativeTask, mean_loss
from ecl_hf.methods import METHODS, ace
from ecl_hf.methods.base import FinishContext, PerImage
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
    assert_close(mean_loss(PerImage(losses, sets.double()), labels).item(), expected)


def test_a_single_expert_learns_by_cross_entropy():
    logits, labels = draw(1), torch.tensor(LABELS)
    losses = ace.complementary_losses(logits, labels, ace.nested_class_sets(COUNTS, 1))
    assert_close(losses[0], F.cross_entropy(logits[0], labels, reduction="none"))


def test_an_expert_whose_classes_are_not_in_the_batch_learns_nothing():
    logits, labels = draw(5).requires_grad_(), torch.tensor(LABELS)
    sets = ace.nested_class_sets(COUNTS, 5)
    mean_loss(PerImage(ace.complementary_losses(logits, labels, sets), sets.double()), labels).backward()
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


def make_task(num_experts=3):
    config = ECLConfig(
        architecture="resnet20_cifar", num_experts=num_experts, share_stages=1, class_counts=COUNTS.tolist()
    )
    return CollaborativeTask(ECLForImageClassification(config), METHODS["ace"]).train()


def test_only_the_first_expert_teaches_the_shared_stages():
    task = make_task()
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor(LABELS)}
    task(**batch)["loss"].backward()
    together = [parameter.grad.clone() for parameter in task.model.trunk.parameters()]
    assert all(parameter.grad is not None for expert in task.model.experts for parameter in expert.parameters())
    task.zero_grad()
    logits = task.model(batch["pixel_values"]).expert_logits[:, 0]
    F.cross_entropy(logits, batch["labels"]).backward()
    for parameter, expected in zip(task.model.trunk.parameters(), together, strict=True):
        assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


def test_learning_rates_follow_the_shares_of_the_images():
    task = make_task()
    optimizer = build_optimizer(task, OptimConfig(), task.stage, task.settings, fused=False)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    # Classes of 60, 25, 6, 2 and 1 images; the second expert knows all but the first, the third the last two
    shares = [1.0, 34 / 94, 3 / 94]
    for name, scale in scales.items():
        expert = int(name.split(".")[2]) if name.startswith("model.experts.") else 0
        assert scale == pytest.approx(shares[expert])


def test_heads_are_brought_to_one_scale():
    model = make_task().model
    with torch.no_grad():
        model.experts[2].head.weight.mul_(5)
    before = [expert.head.weight.clone() for expert in model.experts]
    ace.scale_heads(FinishContext(model, None, COUNTS, None))
    for expert, weight in zip(model.experts, before, strict=True):
        assert_close(expert.head.weight.norm(), before[0].norm())
        assert_close(F.normalize(expert.head.weight.flatten(), dim=0), F.normalize(weight.flatten(), dim=0))
