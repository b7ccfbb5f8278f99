"""The published model: outputs, files, loading of some or all experts, priors, and what a Hub user calls."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from ecl_hf import ECLConfig, ECLForImageClassification, log_prior_shift

COUNTS = [400, 90, 20, 5, 1]
SWIN = {"img_size": 56, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4]}
# name: timm model, model_args, image size
ENCODERS = {
    "cifar": ("resnet32_cifar", None, 32),
    "resnet": ("test_resnet", None, 64),
    "vit": ("test_vit", {"img_size": 64}, 64),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 56),
    "convnext": ("test_convnext", None, 64),
    "efficientnet": ("test_efficientnet", None, 64),
    "rotary": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, 56),
}


def build(architecture="test_resnet", **kwargs):
    """A model whose BatchNorm statistics and head biases are not those of the first step."""
    kwargs = {"num_experts": 3, "class_counts": COUNTS} | kwargs
    model = ECLForImageClassification(ECLConfig(architecture=architecture, **kwargs))
    model.train()
    with torch.no_grad():
        model(images(4, (kwargs.get("model_args") or {}).get("img_size", 64)))
        for expert in model.experts:
            torch.nn.init.normal_(expert.head.bias)
    return model.eval()


def images(batch=2, size=64):
    return torch.randn(batch, 3, size, size)


def weight_files(directory):
    return sorted(path.name for path in directory.glob("*.safetensors*"))


def shard_names(num_experts):
    return [f"model-{k:05}-of-{num_experts:05}.safetensors" for k in range(1, num_experts + 1)]


def expected_files(num_experts):
    return ["model.safetensors"] if num_experts == 1 else [*shard_names(num_experts), "model.safetensors.index.json"]


def keep_experts(source, target, experts):
    """Copy a saved ensemble without the files of the other experts."""
    shutil.copytree(source, target)
    for k, name in enumerate(shard_names(3)):
        if k not in experts:
            (target / name).unlink()
    return target


def drop_tensor(directory, name):
    """Take one tensor out of a single-file model."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Three experts, and the directory that they are saved in (not to be written to)."""
    torch.manual_seed(0)
    model, directory = build(), tmp_path_factory.mktemp("ensemble")
    model.save_pretrained(directory)
    return model, directory


# --- outputs ---


@pytest.mark.parametrize(
    ("num_experts", "num_classes"), [(1, 2), (3, 2), (1, 5), (3, 5), (1, 8142), (3, 8142)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_output_shapes(num_experts, num_classes, classifier):
    config = ECLConfig(num_experts=num_experts, classifier=classifier, class_counts=[3] * num_classes)
    model = ECLForImageClassification(config).eval()
    out = model(images(2, 16))
    assert out.loss is None
    assert out.features is None
    assert out.logits.shape == (2, num_classes)
    assert out.expert_logits.shape == (2, num_experts, num_classes)
    assert_close(out.logits, sum(out.expert_logits.unbind(1)) / num_experts)
    out = model(images(2, 16), labels=torch.tensor([0, num_classes - 1]), output_features=True)
    assert out.features.shape == (2, num_experts, 64)
    assert out.loss.shape == ()
    assert out.loss.isfinite()


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_heads_by_formula(classifier):
    scale = 7.0
    model = build(classifier=classifier, classifier_scale=scale)
    x = images()
    out = model(x, output_features=True)
    for k, expert in enumerate(model.experts):
        v = out.features[:, k].detach()
        assert_close(v, expert.backbone(x).detach())
        for b, c in itertools.product(range(2), range(len(COUNTS))):
            w = expert.head.weight[c].detach()
            expected = (v[b] * w).sum()
            if classifier == "cosine":
                expected = scale * expected / (v[b].norm() * w.norm())
            assert_close(out.expert_logits[b, k, c].detach(), expected + expert.head.bias[c].detach())


def test_a_new_cosine_head_has_no_bias_and_is_bounded_by_its_scale():
    model = ECLForImageClassification(ECLConfig(classifier="cosine", classifier_scale=16.0, num_labels=50)).eval()
    assert all(torch.equal(expert.head.bias, torch.zeros(50)) for expert in model.experts)
    assert model(100 * images(4, 32)).expert_logits.abs().max() < 16


def test_plain_tuple():
    model, x = build(), images()
    out = model(x)
    logits, expert_logits, _ = model(x, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert torch.equal(expert_logits, out.expert_logits)


@pytest.mark.parametrize(
    ("architecture", "anchors"),
    [
        ("resnet32_cifar", ["conv1.weight", "layer1.0.conv1.weight", "layer3.4.bn2.running_var"]),
        ("test_resnet", ["conv1.0.weight", "layer4.0.downsample.1.weight"]),
        ("test_vit", ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed"]),
    ],
)
def test_anchor_names(architecture, anchors):
    """The names of saved tensors are a published API."""
    keys = set(ECLForImageClassification(ECLConfig(architecture=architecture, num_experts=2)).state_dict())
    for k in range(2):
        assert {f"experts.{k}.backbone.{anchor}" for anchor in anchors} < keys
        assert {key for key in keys if key.startswith(f"experts.{k}.") and ".backbone." not in key} == {
            f"experts.{k}.head.weight",
            f"experts.{k}.head.bias",
        }
    assert {key.split(".")[1] for key in keys} == {"0", "1"}


# --- initialisation ---


@pytest.mark.parametrize("encoder", ENCODERS)
def test_initialisation_is_timms(encoder):
    architecture, model_args, _ = ENCODERS[encoder]
    torch.manual_seed(5)
    expected = timm.create_model(architecture, num_classes=0, **(model_args or {})).state_dict()
    torch.manual_seed(5)
    config = ECLConfig(architecture=architecture, model_args=model_args, num_experts=2)
    first, second = (expert.backbone.state_dict() for expert in ECLForImageClassification(config).experts)
    assert first.keys() == expected.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
    drawn = [
        name for name, tensor in expected.items() if tensor.ndim > 1 and tensor.is_floating_point() and tensor.any()
    ]
    assert len(drawn) > 5
    for name in drawn:
        assert not torch.equal(first[name], second[name]), name
        if first[name].numel() > 1000:
            assert_close(second[name].std(), first[name].std(), rtol=0.2, atol=0)


def test_convolutions_keep_kaimings_std():
    for expert in ECLForImageClassification(ECLConfig(architecture="resnet32_cifar")).experts:
        for name, fan_in in {"conv1": 3 * 9, "layer2.0.conv1": 16 * 9, "layer3.4.conv2": 64 * 9}.items():
            weight = expert.backbone.get_submodule(name).weight
            assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.15)


# --- files ---


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_reload_is_bit_identical(tmp_path, encoder, classifier):
    architecture, model_args, size = ENCODERS[encoder]
    model = build(architecture, model_args=model_args, classifier=classifier, classifier_scale=9.0, num_experts=2)
    model.save_pretrained(tmp_path)
    loaded = ECLForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training
    x = images(2, size)
    expected, out = model(x, output_features=True), loaded(x, output_features=True)
    assert expected.logits.isfinite().all()
    assert (expected.expert_logits[0] - expected.expert_logits[1]).abs().max() > 0  # depends on the picture
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    for name in ("logits", "expert_logits", "features"):  # how a product is rounded may depend on where weights lie
        assert_close(out[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_experts", [2, 3])
def test_one_file_per_expert(tmp_path, num_experts):
    build(num_experts=num_experts).save_pretrained(tmp_path)
    assert weight_files(tmp_path) == expected_files(num_experts)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for k, name in enumerate(shard_names(num_experts)):
        keys = set(load_file(tmp_path / name))
        assert {key.split(".")[1] for key in keys} == {str(k)}
        assert keys == {key for key, file in weight_map.items() if file == name}


def test_a_single_expert_is_a_single_file(tmp_path):
    model = build(num_experts=1)
    model.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (3, 2), (2, 3), (3, 3), (1, 1)])
def test_saving_over_another_model_leaves_nothing_of_it(tmp_path, before, after):
    build(num_experts=before).save_pretrained(tmp_path)
    model = build(num_experts=after)
    model.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == expected_files(after)
    x = images()
    assert torch.equal(ECLForImageClassification.from_pretrained(tmp_path)(x).expert_logits, model(x).expert_logits)
    last = ECLForImageClassification.from_pretrained(tmp_path, experts=[after - 1])
    assert torch.equal(last(x).logits, model(x).expert_logits[:, after - 1])


# --- some of the experts ---


@pytest.mark.parametrize("experts", [[0], [1], [2], [2, 0], (1, 2), [1, 2, 0]], ids=str)
@pytest.mark.parametrize("loader", [ECLForImageClassification, AutoModelForImageClassification])
def test_chosen_experts_are_slices_and_need_their_files_only(ensemble, tmp_path, experts, loader):
    model, directory = ensemble
    x = images()
    expected = model(x).expert_logits[:, list(experts)]
    part = loader.from_pretrained(keep_experts(directory, tmp_path / "part", experts), experts=experts)
    assert part.config.num_experts == len(part.experts) == len(experts)
    assert torch.equal(part(x).expert_logits, expected)
    assert_close(part(x).logits, expected.mean(1))
    part.save_pretrained(tmp_path / "again")
    again = loader.from_pretrained(tmp_path / "again")
    assert again.config.num_experts == len(experts)
    assert torch.equal(again(x).expert_logits, expected)
    assert weight_files(tmp_path / "again") == expected_files(len(experts))


def test_the_files_of_the_other_experts_matter_otherwise(ensemble, tmp_path):
    part = keep_experts(ensemble[1], tmp_path / "part", [1])
    with pytest.raises(OSError, match="model-00001-of-00003"):
        ECLForImageClassification.from_pretrained(part)
    with pytest.raises(OSError, match="model-00003-of-00003"):
        ECLForImageClassification.from_pretrained(part, experts=[1, 2])


def test_weights_of_ones_own_with_the_configuration_of_a_directory(ensemble, tmp_path):
    model, directory = ensemble
    own = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    loaded = ECLForImageClassification.from_pretrained(directory, state_dict=own)
    assert_close(loaded.state_dict(), own, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no fitting weights"):
        ECLForImageClassification.from_pretrained(
            directory, state_dict={"experts.0.head.bias": own["experts.0.head.bias"]}
        )


def test_variants_of_weights_are_refused(ensemble, tmp_path):
    model, directory = ensemble
    with pytest.raises(ValueError, match="no variants"):
        model.save_pretrained(tmp_path / "new", variant="fp16")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="no variants"):
        ECLForImageClassification.from_pretrained(directory, variant="fp16")


def test_the_only_expert_can_be_chosen(tmp_path):
    model, x = build(num_experts=1), images()
    model.save_pretrained(tmp_path)
    assert torch.equal(ECLForImageClassification.from_pretrained(tmp_path, experts=[0])(x).logits, model(x).logits)


@pytest.mark.parametrize("experts", [[3], [-1], [0, 3], [], [1, 1], [1.0], 1], ids=str)
def test_impossible_choices_of_experts(ensemble, experts):
    with pytest.raises(ValueError, match=r"experts=.*0\.\.2"):
        ECLForImageClassification.from_pretrained(ensemble[1], experts=experts)


# --- incomplete or unlike files ---


@pytest.mark.parametrize("choice", [{}, {"experts": [0]}], ids=["all", "chosen"])
@pytest.mark.parametrize("name", ["conv1.0.weight", "layer4.0.bn1.running_var"])
def test_missing_encoder_weights_raise(tmp_path, name, choice):
    build(num_experts=1).save_pretrained(tmp_path)
    drop_tensor(tmp_path, f"experts.0.backbone.{name}")
    with pytest.raises(ValueError, match=rf"1 encoder tensors.*experts\.0\.backbone\.{name}"):
        ECLForImageClassification.from_pretrained(tmp_path, **choice)


def test_weights_of_another_architecture_raise(tmp_path):
    build("test_convnext", num_experts=1).save_pretrained(tmp_path)
    edit_config(tmp_path, architecture="test_vit")  # of the same feature width
    for flags in ({}, {"ignore_mismatched_sizes": True}, {"experts": [0]}):
        with pytest.raises(ValueError, match=r"no fitting weights for .* encoder tensors of test_vit"):
            ECLForImageClassification.from_pretrained(tmp_path, **flags)


def test_encoder_weights_of_another_size_raise(tmp_path):
    build("test_resnet", num_experts=1).save_pretrained(tmp_path)
    edit_config(tmp_path, architecture="resnet10t")
    with pytest.raises(ValueError, match=r"no fitting weights for .* encoder tensors of resnet10t"):
        ECLForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("flags", [{}, {"experts": [0, 1]}])
def test_other_labels_replace_all_that_was_saved_about_the_classes(tmp_path, flags):
    names = {"id2label": dict(enumerate("abcde")), "label2id": {name: c for c, name in enumerate("abcde")}}
    build(**names).save_pretrained(tmp_path)

    def load(**more):
        return ECLForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **flags, **more)

    config = load(num_labels=9).config
    assert (config.num_labels, config.class_counts, config.id2label[8]) == (9, None, "LABEL_8")
    config = load(num_labels=4, class_counts=[4, 3, 2, 1]).config
    assert (config.num_labels, config.class_counts) == (4, [4, 3, 2, 1])
    config = load(id2label={0: "x", 1: "y"}).config
    assert (config.num_labels, config.class_counts, config.id2label) == (2, None, {0: "x", 1: "y"})
    model = load()
    assert (model.config.class_counts, model.config.id2label[4]) == (COUNTS, "e")
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)


def test_choosing_experts_respects_a_given_config(tmp_path):
    build().save_pretrained(tmp_path)
    config = ECLConfig.from_pretrained(tmp_path)
    for k in (0, 2):
        assert len(ECLForImageClassification.from_pretrained(tmp_path, config=config, experts=[k]).experts) == 1
    assert config.num_experts == 3
    assert (
        ECLForImageClassification.from_pretrained(tmp_path, experts=[0], logit_prior="train").config.logit_prior
        == "train"
    )


def test_class_names_must_fit_the_counts():
    with pytest.raises(StrictDataclassError, match="class_counts has 3 entries, but num_labels is 2"):
        ECLConfig(class_counts=[3, 2, 1], id2label={0: "a", 1: "b"})


def test_input_size_of_the_image_processor_follows_the_model_arguments():
    config = build("test_vit", num_experts=1, model_args={"img_size": 64}).config
    assert tuple(config.pretrained_cfg["input_size"]) == (3, 64, 64)


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_a_head_for_other_classes_starts_anew(tmp_path, classifier):
    model = build(num_experts=2, classifier=classifier, class_counts=None, num_labels=5)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ECLForImageClassification.from_pretrained(tmp_path, num_labels=9)
    loaded = ECLForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    x = images()
    out = loaded(x, output_features=True)
    assert out.expert_logits.shape == (2, 2, 9)
    assert torch.equal(out.features, model(x, output_features=True).features)
    for expert in loaded.experts:
        assert 0 < expert.head.weight.abs().max() < 1
        assert expert.head.bias.abs().max() < 1


# --- dtype, devices, compiling ---


@pytest.mark.parametrize("choice", [{}, {"experts": [1]}], ids=["all", "chosen"])
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(ensemble, choice, device_map):
    model, directory = ensemble
    loaded = ECLForImageClassification.from_pretrained(directory, device_map=device_map, **choice)
    x = images()
    expected = model(x).expert_logits[:, choice.get("experts", slice(None))]
    assert torch.equal(loaded(x).expert_logits, expected)


def test_experts_on_different_devices(ensemble, tmp_path):
    """The disk stands for a second accelerator: accelerate moves weights and inputs at each expert's forward."""
    model, directory = ensemble
    devices = {"experts.0": "cpu", "experts.1": "disk", "experts.2": "cpu"}
    loaded = ECLForImageClassification.from_pretrained(directory, device_map=devices, offload_folder=tmp_path)
    assert {parameter.device.type for parameter in loaded.experts[1].parameters()} == {"meta"}
    x = images()
    with torch.no_grad():
        assert torch.equal(loaded(x).expert_logits, model(x).expert_logits)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"flip": True, "output_features": True}], ids=str)
def test_forward_compiles_without_graph_breaks(ensemble, flags):
    model, _ = ensemble
    x = images()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x, **flags)
        torch.testing.assert_close(compiled.to_tuple(), model(x, **flags).to_tuple())


@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_automatic_dtype_is_that_of_the_weights(tmp_path, saved):
    build().to(saved).save_pretrained(tmp_path)
    for given in ({"dtype": "auto"}, {}):
        assert ECLForImageClassification.from_pretrained(tmp_path, **given).dtype == saved


@pytest.mark.parametrize("choice", [{}, {"experts": [1]}], ids=["all", "chosen"])
def test_bfloat16(ensemble, choice):
    model, directory = ensemble
    half = ECLForImageClassification.from_pretrained(directory, dtype=torch.bfloat16, **choice)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    x = images()
    out = half(x.bfloat16(), labels=torch.tensor([0, 4]), target_prior=[1, 1, 1, 1, 0])
    expected = model(x).expert_logits[:, choice.get("experts", [0, 1, 2])]
    assert out.expert_logits.dtype == out.logits.dtype == torch.bfloat16
    assert_close(out.expert_logits.float(), expected, atol=0.1, rtol=0.05)
    assert out.loss.isfinite()
    assert out.logits.isfinite().all()


# --- loss and priors ---


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize(
    ("logit_prior", "class_counts"), [("uniform", COUNTS), ("train", COUNTS), ("uniform", None)], ids=str
)
def test_loss_against_loops(num_experts, logit_prior, class_counts):
    """Uniform prior: the balanced cross-entropy of Eq. 3. Otherwise the plain one."""
    model = build(num_experts=num_experts, logit_prior=logit_prior, class_counts=class_counts, num_labels=len(COUNTS))
    labels = [0, 4, 2, 1]
    out = model(images(4), labels=torch.tensor(labels))
    z = out.expert_logits.detach().double().numpy()
    shift = np.zeros(len(COUNTS))
    if logit_prior == "uniform" and class_counts is not None:
        shift = np.log(np.array(class_counts) / sum(class_counts)) - np.log(1 / len(class_counts))
    losses = [-log_softmax(z[b, k] + shift)[y] for b, y in enumerate(labels) for k in range(num_experts)]
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    out.loss.backward()
    assert all(expert.head.weight.grad.any() for expert in model.experts)


@pytest.mark.parametrize(
    "target", [[1 / 5] * 5, [3] * 5, torch.ones(5), np.full(5, 0.2)], ids=["p", "w", "tensor", "np"]
)
def test_uniform_target_leaves_a_uniform_model_alone(target):
    model, x = build(), images()
    out = model(x, target_prior=target)
    assert_close(out.logits, model(x).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("logit_prior", ["uniform", "train"])
@pytest.mark.parametrize("target", [[0.5, 0.2, 0.15, 0.1, 0.05], [1, 2, 3, 4, 5], [5, 5, 5, 5, 5]], ids=str)
def test_target_prior_moves_the_logits(logit_prior, target):
    model, x = build(logit_prior=logit_prior), images()
    plain, out = model(x), model(x, target_prior=target)
    source = np.array(COUNTS if logit_prior == "train" else [1] * len(COUNTS))
    log_source = np.log(source / source.sum())
    log_target = np.log(np.array(target) / sum(target))
    expected = plain.logits.detach().double().numpy() - (log_source - log_target)
    np.testing.assert_allclose(out.logits.detach().double().numpy(), expected, rtol=0, atol=1e-5)
    assert torch.equal(out.expert_logits, plain.expert_logits)


def test_target_prior_does_not_change_the_loss():
    model, x, labels = build(), images(), torch.tensor([0, 4])
    assert torch.equal(model(x, labels=labels, target_prior=[1, 2, 3, 4, 5]).loss, model(x, labels=labels).loss)


@pytest.mark.parametrize("logit_prior", ["uniform", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_impossible_class_is_never_predicted_and_stays_finite(logit_prior, dtype):
    model, x = build(logit_prior=logit_prior).to(dtype), images(8).to(dtype)
    for expert in model.experts:
        expert.head.bias.data[1] = 20.0
    plain, out = model(x).logits, model(x, target_prior=[0.25, 0, 0.25, 0.25, 0.25]).logits
    assert (plain.argmax(-1) == 1).all()
    assert out.isfinite().all()
    assert (out.argmax(-1) != 1).all()


@pytest.mark.parametrize(
    "target",
    [[0.5, 0.5], [0.2] * 6, 1.0, [[0.2] * 5], [0.5, 0.5, 0.5, 0, -0.5], [0] * 5, [math.nan, 1, 1, 1, 1]],
    ids=str,
)
def test_impossible_target_priors(ensemble, target):
    with pytest.raises(ValueError, match="target_prior"):
        ensemble[0](images(), target_prior=target)


@pytest.mark.parametrize("counts", [[400, 90, 20, 5, 1], [7], [1, 1], list(range(1, 8143))], ids=len)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_log_prior_shift_against_numpy(counts, kind):
    weights = np.random.RandomState(0).rand(len(counts)) + 0.01
    source, target = np.array(counts) / sum(counts), weights / weights.sum()
    shift = log_prior_shift(kind(counts))
    assert shift.dtype == torch.float32
    np.testing.assert_allclose(shift.numpy(), np.log(source) - np.log(1 / len(counts)), rtol=1e-6, atol=1e-6)
    moved = log_prior_shift(kind(counts), kind(weights.tolist()))
    np.testing.assert_allclose(moved.numpy(), np.log(source) - np.log(target), rtol=1e-6, atol=1e-6)


def test_zero_count_is_counted_as_one_with_one_warning():
    with pytest.warns(UserWarning, match=r"2 classes have no training image.*\[1, 3\]") as record:
        shift = log_prior_shift([50, 0, 3, 0])
    assert len(record) == 1
    assert torch.equal(shift, log_prior_shift([50, 1, 3, 1]))


@pytest.mark.parametrize("counts", [[3, -1], [], [[1, 2]], [1.0, math.nan], [math.inf, 1]], ids=str)
def test_impossible_counts(counts):
    with pytest.raises(ValueError, match="class_counts"):
        log_prior_shift(counts)


# --- config ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must lie in 1..64, got 0"),
        ({"num_experts": "3"}, "num_experts"),
        ({"num_experts": 3.0}, "num_experts"),
        ({"num_experts": None}, "num_experts"),
        ({"share_blocks": -1}, "share_blocks must not be negative"),
        ({"share_blocks": 2}, "needs share_stages"),
        ({"adapter_rank": -1}, "adapter_rank must lie in 0..4096"),
        ({"adapter_rank": 4097}, "adapter_rank must lie in 0..4096"),
        ({"attention_map": [7]}, "attention_map must hold two sides in 1..16"),
        ({"attention_map": [7, 17]}, "attention_map must hold two sides in 1..16"),
        ({"classifier": "mlp"}, "classifier.*'linear', 'cosine'"),
        ({"classifier_scale": 0}, "classifier_scale must be positive"),
        ({"classifier_scale": "16"}, "classifier_scale"),
        ({"classifier_chunks": 0}, "classifier_chunks must be at least 1"),
        ({"classifier_neck": -1}, "classifier_neck must lie in 0..65536"),
        ({"architecture": 32}, "architecture"),
        ({"class_counts": [3, 2, 1], "num_labels": 4}, "3 entries, but num_labels is 4"),
        ({"class_counts": [3, -1]}, "non-negative"),
        ({"class_counts": [0, 0]}, "at least one image"),
        ({"class_counts": [1.5, 2.5]}, "class_counts"),
        ({"class_counts": "12"}, "class_counts"),
        ({"logit_prior": "train"}, "needs class_counts"),
        ({"logit_prior": "test", "class_counts": [1, 2]}, "logit_prior.*'uniform', 'train'"),
        ({"model_args": ["img_size"]}, "model_args"),
    ],
    ids=str,
)
def test_config_refuses(arguments, message):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=f"(?s){message}"):
        ECLConfig(**arguments)


def test_number_of_labels_comes_from_the_counts():
    assert ECLConfig(class_counts=[3, 2, 1]).num_labels == 3
    assert ECLConfig(class_counts=[3, 2, 1], num_labels=3).num_labels == 3
    assert ECLConfig(num_labels=7).num_labels == 7


def test_config_survives_saving(tmp_path):
    config = ECLConfig(
        architecture="test_vit",
        num_experts=2,
        classifier="cosine",
        classifier_scale=32,
        class_counts=[9, 4, 0],
        logit_prior="train",
        model_args={"img_size": 64},
        id2label={0: "cat", 1: "dog", 2: "owl"},
        label2id={"cat": 0, "dog": 1, "owl": 2},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ECLConfig
    for name in ("architecture", "num_experts", "classifier", "classifier_scale", "class_counts", "logit_prior"):
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.model_args == {"img_size": 64}
    assert loaded.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert loaded.label2id == {"cat": 0, "dog": 1, "owl": 2}


# --- what a Hub user calls ---


def pictures():
    """Five pictures of different sizes; the last is grey."""
    random = np.random.RandomState(0)
    sizes = [(200, 180), (160, 160), (90, 240), (32, 32), (177, 203)]
    result = [Image.fromarray(random.randint(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    result[-1] = result[-1].convert("L")
    return result


def eval_transform(architecture):
    """Timm's own, from the architecture's own data configuration."""
    cfg = timm.create_model(architecture).pretrained_cfg
    return timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=cfg), is_training=False)


@pytest.mark.parametrize("architecture", ["resnet32_cifar", "test_resnet", "test_efficientnet"])
def test_auto_classes_and_pipeline(tmp_path, architecture):
    names = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}
    model = build(architecture, num_experts=2, id2label=names)
    transform = eval_transform(architecture)
    x = torch.stack([transform(picture.convert("RGB")) for picture in pictures()])
    logits = model(x).expert_logits.detach()
    for head, mean, spread in zip((e.head for e in model.experts), logits.mean(0), logits.std(0), strict=True):
        head.weight.data /= spread[:, None]  # standardised, so that the answers depend on the picture
        head.bias.data = (head.bias.data - mean) / spread
    model.save_pretrained(tmp_path)
    scores = model(x).logits.softmax(-1)
    assert scores.std(0).max() > 0.05
    expected = [dict(zip(names.values(), row, strict=True)) for row in scores.tolist()]

    processor = AutoImageProcessor.from_pretrained(tmp_path)
    pixel_values = processor([picture.convert("RGB") for picture in pictures()], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values, x)

    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is ECLForImageClassification
    assert_close(loaded(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    assert loaded.config.id2label == names

    classify = pipeline("image-classification", model=str(tmp_path))
    single = classify(pictures()[0], top_k=5)
    batch = classify(pictures(), top_k=5, batch_size=5)
    assert len(batch) == 5
    for answer, row in zip([single, *batch], [expected[0], *expected], strict=True):
        assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(row, abs=1e-5)


def test_temperature_divides_all_logits_and_survives_saving(tmp_path):
    config = ECLConfig(architecture="resnet20_cifar", num_experts=2, class_counts=[8, 4, 2])
    model = ECLForImageClassification(config).eval()
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        raw = model(pixels)
        config.temperature = 2.5
        model.save_pretrained(tmp_path)
        cooled = ECLForImageClassification.from_pretrained(tmp_path).eval()(pixels, target_prior=[8, 4, 2])
    assert_close(cooled.expert_logits, raw.expert_logits / 2.5)
    prior = torch.tensor([8.0, 4, 2])
    assert_close(cooled.logits.softmax(-1), (raw.logits / 2.5 + prior.log()).softmax(-1))
    with pytest.raises(StrictDataclassError, match="temperature"):
        ECLConfig(temperature=0)
