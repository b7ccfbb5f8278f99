"""CAM-based sampling against values of its published lines, and what its moves leave as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS, cam
from ecl_hf.methods.base import MixingContext, Time
from ecl_hf.methods.cam import (
    CAMSettings,
    FinishedStage,
    bounding_boxes,
    class_activation_map,
    draw_moves,
    foreground,
    make_pictures,
    mirror,
    paste_foreground,
    pictures_to_make,
    rotation,
    translation,
)


@pytest.fixture
def values(published):
    return {key: torch.from_numpy(value) for key, value in published("features_and_teachers/cam").items()}


def test_published_counts(values):
    made = pictures_to_make(values["cifar_counts"])
    assert made.tolist() == values["cifar_generated"].tolist()
    assert (values["cifar_counts"] + made).unique().numel() == 1
    made = pictures_to_make(values["imagenet_counts"], values["imagenet_threshold"].item())
    assert made.tolist() == values["imagenet_generated"].tolist()


def test_published_map_and_foreground(values):
    activation = class_activation_map(values["feature_map"][None], values["class_weight"][None])
    assert activation[0].tolist() == values["cam_uint8"].double().tolist()
    assert foreground(activation, tuple(activation.shape[1:]))[0].tolist() == values["foreground"].tolist()


def test_map_of_one_channel():
    feature_maps = torch.rand(2, 3, 4, 5)
    activation = class_activation_map(feature_maps, torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))
    for i, channel in enumerate((1, 2)):
        expected = feature_maps[i, channel] - feature_maps[i, channel].min()
        assert_close(activation[i], 255 * expected / expected.max(), rtol=0, atol=1)


def test_constant_map_keeps_the_whole_picture():
    activation = class_activation_map(torch.ones(1, 3, 4, 4), torch.ones(1, 3))
    assert foreground(activation, (8, 8)).all()


def test_bounding_boxes():
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1:4, 2:7] = True
    masks[1, 5, 0] = masks[1, 0, 7] = True
    assert bounding_boxes(masks).tolist() == [[1, 4, 2, 7], [0, 6, 0, 8]]


def test_mirror_of_a_symmetric_picture_is_the_picture():
    half, mask = torch.rand(2, 3, 6, 4), torch.rand(2, 6, 8) < 0.5
    symmetric = torch.cat([half, half.flip(3)], dim=3)
    assert_close(paste_foreground(symmetric, mask, mirror(2, mask.device)), symmetric)


def test_mirrored_foreground_lies_on_the_other_side():
    picture, mask = torch.rand(1, 3, 6, 8), torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[0, 1:3, :3] = True
    pasted = paste_foreground(picture, mask, mirror(1, mask.device))
    expected = picture.clone()
    expected[0, :, 1:3, 5:] = picture[0, :, 1:3, :3].flip(2)
    assert_close(pasted, expected)


def test_shifted_foreground():
    """Black pixels of it cover what was there, too."""
    picture, mask = torch.rand(1, 3, 6, 8), torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[0, :2, :3] = True
    picture[0, :, 0, 0] = 0
    pasted = paste_foreground(picture, mask, translation(torch.tensor([[3.0, 4.0]])))
    expected = picture.clone()
    expected[0, :, 3:5, 4:7] = picture[0, :, :2, :3]
    assert_close(pasted, expected)


def test_quarter_turn_and_scale():
    picture, whole = torch.rand(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    middle = torch.zeros(1, 2)
    turned = paste_foreground(picture, whole, rotation(torch.tensor([90.0]), torch.ones(1), middle))
    assert_close(turned, picture.rot90(1, (2, 3)), rtol=1e-4, atol=1e-4)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 2:4] = True
    uniform = torch.where(mask[:, None], 1.0, 0.0).expand(1, 3, 8, 8)
    twice = paste_foreground(uniform, mask, rotation(torch.zeros(1), torch.tensor([2.0]), torch.tensor([[-1.0, -1.0]])))
    assert twice[0, 0, 1:5, 1:5].min() > 0.5  # about its own middle, from 2 x 2 pixels to 4 x 4
    assert twice[0, 0].sum() <= 16


def test_draws_of_moves():
    mask = torch.zeros(3000, 8, 8, dtype=torch.bool)
    mask[:, 2:5, 1:7] = True
    maps = draw_moves(mask, torch.Generator().manual_seed(0))
    mirrored = (maps[:, 0, 0] == -1).double()
    shifted = (maps[:, :, :2] == torch.eye(2)).all((1, 2))
    assert mirrored.mean() == pytest.approx(1 / 3, abs=0.03)
    assert shifted.double().mean() == pytest.approx(1 / 3, abs=0.03)
    shifts = -maps[shifted, :, 2]
    assert shifts[:, 0].unique().tolist() == [-1, 0, 1]  # columns
    assert shifts[:, 1].unique().tolist() == [-2, -1, 0, 1, 2, 3]
    turned = maps[~shifted & ~mirrored.bool()]
    scales = turned[:, :, :2].det() ** -0.5
    assert scales.min().item() == pytest.approx(0.8, abs=0.02)
    assert scales.max().item() == pytest.approx(1.19, abs=0.02)
    centre = torch.tensor([0.0, -0.5])  # of the box, in pixels from the middle: it stays where it is
    assert_close(turned[:, :, :2] @ centre + turned[:, :, 2], centre.expand(len(turned), 2), rtol=0, atol=1e-5)
    assert (draw_moves(mask, torch.Generator().manual_seed(0)) == maps).all()


def ensemble(architecture="resnet20_cifar"):
    config = ECLConfig(architecture=architecture, num_experts=1, num_labels=2, class_counts=[20, 4])
    return ECLForImageClassification(config)


def test_pictures_are_made_as_often_as_a_set_with_them_would_give_them(monkeypatch):
    """20 and 4 pictures, and 4 and 20 made ones: 1 of 6 of the first class and 5 of 6 of the second."""
    monkeypatch.setattr(cam, "draw_moves", lambda masks, _: mirror(len(masks), masks.device))  # always visible
    part, pixels, labels = FinishedStage(ensemble()), torch.randn(600, 3, 8, 8), torch.arange(600) % 2
    task = SimpleNamespace(parts={"supervision": part})
    context = MixingContext(CAMSettings(), Time(), torch.Generator().manual_seed(0), task, torch.tensor([20, 4]))
    batch = make_pictures({"pixel_values": pixels, "labels": labels}, context)
    changed = (batch["pixel_values"] != pixels).flatten(1).any(1).double()
    assert changed[labels == 0].mean() == pytest.approx(1 / 6, abs=0.06)
    assert changed[labels == 1].mean() == pytest.approx(5 / 6, abs=0.06)
    assert (batch["labels"] == labels).all()


def test_the_network_that_makes_pictures_stays():
    """It has no gradient, is in evaluation mode, and is no longer the network in training."""
    model = ensemble()
    task = CollaborativeTask(model, METHODS["cam_drs"], stage=1).train()
    network = task.parts["supervision"].network
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    assert model.training
    with torch.no_grad():
        model.experts[0].head.weight.zero_()
    assert network.experts[0].head.weight.any()


def test_an_encoder_without_maps_is_refused_before_the_first_stage():
    with pytest.raises(ValueError, match=r"test_vit does not pool a feature map \[64, h, w\]"):
        CollaborativeTask(ensemble("test_vit"), METHODS["cam"])
