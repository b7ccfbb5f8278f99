"""DRO-LT: published values, and that margins follow their images."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ecl_hf.methods import dro_lt
from tests.methods.comparing import agrees, tensors


@pytest.fixture
def values(published):
    return tensors(published("reweighting_and_stages/dro_lt"))


def prototypes_of(values):
    features, labels = values["centroid_features"], values["centroid_labels"]
    return torch.stack([features[labels == c].mean(0) for c in range(len(values["epsilons"]))])


def published_margins(epsilons, labels):
    """The published pairing: margins in the order of the batch meet images in the order of their classes."""
    order = labels.argsort(stable=True)
    return torch.empty(len(labels), dtype=epsilons.dtype).index_put((order,), epsilons[labels])


@pytest.mark.parametrize("batch", ["all", "missing"])
@pytest.mark.parametrize("temperature", ["1", "0.5"])
def test_published_values_with_the_margins_mixed_up_as_published(values, batch, temperature):
    labels, prototypes = values["labels" if batch == "all" else "labels_missing"], prototypes_of(values)

    def loss(features, epsilons):
        margins = published_margins(epsilons, labels)
        images = dro_lt.robust_losses(features, labels, prototypes, margins, float(temperature))
        return dro_lt.robust_loss(images, labels)

    case, features, epsilons = f"{batch}_T{temperature}", values["features"], values["epsilons"]
    agrees(lambda x: loss(x, epsilons), features, values[f"loss_{case}"], values[f"grad_features_{case}"])
    agrees(lambda x: loss(features, x), epsilons, values[f"loss_{case}"], values[f"grad_epsilons_{case}"])


def test_published_values_of_a_sorted_batch_which_has_no_mix_up(values):
    order = values["sorted_order"]
    labels, prototypes = values["labels"][order], prototypes_of(values)

    def loss(features, epsilons):
        return dro_lt.robust_loss(dro_lt.robust_losses(features, labels, prototypes, epsilons[labels]), labels)

    features, epsilons = values["features"][order], values["epsilons"]
    agrees(lambda x: loss(x, epsilons), features, values["loss_sorted_T1"], values["grad_features_sorted_T1"])
    agrees(lambda x: loss(features, x), epsilons, values["loss_sorted_T1"], values["grad_epsilons_sorted_T1"])


def test_published_value_without_margins(values):
    images = dro_lt.robust_losses(values["features"], values["labels"], prototypes_of(values))
    assert_close(dro_lt.robust_loss(images, values["labels"]), values["loss_all_T1_no_epsilon"], rtol=1e-9, atol=0)


def test_the_order_of_the_batch_does_not_matter(values):
    labels, prototypes, margins = values["labels"], prototypes_of(values), values["epsilons"][values["labels"]]
    order = torch.randperm(len(labels))
    images = dro_lt.robust_losses(values["features"], labels, prototypes, margins)
    shuffled = dro_lt.robust_losses(values["features"][order], labels[order], prototypes, margins[order])
    assert_close(shuffled, images[order])


def test_indistinguishable_images_are_found_by_chance():
    labels = torch.tensor([0, 1, 1, 0, 0])
    images = dro_lt.robust_losses(torch.ones(5, 3), labels, torch.randn(2, 3))
    assert_close(images, torch.full((5,), math.log(5)))


def test_prototypes_are_the_means_of_the_pictures_that_can_be_decoded():
    labels, features = torch.tensor([2, 0, -1, 2, 0, 2]), torch.randn(6, 1, 3)
    part = dro_lt.Prototypes(SimpleNamespace(class_counts=torch.tensor([2, 0, 4]), width=3))
    part.before_epoch(SimpleNamespace(predict=lambda: (labels, torch.zeros(6, 1, 3), features)))
    expected = [(features[1, 0] + features[4, 0]) / 2, torch.zeros(3), features[[0, 3, 5], 0].mean(0)]
    assert_close(part.means, torch.stack(expected))
    assert part.state_dict().keys() == {"means", "margins"}
