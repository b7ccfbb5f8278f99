"""Experts of unequal depth: a branch from a shared stage is a factor on an expert's last map."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from timm import create_model
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.backbones import stage_maps
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.learning.stages import begin_heads, fold_heads
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.publishing.hub import save_timm

COUNTS = [20, 9, 4]


def ensemble(**changes):
    sizes = {"num_experts": 3, "share_stages": 2, "side_branches": [1, 2, 1]} | changes
    model = ECLForImageClassification(ECLConfig(architecture="resnet20_cifar", class_counts=COUNTS, **sizes))
    for module in model.modules():  # statistics that are not those of a new layer
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def images(number=4, size=16):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


def step(state, x, convolution, relu):
    """Convolution and BatchNorm by their tensors."""
    norm = {name: state[f"backbone.{convolution + 1}.{name}"] for name in ("weight", "bias")}
    mean, var = (state[f"backbone.{convolution + 1}.running_{name}"] for name in ("mean", "var"))
    x = F.batch_norm(F.conv2d(x, state[f"backbone.{convolution}.weight"], stride=2, padding=1), mean, var, **norm)
    return x.relu() if relu else x


@torch.no_grad()
def test_logits_by_hand():
    model, x = ensemble(), images()
    trunk = model.trunk.backbone
    first = trunk.layer1(trunk.bn1(trunk.conv1(x)).relu())
    second = trunk.layer2(first)
    output = model(x, output_features=True)
    for k, depth in enumerate([2, 1, 2]):
        state = model.sides[k].state_dict()
        side = step(state, second, 0, relu=True) if depth == 1 else step(state, step(state, first, 0, True), 3, False)
        features = (model.experts[k].backbone.layer3(second) * side).mean((2, 3))
        assert_close(output.features[:, k], features)
        assert_close(output.expert_logits[:, k], model.experts[k].head(features))


@torch.no_grad()
def test_a_stored_ensemble_and_one_expert_alone(tmp_path):
    model, x = ensemble(), images()
    model.save_pretrained(tmp_path)
    logits = model(x).expert_logits
    assert_close(ECLForImageClassification.from_pretrained(tmp_path).eval()(x).expert_logits, logits, rtol=0, atol=0)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = [{file for key, file in weight_map.items() if key.startswith(f"experts.{k}.")} for k in range(3)]
    assert [len(names) for names in files] == [1, 1, 1]
    (tmp_path / files[0].pop()).unlink()  # not needed for the others
    some = ECLForImageClassification.from_pretrained(tmp_path, experts=[2, 1]).eval()
    assert some.config.side_branches == [1, 2]
    assert_close(some(x).expert_logits, logits[:, [2, 1]], rtol=0, atol=0)


def test_a_missing_branch_is_named(tmp_path):
    ensemble().save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    (tmp_path / "part" / "config.json").write_text(json.dumps(config | {"side_branches": [2, 1, 1]}))
    with pytest.raises(ValueError, match=r"no fitting weights .* sides\.\d\.backbone"):
        ECLForImageClassification.from_pretrained(tmp_path / "part")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"side_branches": [1, 2]}, "2 entries"),
        ({"side_branches": [1, 3, 1]}, r"1\.\.2"),
        ({"side_branches": [0, 1, 1]}, r"1\.\.2"),
        ({"share_stages": 0}, "need share_stages"),
        ({"share_stages": "all"}, "need share_stages"),
        ({"share_blocks": 1}, "share_blocks"),
    ],
)
def test_refused(changes, said):
    with pytest.raises(Exception, match=said):
        ensemble(**changes)


def test_an_expert_can_not_be_a_plain_timm_model(tmp_path):
    with pytest.raises(ValueError, match="side branches"):
        save_timm(ensemble(), 0, tmp_path)


@pytest.mark.parametrize("name", ["resnet50", "convnext_atto", "resnet32_cifar"])
def test_maps_of_stages_are_as_timm_describes_them(name):
    encoder = create_model(name, num_classes=0).eval()
    places = stage_maps(encoder)
    assert len(places) == (3 if "cifar" in name else 4)
    with torch.no_grad():
        last, maps = encoder.forward_intermediates(images(1, 64), indices=[place.position for place in places])
        assert_close(last, encoder.forward_features(images(1, 64)))
    shapes = [(place.channels, 64 // place.reduction, 64 // place.reduction) for place in places]
    assert [tuple(found.shape[1:]) for found in maps] == shapes


@pytest.mark.parametrize("method", ["shike", "tcl"])
def test_methods_with_side_branches(method):
    config = ModelConfig(architecture="resnet20_cifar", image_size=8)
    model = initialise_model(config, METHODS[method], COUNTS, list("abc"), METHODS[method].settings())
    assert (model.config.share_stages, model.config.side_branches) == (2, [1, 2, 1])
    alone = ModelConfig(architecture="test_vit", image_size=32)
    model = initialise_model(alone, METHODS[method], COUNTS, list("abc"), METHODS[method].settings())
    assert (model.config.share_stages, model.config.side_branches) == (0, None)


def test_second_heads_alone_move_in_the_second_stage():
    method, config = METHODS["shike"], ModelConfig(architecture="resnet20_cifar", image_size=8)
    model = initialise_model(config, method, COUNTS, list("abc"))
    for stage in (0, 1):
        begin_heads(model, method.stages[stage], method.settings())
        task = CollaborativeTask(model, method, stage=stage).train()
        before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
        task(images(6, 8), torch.tensor([0, 1, 2, 0, 1, 0]))["loss"].backward()
        torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=1e-3).step()
        moved = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
        if stage == 0:
            assert {f"sides.{k}.backbone.0.weight" for k in range(3)} <= moved
            assert {f"sides.{k}.backbone.1.running_mean" for k in range(3)} <= moved
        else:
            assert moved
            assert all(".head." in name for name in moved)
        fold_heads(model)
        model.zero_grad()


def test_branches_are_new_to_a_pretrained_encoder_that_hardly_moves():
    model = ensemble(classifier="cosine", classifier_bias=False)
    task = CollaborativeTask(model, METHODS["shike"], tune="norm_bias")
    moving = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert "model.sides.0.backbone.0.weight" in moving
    assert "model.experts.0.backbone.layer3.0.conv1.weight" not in moving
    assert "model.trunk.backbone.conv1.weight" not in moving


def test_files_hold_what_they_are_named_for(tmp_path):
    ensemble().save_pretrained(tmp_path)
    kinds = [{key.split(".")[0] for key in load_file(file)} for file in sorted(tmp_path.glob("model-*.safetensors"))]
    assert kinds[:3] == [{"experts"}] * 3
    assert set().union(*kinds[3:]) == {"trunk", "sides"}
