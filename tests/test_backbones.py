"""CIFAR ResNets against the architecture's own arithmetic, and as citizens of timm; refusals of create_encoder."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from ecl_hf.backbones import CifarBlock, CifarResNet, create_encoder

DEPTHS = (20, 32, 44, 56)


def conv3x3_and_norm(fan_in, fan_out):
    return 9 * fan_in * fan_out + 2 * fan_out


def encoder_parameters(depth, widths=(16, 32, 64)):
    """He et al. 2016, Sec. 4.2: a stem, then three stages of (depth - 2) / 6 blocks of two convolutions each."""
    total, width = conv3x3_and_norm(3, widths[0]), widths[0]
    for stage_width in widths:
        for _ in range((depth - 2) // 6):
            total += conv3x3_and_norm(width, stage_width) + conv3x3_and_norm(stage_width, stage_width)
            width = stage_width
    return total


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameter_counts(depth):
    encoder = create_encoder(f"resnet{depth}_cifar")
    assert count(encoder) == encoder_parameters(depth)
    assert sum(isinstance(module, nn.Conv2d) for module in encoder.modules()) == depth - 1  # and the classifier


def test_resnet32_is_the_small_one():
    assert count(create_encoder("resnet32_cifar")) == 463_504


@pytest.mark.parametrize("widths", [(16, 24, 48), (8, 8, 10)])
def test_other_widths(widths):
    encoder = create_encoder("resnet20_cifar", widths=widths)
    assert count(encoder) == encoder_parameters(20, widths)
    assert encoder.head_hidden_size == encoder.num_features == widths[-1]
    assert encoder.eval()(torch.randn(2, 3, 16, 16)).shape == (2, widths[-1])
    encoder.reset_classifier(7)
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize("widths", [(16, 8, 32), (16, 25, 48), (16, 32)])
def test_widths_that_the_shortcuts_cannot_take_are_refused(widths):
    with pytest.raises(ValueError, match="timm can't build resnet20_cifar"):
        create_encoder("resnet20_cifar", widths=widths)


@pytest.mark.parametrize(("in_width", "width", "stride"), [(16, 16, 1), (16, 32, 2), (32, 64, 2), (4, 8, 1)])
@pytest.mark.parametrize("size", [8, 7])
def test_shortcut_subsamples_and_pads_with_zeros(in_width, width, stride, size):
    block = CifarBlock(in_width, width, stride)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    nn.init.zeros_(block.bn2.weight)  # silences the residual branch
    x = torch.randn(2, in_width, size, size)
    out_size = math.ceil(size / stride)
    expected = torch.zeros(2, width, out_size, out_size)
    first = (width - in_width) // 2
    for channel in range(in_width):
        for row in range(out_size):
            for column in range(out_size):
                expected[:, first + channel, row, column] = x[:, channel, stride * row, stride * column].clamp_min(0)
    assert torch.equal(block(x), expected)


def test_block_adds_two_convolutions_to_the_shortcut():
    block = CifarBlock(4, 4, 1).eval()
    for norm in (block.bn1, block.bn2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
    x = torch.randn(2, 4, 5, 5)

    def conv_norm(x, conv, norm):
        x = nn.functional.conv2d(x, conv.weight, padding=1)
        mean, scale, bias = (t[:, None, None] for t in (norm.running_mean, norm.weight, norm.bias))
        return (x - mean) / math.sqrt(1 + norm.eps) * scale + bias

    inner = conv_norm(x, block.conv1, block.bn1).clamp_min(0)
    assert_close(block(x), (conv_norm(inner, block.conv2, block.bn2) + x).clamp_min(0))


def test_convolutions_are_kaiming_normal():
    for module in create_encoder("resnet32_cifar").modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach().double()
            std = math.sqrt(2 / (9 * module.in_channels))
            n = weight.numel()
            assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * n)
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(n)
            assert weight.abs().max() > 2 * std  # a uniform distribution of this std ends at 1.73


def hooked(model, x):
    """Maps that leave the stages, as hooks on an unchanged model see them."""
    maps = []
    hooks = [getattr(model, f"layer{n}").register_forward_hook(lambda *a: maps.append(a[-1])) for n in (1, 2, 3)]
    last = model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return last, maps


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return timm.create_model("resnet20_cifar").eval()


@pytest.mark.parametrize("kind", ["list", "dict", "getter", "hook", "fx"])
@pytest.mark.parametrize("indices", [None, (0, 2), (1,), (-3, -2)])
def test_timms_feature_extractors_give_the_maps_of_the_stages(plain, kind, indices):
    x = torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    chosen = {} if indices is None else {"out_indices": indices}
    extractor = timm.create_model("resnet20_cifar", features_only=True, feature_cls=kind, **chosen).eval()
    maps = extractor(x)
    _, expected = hooked(plain, x)
    wanted = range(3) if indices is None else indices
    assert_equal(list(maps.values()) if kind == "dict" else maps, [expected[place] for place in wanted])
    assert extractor.feature_info.channels() == [(16, 32, 64)[place] for place in wanted]
    assert extractor.feature_info.reduction() == [(1, 2, 4)[place] for place in wanted]


@pytest.mark.parametrize(("indices", "wanted"), [(None, [0, 1, 2]), (2, [1, 2]), ([0, -1], [0, 2]), ([1], [1])])
def test_intermediate_maps(plain, indices, wanted):
    x = torch.randn(2, 3, 16, 16)
    last, expected = hooked(plain, x)
    expected = [expected[place] for place in wanted]
    ours, maps = plain.forward_intermediates(x, indices)
    assert torch.equal(ours, last)
    assert_equal(maps, expected)
    assert_equal(plain.forward_intermediates(x, indices, intermediates_only=True, stop_early=True), expected)
    early, _ = plain.forward_intermediates(x, indices, stop_early=True)
    assert torch.equal(early, expected[-1])


def test_what_maps_do_not_need_is_pruned(plain):
    model, x = copy.deepcopy(plain), torch.randn(2, 3, 16, 16)
    _, expected = hooked(plain, x)
    assert model.prune_intermediate_layers([-2]) == [1]
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"conv1", "bn1", "layer1", "layer2"}
    assert_equal(model.forward_intermediates(x, [1], intermediates_only=True), [expected[1]])
    assert torch.equal(model(x), expected[1])  # neither pooled nor classified
    assert model.num_features == 32


def test_other_formats_of_maps_are_refused(plain):
    with pytest.raises(ValueError, match="output_fmt must be NCHW"):
        plain.forward_intermediates(torch.randn(1, 3, 16, 16), output_fmt="NHWC")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*instance-level annotations:UserWarning")  # of torch.fx's own code
@pytest.mark.parametrize("training", [False, True])
def test_scripted_and_traced_models_compute_the_same(training):
    eager = CifarResNet(blocks=1).train(training)
    scripted = torch.jit.script(copy.deepcopy(eager))
    traced = torch.fx.symbolic_trace(copy.deepcopy(eager))
    both = torch.jit.script(copy.deepcopy(traced))
    x = torch.randn(4, 3, 17, 17)
    expected = eager(x)
    expected.square().mean().backward()
    for model in (scripted, traced, both):
        out = model(x)
        assert torch.equal(out, expected)
        out.square().mean().backward()
        for name, value in model.named_parameters():
            assert_close(value.grad, eager.get_parameter(name).grad)
        assert_equal(list(model.buffers()), list(eager.buffers()))


def test_classifier_and_pooling_can_be_left_out(plain):
    x = torch.randn(2, 3, 32, 32)
    last = plain.forward_features(x)
    assert last.shape[-2:] == plain.default_cfg["pool_size"]
    for model in (copy.deepcopy(plain), timm.create_model("resnet20_cifar", num_classes=0, global_pool="").eval()):
        model.load_state_dict({k: v for k, v in plain.state_dict().items() if not k.startswith("fc.")}, strict=False)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), last)
        assert isinstance(model.get_classifier(), nn.Identity)


def test_names_are_registered_with_timm():
    assert set(timm.list_models("*_cifar")) >= {f"resnet{depth}_cifar" for depth in DEPTHS}


@pytest.mark.parametrize("size", [16, 32])
def test_is_a_timm_model(size):
    model = timm.create_model("resnet20_cifar", num_classes=7).eval()
    x = torch.randn(2, 3, size, size)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, size // 4, size // 4)
    pooled = model.forward_head(features, pre_logits=True)
    assert_close(pooled, features.mean((2, 3)))
    logits = model(x)
    assert logits.shape == (2, 7)
    assert_close(logits, pooled @ model.get_classifier().weight.T + model.get_classifier().bias)
    assert torch.equal(model.forward_head(features), logits)


def test_reset_classifier():
    model = timm.create_model("resnet20_cifar", num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model = timm.create_model("resnet20_cifar", global_pool="max", dtype=torch.float64, device="cpu").eval()
    model.reset_classifier(3)
    assert (model.fc.weight.dtype, model.fc.training) == (torch.float64, False)
    peaks = model.forward_features(x.double()).amax((2, 3))
    assert_close(model(x.double()), peaks @ model.fc.weight.T + model.fc.bias)  # the pooling stays


def test_timm_arguments_arrive():
    model = timm.create_model("resnet20_cifar", num_classes=4, in_chans=1, drop_rate=0.5, global_pool="max")
    x = torch.randn(2, 1, 16, 16)
    features = model.eval().forward_features(x)
    pooled = features.amax((2, 3))
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    dropped = model.train().forward_head(features, pre_logits=True)
    kept = dropped != 0
    assert (pooled[~kept] > 0).any()
    assert_close(dropped[kept], 2 * pooled[kept])


@pytest.mark.parametrize(
    ("architecture", "size"), [("resnet32_cifar", 32), ("test_resnet", 64), ("test_efficientnet.r160_in1k", 64)]
)
def test_encoder_gives_pooled_features(architecture, size):
    encoder = create_encoder(architecture).eval()
    assert encoder(torch.randn(2, 3, size, size)).shape == (2, encoder.head_hidden_size)


def test_model_args_arrive():
    assert create_encoder("resnet20_cifar", in_chans=5).conv1.in_channels == 5


@pytest.mark.parametrize(("wrong", "close"), [("resnet32_cifr", "resnet32_cifar"), ("resnet5O", "resnet50")])
def test_unknown_name_suggests_close_ones(wrong, close):
    with pytest.raises(ValueError, match=rf"{wrong}.*did you mean.*\b{close}\b"):
        create_encoder(wrong)


def test_unknown_name_without_a_close_one():
    with pytest.raises(ValueError, match=r"'\?!'.*timm\.list_models"):
        create_encoder("?!")


def test_shared_modules_are_refused():
    with pytest.raises(ValueError, match="coat_tiny uses one module in two places"):
        create_encoder("coat_tiny")
