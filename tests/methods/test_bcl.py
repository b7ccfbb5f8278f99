"""Balanced contrastive learning against its published code, and in closed form."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.bcl import BCLSettings, balanced_contrast


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def test_published_values(published):
    values = {key: torch.from_numpy(value) for key, value in published("features_and_teachers/bcl").items()}
    cases = [key.removesuffix("_T") for key in values if key.endswith("_T")]
    assert cases
    for case in cases:
        leaves = [values[key].clone().requires_grad_() for key in ("view2", "view3", "centers")]
        features = torch.stack(leaves[:2])
        loss = balanced_contrast(features, leaves[2], values["labels"], values[f"{case}_T"].item()).mean()
        assert_close(loss, values[f"{case}_loss"], rtol=1e-6, atol=0)
        gradients = torch.autograd.grad(loss, leaves)
        for name, gradient in zip(("view2", "view3", "centers"), gradients, strict=True):
            assert_close(gradient, values[f"{case}_grad_{name}"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("counts", [[6, 0, 0, 0], [3, 2, 1, 0], [1, 1, 2, 2]])
def test_without_similarity_each_class_is_one_of_c(counts):
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    loss = balanced_contrast(unit(2, 6, 5), unit(4, 5), labels, 1e9)
    assert_close(loss, torch.full((6,), math.log(4)).double(), rtol=1e-6, atol=0)


def test_equal_members_count_as_one():
    """A class whose pictures equal its prototype adds the same to others' denominators, however many there are."""
    prototypes, anchors = unit(3, 5), unit(2, 2, 5)

    def loss(copies):
        features = torch.cat([anchors, prototypes[1].expand(2, copies, 5)], dim=1)
        return balanced_contrast(features, prototypes, torch.tensor([0, 0] + [1] * copies), 0.1)[:2]

    assert_close(loss(1), loss(7))
    assert_close(loss(0), loss(3))  # of an absent class there is the prototype


def test_features_on_their_prototypes_of_a_simplex_have_equal_losses():
    prototypes = F.normalize(torch.eye(4).double() - 1 / 4, dim=-1)
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    loss = balanced_contrast(prototypes[labels].expand(2, 6, 4), prototypes, labels, 0.5)
    expected = math.log(1 + 3 * math.exp((-1 / 3 - 1) / 0.5))
    assert_close(loss, torch.full((6,), expected).double())


def test_contrast_moves_the_classifier_by_its_prototypes():
    config = ECLConfig(architecture="resnet20_cifar", num_experts=1, num_labels=3, class_counts=[9, 4, 2])
    settings = BCLSettings(supervision_weight=0.0, hidden_dim=8, projection_dim=4)
    task = CollaborativeTask(ECLForImageClassification(config), METHODS["bcl"], settings).train()
    views = {name: torch.randn(6, 3, 8, 8) for name in ("pixel_values", "view_0", "view_1")}
    out = task(labels=torch.tensor([0, 0, 1, 2, 0, 1]), **views)
    assert_close(out["loss"], 0.6 * out["terms"]["contrast"])
    out["loss"].backward()
    head = task.model.experts[0].head
    assert head.weight.grad.abs().sum() > 0
    assert not head.bias.grad.any()
    assert all(parameter.grad is not None for parameter in task.parts["contrast"].parameters())
