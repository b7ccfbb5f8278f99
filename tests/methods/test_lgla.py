"""LGLA: published values, and where class counts are cut."""

import pytest
import torch
from torch.testing import assert_close

from ecl_hf.losses import shifted_cross_entropy
from ecl_hf.methods import lgla
from tests.methods.comparing import agrees, tensors

SCALE = 30.0


@pytest.fixture
def values(published):
    return tensors(published("experts/lgla"))


def test_published_values(values):
    counts, labels = values["class_counts"].double(), values["labels"]
    regions = lgla.count_regions(counts, len(values["logits"]) - 1)
    assert_close(regions, values["masks"])
    shifts = lgla.lgla_shifts(counts, regions, values["tau"].item())
    groups = regions[:, labels].int().argmax(0)

    def loss(logits):
        own = logits.gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]
        weights = lgla.angle_weights(own, groups, 2, SCALE)
        return (weights * shifted_cross_entropy(logits, labels, shifts)).mean(-1).sum()

    # The published angles are in single precision
    agrees(loss, values["logits"], values["loss"], values["grad"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("counts", "regions", "expected"),
    [
        ([100, 50, 31, 10, 5, 2], 2, [[0], [1, 2, 3, 4, 5]]),  # 2 + 5 + 10 + 31 + 50 are just half of the images
        ([5, 100, 2, 31, 10, 50], 2, [[1], [0, 2, 3, 4, 5]]),
        ([40, 40, 30, 30, 20, 20, 10, 10], 3, [[0, 1], [2, 3], [4, 5, 6, 7]]),  # equal counts are not parted
        ([1000, 5, 3, 1], 2, [[0], [1, 2, 3]]),  # more than half of the images in one class
        ([1000, 5, 3, 1], 3, [[0], [1], [2, 3]]),
        ([9, 9, 9, 8], 2, [[0, 1, 2], [3]]),
        ([9, 4, 1], 1, [[0, 1, 2]]),
    ],
)
def test_regions_hold_about_equally_many_images(counts, regions, expected):
    found = lgla.count_regions(torch.tensor(counts), regions)
    assert [mask.nonzero().flatten().tolist() for mask in found] == expected


@pytest.mark.parametrize(("counts", "regions"), [([7] * 10, 2), ([50, 30, 10, 5], 5)])
def test_too_few_different_counts_are_refused(counts, regions):
    with pytest.raises(ValueError, match=f"can't be cut into {regions} regions"):
        lgla.count_regions(torch.tensor(counts), regions)


def test_weights_are_1_plus_what_the_angle_exceeds_its_region():
    angles = torch.tensor([[0.3, 1.0, 0.8, 0.4]], dtype=torch.double)
    groups = torch.tensor([0, 1, 0, 0])
    weights = lgla.angle_weights(SCALE * angles.cos(), groups, 3, SCALE)
    assert_close(weights, torch.tensor([[1.0, 1.0, 1.3, 1.0]], dtype=torch.double))


def test_rounding_beyond_the_scale_is_an_angle_of_0():
    weights = lgla.angle_weights(torch.tensor([[30.00001, -30.00001]]), torch.tensor([0, 1]), 2, SCALE)
    assert_close(weights, torch.ones(1, 2))
