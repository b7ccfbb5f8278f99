"""Low-rank additions and AdaptFormers: where they come, what moves, and what becomes of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.backbones import AdaptedMLP, AdaptFormer, create_encoder
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.low_rank import add_low_rank, find_layers, merge_low_rank
from ecl_hf.learning.stages import published_copy
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.learning.tuning import begin_tuning, lift_rank
from ecl_hf.methods import METHODS
from ecl_hf.publishing.hub import save_timm

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
BEIT = VIT | {"use_shared_rel_pos_bias": False}
SWIN = {"img_size": 56, "embed_dim": 16, "depths": [2, 1], "num_heads": [1, 2]}
SIZES = {"swin_tiny_patch4_window7_224": 56, "vit_tiny_patch16_224": 16, "beit_base_patch16_224": 16}


def ensemble(architecture="vit_tiny_patch16_224", model_args=VIT, **settings):
    settings = {"num_experts": 2, "class_counts": [9, 5, 2]} | settings
    size = SIZES.get(architecture, 32)
    cfg = {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3}
    return ECLForImageClassification(
        ECLConfig(architecture=architecture, model_args=model_args, pretrained_cfg=cfg, **settings)
    )


def pretrained(tune, rank=2):
    return ModelConfig(tune=tune, pretrained=True, rank=rank)


def shake(model):
    """Random numbers where there are zeros: what is added at the start, and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("beit_base_patch16_224", BEIT),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("test_efficientnet", None),
        ("test_convnext", None),
        ("resnet20_cifar", None),
    ],
)
def test_merged_model_computes_the_same(architecture, model_args):
    model = ensemble(architecture, model_args, num_experts=1).eval()
    names = model.state_dict().keys()
    begin_tuning(model, pretrained("lora", 3))
    image = torch.randn(2, *model.config.pretrained_cfg["input_size"])
    with torch.no_grad():
        before = model(image).logits
        shake(model)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            model, merged = model.to(dtype), published_copy(model.to(dtype))
            expected = model(image.to(dtype)).logits
            assert (expected - before).abs().max() > 1e-3
            torch.testing.assert_close(merged(image.to(dtype)).logits, expected, rtol=tolerance, atol=tolerance)
            assert merged.state_dict().keys() == names
    merge_low_rank(model)
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in model.state_dict().items())
    layers = {"vit_tiny_patch16_224": 8, "beit_base_patch16_224": 6}  # BEiT takes weights of qkv without calling it
    if architecture in layers:
        assert len(find_layers(model)) == layers[architecture]


def test_convolution_with_an_addition_is_one_with_the_product_added():
    layer = nn.Conv2d(4, 6, 3, stride=2, padding=1).double()
    x = torch.randn(2, 4, 9, 9).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    add_low_rank([layer], 2)
    up, down = (nn.init.normal_(part.weight) for part in (layer.low_rank.up, layer.low_rank.down))
    total = weight.clone()
    for o in range(6):
        for r in range(2):
            total[o] += up[o, r, 0, 0] * down[r]
    torch.testing.assert_close(layer(x), F.conv2d(x, total, bias, stride=2, padding=1))


def test_depthwise_convolutions_and_the_first_layer_stay():
    model = ensemble("test_efficientnet", None, num_experts=1)
    layers = find_layers(model)
    assert model.experts[0].backbone.conv_stem not in layers
    assert {getattr(layer, "groups", 1) for layer in layers} == {1}
    assert len(layers) == len(
        [
            module
            for module in create_encoder("test_efficientnet").modules()
            if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3
        ]
    )


@pytest.mark.parametrize("tune", ["lora", "adapter"])
def test_an_optimiser_step_moves_the_additions_and_the_heads_alone(tune):
    model = ensemble()
    begin_tuning(model, pretrained(tune))
    shake(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    task = CollaborativeTask(model, METHODS["bkt"], tune=tune).train()
    own = {"lora": ".low_rank.", "adapter": ".adapter."}[tune]
    optimizer = torch.optim.SGD([weight for weight in task.parameters() if weight.requires_grad], lr=0.1)
    task(torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2]))["loss"].backward()
    with_gradient = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in task.named_parameters() if own in name or ".backbone." not in name}
    assert with_gradient == expected
    assert any(own in name for name in expected)
    optimizer.step()
    moved = {
        f"model.{name}" for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert moved == {name for name in expected if name.startswith("model.")}


def test_running_statistics_of_a_frozen_encoder_stay():
    model = ensemble("resnet20_cifar", None, share_stages=1)
    begin_tuning(model, pretrained("lora"))
    task = CollaborativeTask(model, METHODS["ecl"], METHODS["ecl"].settings(queue_size=8), tune="lora").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images = torch.randn(2, 6, 3, 16, 16)
    task(images[0], torch.tensor([0, 1, 2, 0, 1, 2]), images[1])["loss"].backward()
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_adapter_is_beside_the_mlp_and_has_a_norm_of_its_own():
    encoder = create_encoder("vit_tiny_patch16_224", **VIT, init_values=0.3).eval().double()
    shake(encoder)
    block = copy.deepcopy(encoder.blocks[0])
    adapted = AdaptedMLP(encoder.blocks[0], 3).double()
    shake(adapted)
    x = torch.randn(2, 5, 16).double()
    mine = adapted.adapter
    normed = F.layer_norm(x, (16,), mine.norm.weight, mine.norm.bias)
    hidden = (normed @ mine.down.weight.T + mine.down.bias).clamp_min(0)
    expected = block.ls2(block.mlp(block.norm2(x))) + mine.scale * (hidden @ mine.up.weight.T + mine.up.bias)
    torch.testing.assert_close(adapted(x), expected)


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("vit_tiny_patch16_224", VIT | {"init_values": 0.5}),
        ("beit_base_patch16_224", BEIT),
        ("swin_tiny_patch4_window7_224", SWIN),
    ],
)
def test_adapted_model_starts_as_it_was_and_comes_back(architecture, model_args, tmp_path):
    model = ensemble(architecture, model_args).eval()
    image = torch.randn(2, *model.config.pretrained_cfg["input_size"])
    with torch.no_grad():
        before = model(image).logits
        begin_tuning(model, pretrained("adapter", None))
        torch.testing.assert_close(model(image).logits, before)
        shake(model)
        assert (model(image).logits - before).abs().max() > 1e-4
        model.save_pretrained(tmp_path)
        again = ECLForImageClassification.from_pretrained(tmp_path, experts=[1])
        torch.testing.assert_close(again(image).expert_logits[:, 0], model(image).expert_logits[:, 1])
    with pytest.raises(ValueError, match="merges into no weights"):
        save_timm(model, 0, tmp_path / "timm")


def test_rank_is_lifts():
    """Published for 12 blocks: 4 for 100 classes, 8 for 365, 32 for 1,000 and 256 for 8,142."""
    for classes, rank in ((100, 4), (365, 8), (1000, 32), (8142, 256)):
        assert lift_rank(classes * 768, 12 * 2 * 768) == rank
    assert lift_rank(2 * 768, 12 * 2 * 768) == 1
    model = ensemble(class_counts=[2] * 40)
    begin_tuning(model, pretrained("adapter", None))
    ranks = {module.down.out_features for module in model.modules() if isinstance(module, AdaptFormer)}
    assert ranks == {model.config.adapter_rank} == {8}  # 40 classes, 2 blocks


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("resnet20_cifar", "resnet20_cifar has no transformer blocks .* take lora"),
        ("swinv2_tiny_window8_256", "don't add the MLP of a normalised input"),
    ],
)
def test_encoder_without_such_blocks_takes_no_adapters(architecture, message):
    model = ensemble(architecture, SWIN | {"img_size": 32} if "swin" in architecture else None)
    shake(model)
    with pytest.raises(ValueError, match=message):
        begin_tuning(model, pretrained("adapter"))


def test_encoder_that_is_not_pretrained_is_refused():
    with pytest.raises(ValueError, match=r"set model\.pretrained"):
        begin_tuning(ensemble(), ModelConfig(tune="lora"))
