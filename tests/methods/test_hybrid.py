"""Hybrid's two contrastive losses: SC against SupCon's published code, PSC against its equation."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.losses import info_nce, supervised_contrast
from ecl_hf.methods import METHODS
from ecl_hf.methods.base import Time
from ecl_hf.methods.hybrid import feature_share, prototypical_contrast


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def cases(published):
    values = {key: torch.from_numpy(value) for key, value in published("features_and_teachers/hybrid").items()}
    found = [(key.removeprefix("sc_").removesuffix("_T"), value.item()) for key, value in values.items() if "_T" in key]
    assert found
    return values, found


def test_published_supervised_contrast(published):
    values, found = cases(published)
    for case, temperature in found:
        views = [values[key].clone().requires_grad_() for key in ("view1", "view2")]
        loss = supervised_contrast(torch.stack(views), values["labels"], temperature).mean()
        assert_close(loss, values[f"sc_{case}_loss"], rtol=1e-6, atol=0)
        for name, gradient in zip(("view1", "view2"), torch.autograd.grad(loss, views), strict=True):
            assert_close(gradient, values[f"sc_{case}_grad_{name}"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", ["printed", "softmax"])
def test_prototypes(published, form):
    values, found = cases(published)
    for case, temperature in found:
        features = torch.stack([values["view1"], values["view2"]]).requires_grad_()
        prototypes = values["prototypes"].clone().requires_grad_()
        loss = prototypical_contrast(features, prototypes, values["labels"], temperature, form == "softmax").mean()
        assert_close(loss, values[f"psc_{form}_{case}_loss"], rtol=1e-9, atol=0)
        by_features, by_prototypes = torch.autograd.grad(loss, [features, prototypes])
        assert_close(by_features.flatten(0, 1), values[f"psc_{form}_{case}_grad_z"], rtol=1e-8, atol=1e-10)
        assert_close(by_prototypes, values[f"psc_{form}_{case}_grad_prototypes"], rtol=1e-8, atol=1e-10)


def test_supervised_contrast_without_similarity():
    loss = supervised_contrast(unit(2, 7, 4), torch.tensor([0, 0, 1, 2, 0, 1, 3]), 1e9)
    assert_close(loss, torch.full((7,), math.log(13)).double(), rtol=1e-6, atol=0)


def test_one_positive_is_infonce():
    first, second = unit(3, 4), unit(3, 4)
    loss = supervised_contrast(torch.stack([first, second]), torch.arange(3), 0.2)
    for i in range(3):
        others = [j for j in range(3) if j != i]
        negatives = torch.cat([first[others], second[others]])
        one = info_nce(first[i : i + 1], second[i : i + 1], negatives, 0.2)
        other = info_nce(second[i : i + 1], first[i : i + 1], negatives, 0.2)
        assert_close(loss[i], (one + other) / 2)


def test_pull_to_the_prototype_never_ends_as_printed():
    prototypes = unit(4, 5)
    features = prototypes[None, :3].clone()
    own = (features[0] * 1.0).requires_grad_()
    loss = prototypical_contrast(own[None], prototypes, torch.arange(3), 0.05)
    assert loss.min() < 0
    along = torch.autograd.grad(loss.mean(), own)[0]
    others = prototypical_contrast(own[None], prototypes, torch.arange(3), 0.05, own_class=True)
    assert others.min() >= 0
    for i in range(3):
        competing = torch.tensor([j for j in range(4) if j != i])
        pull = (own[i] @ prototypes[competing].T / 0.05).softmax(0) @ prototypes[competing]
        assert_close(along[i], ((pull - prototypes[i]) / (0.05 * 3)).detach())


def test_share_moves_along_a_parabola():
    assert [feature_share(e / 4) for e in range(5)] == [1, 1 - 1 / 16, 0.75, 1 - 9 / 16, 0]


@pytest.mark.parametrize("method", ["hybrid_sc", "hybrid_psc"])
def test_classifier_learns_from_the_second_stream_and_features_from_the_first(method):
    config = ECLConfig(architecture="resnet20_cifar", num_experts=1, num_labels=3, class_counts=[9, 4, 2])
    task = CollaborativeTask(ECLForImageClassification(config), METHODS[method]).train()
    names = ("pixel_values", "view_0", "partner_pixel_values")
    batch = {name: torch.randn(6, 3, 8, 8) for name in names}
    batch |= {"labels": torch.tensor([0, 0, 1, 2, 0, 1]), "partner_labels": torch.tensor([2, 1, 0, 2, 1, 0])}
    head, gradients = task.model.experts[0].head, {}
    for epoch in (0, 3):
        task.time = Time(epoch, 4)
        out = task(**batch)
        share = 1 - (epoch / 4) ** 2
        expected = share * out["terms"]["features"] + (1 - share) * out["terms"]["classifier"]
        assert_close(out["loss"], expected)
        gradients[epoch] = torch.autograd.grad(out["loss"], head.weight, allow_unused=True)[0]
    assert not gradients[0].any()  # the classifier's share begins at 0
    assert gradients[3].any()
    moved = task(**batch | {"partner_labels": batch["labels"]})["terms"]
    assert moved["classifier"] != out["terms"]["classifier"]
    changed = task(**batch | {"labels": batch["partner_labels"]})["terms"]
    assert changed["features"] != out["terms"]["features"]
