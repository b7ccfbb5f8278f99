"""Fresh ensembles: weights from a file in every expert, heads drawn anew, sizes, and what does not fit."""

import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model, label_leak, pretrained_tag
from ecl_hf.methods import METHODS

NAMES = ["ant", "bee", "cow", "dog"]
COUNTS = [40, 20, 9, 4]
CLASSIFIERS = {"resnet20_cifar": "fc.", "test_resnet": "fc.", "test_vit": "head."}


def initialise(method="ecl", **model):
    method = METHODS[method] if isinstance(method, str) else method
    return initialise_model(ModelConfig(**model), method, COUNTS, NAMES, method.settings())


def random_weights(architecture, num_classes=10):
    torch.manual_seed(1)  # weights as seed 0 draws them are taken for weights that the file lacks
    model = timm.create_model(architecture, num_classes=num_classes)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # fresh norms and biases are all alike
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.state_dict()


def write(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("architecture", "num_classes"),
    [("resnet20_cifar", 10), ("resnet20_cifar", 0), ("resnet20_cifar", 4), ("test_resnet", 1000), ("test_vit", 1000)],
)
def test_every_expert_starts_from_the_weights_of_the_file(architecture, num_classes, ending, tmp_path):
    state = random_weights(architecture, num_classes)
    model = initialise(architecture=architecture, pretrained=write(tmp_path / f"weights{ending}", state), num_experts=3)
    encoder = {key: value for key, value in state.items() if not key.startswith(CLASSIFIERS[architecture])}
    assert len(model.experts) == 3
    for expert in model.experts:
        own = expert.backbone.state_dict()
        assert own.keys() == encoder.keys()
        assert all(torch.equal(own[key], value) for key, value in encoder.items())
        assert expert.head.weight.shape == (4, expert.backbone.head_hidden_size)
    heads = [expert.head.weight for expert in model.experts]
    assert not any(torch.equal(heads[a], heads[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert len({parameter.data_ptr() for parameter in model.parameters()}) == len(list(model.parameters()))


def test_a_file_serves_an_encoder_whose_published_weights_have_a_format_of_their_own(tmp_path):
    architecture = "vit_tiny_patch16_224"
    assert timm.get_pretrained_cfg(architecture).custom_load  # timm before 1.0.31 expects that format of any file
    state = random_weights(architecture, 1000)
    model = initialise(architecture=architecture, pretrained=write(tmp_path / "a.safetensors", state), num_experts=1)
    own = model.experts[0].backbone.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("head."))


@pytest.mark.parametrize("pretrained", [False, True])
def test_global_generator_decides_what_is_drawn(pretrained, tmp_path):
    source = write(tmp_path / "a.safetensors", random_weights("resnet20_cifar")) if pretrained else False

    def drawn(seed):
        torch.manual_seed(seed)
        return initialise(architecture="resnet20_cifar", pretrained=source, num_experts=2).state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    for name, same in (("backbone.conv1.weight", pretrained), ("head.weight", False)):
        key = f"experts.0.{name}"
        assert torch.equal(first[key], other[key]) == same
        assert torch.equal(first[key], first[f"experts.1.{name}"]) == same


@pytest.mark.parametrize(
    ("method", "asked", "made"),
    [("ce", None, 1), ("bc", 1, 1), ("ecl", None, 3), ("ecl", 5, 5), ("ecl", 1, 1)],
)
def test_method_knows_the_number_of_experts(method, asked, made):
    model = initialise(method, architecture="resnet20_cifar", num_experts=asked)
    assert len(model.experts) == model.config.num_experts == made


def test_method_for_fewer_experts_is_refused():
    with pytest.raises(ValueError, match=r"trains 1 expert, but the model has 3"):
        initialise("bc", architecture="resnet20_cifar", num_experts=3)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not callable(method.logit_prior)])
def test_logit_prior_is_that_of_the_method(method):
    model = initialise(method, architecture="resnet20_cifar", num_experts=METHODS[method].experts.least)
    assert model.config.logit_prior == METHODS[method].logit_prior


@pytest.mark.parametrize(("tau", "power"), [(1.0, 0.0), (2.0, -1 / 3)])
def test_logit_prior_that_depends_on_the_settings(tau, power):
    """Counts in a geometric row, so that the reversed prior is the inverse one."""
    config = ModelConfig(architecture="resnet20_cifar", num_experts=3, share_stages=0)
    settings = METHODS["sade"].settings(tau=tau)
    model = initialise_model(config, METHODS["sade"], [8, 4, 2, 1], ["ant", "bee", "cow", "dog"], settings)
    weights = torch.tensor([8.0, 4, 2, 1], dtype=torch.double) ** power
    expected = (weights / weights.sum()).log()
    found = model.config.logit_prior
    assert found == "uniform" if power == 0 else torch.allclose(torch.tensor(found).double(), expected, atol=1e-6)


def test_classes_are_written_into_the_config():
    config = initialise(architecture="resnet20_cifar", num_experts=1).config
    assert config.id2label == {0: "ant", 1: "bee", 2: "cow", 3: "dog"}
    assert config.label2id == {"ant": 0, "bee": 1, "cow": 2, "dog": 3}
    assert config.num_labels == 4
    assert config.class_counts == COUNTS


def test_cosine_classifier_with_its_scale():
    model = initialise(architecture="resnet20_cifar", num_experts=2, classifier="cosine", classifier_scale=32.0)
    features = torch.randn(5, 64)
    for expert in model.experts:
        weight = expert.head.weight / expert.head.weight.norm(dim=1, keepdim=True)
        expected = 32 * features @ weight.T / features.norm(dim=1, keepdim=True) + expert.head.bias
        torch.testing.assert_close(expert.head(features), expected)


@pytest.mark.parametrize(
    ("architecture", "asked", "size", "model_args"),
    [
        ("resnet20_cifar", None, 32, None),
        ("resnet20_cifar", 16, 16, None),
        ("test_resnet", None, 160, None),
        ("test_resnet", 64, 64, None),
        ("test_vit", None, 160, None),
        ("test_vit", 32, 32, {"img_size": 32}),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_image_size(architecture, asked, size, model_args, pretrained, tmp_path):
    source = write(tmp_path / "a.safetensors", random_weights(architecture)) if pretrained else False
    model = initialise(architecture=architecture, image_size=asked, pretrained=source, num_experts=1)
    assert tuple(model.config.pretrained_cfg["input_size"]) == (3, size, size)
    assert model.config.model_args == model_args
    assert model(torch.zeros(2, 3, size, size)).logits.shape == (2, 4)


@pytest.mark.parametrize("pretrained", [False, True])
def test_pixels_are_prepared_as_the_architecture_wants(pretrained, tmp_path):
    source = write(tmp_path / "a.safetensors", random_weights("test_resnet")) if pretrained else False
    config = initialise(architecture="test_resnet", image_size=64, pretrained=source, num_experts=1).config
    expected = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    expected |= {"crop_pct": 0.95, "crop_mode": "center"}
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in config.pretrained_cfg.items()}
    assert found == expected


def test_position_embedding_is_resampled_to_the_image_size(tmp_path):
    state = random_weights("test_vit")
    own = state["pos_embed"].shape[1]
    model = initialise(architecture="test_vit", image_size=32, pretrained=write(tmp_path / "a.safetensors", state))
    assert own == 1 + (160 // 16) ** 2
    for expert in model.experts:
        loaded = expert.backbone.state_dict()
        assert loaded["pos_embed"].shape[1] == 1 + (32 // 16) ** 2
        torch.testing.assert_close(loaded["pos_embed"][:, 0], state["pos_embed"][:, 0])
        assert all(torch.equal(value, state[key]) for key, value in loaded.items() if key != "pos_embed")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pt", "folder/weights.bin"])
def test_missing_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"model\.pretrained .*{name} is not a file"):
        initialise(architecture="resnet20_cifar", pretrained=str(tmp_path / name))


@pytest.mark.parametrize("odd", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
@pytest.mark.parametrize("name", ["weights", "weights.safetensors"])
def test_what_is_no_file_is_not_opened(name, odd, tmp_path):
    odd(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=rf"model\.pretrained .*{name} is not a file"):
        initialise(architecture="resnet20_cifar", pretrained=str(tmp_path / name))


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        ("resnet20_cifar", "resnet32_cifar"),
        ("resnet32_cifar", "resnet20_cifar"),
        ("test_vit", "resnet20_cifar"),
        ("test_resnet", "test_vit"),
        ("test_resnet", "resnet20_cifar"),
    ],
)
def test_weights_of_another_architecture_are_refused(held, wanted, tmp_path):
    file = write(tmp_path / "weights.safetensors", random_weights(held))
    with pytest.raises(ValueError, match=rf"model\.pretrained=.*weights\.safetensors.* {wanted}"):
        initialise(architecture=wanted, pretrained=file)


def test_damaged_file_is_refused(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.safetensors can't be loaded into resnet20_cifar"):
        initialise(architecture="resnet20_cifar", pretrained=str(tmp_path / "weights.safetensors"))


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, 2))])
def test_pickled_code_is_not_run(save, name, tmp_path):
    save({"conv1.weight": Bomb(tmp_path / "harm")}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} can't be loaded into resnet20_cifar"):
        initialise(architecture="resnet20_cifar", pretrained=str(tmp_path / name))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [None, [1], {1: torch.ones(1)}, {"conv1.weight": "x"}, {"state_dict": [1]}])
def test_file_that_holds_no_weights_is_named(content, tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"") if content is None else torch.save(content, file)
    with pytest.raises(ValueError, match=r"weights\.pth can't be loaded into resnet20_cifar: \S"):
        initialise(architecture="resnet20_cifar", pretrained=str(file))


@pytest.mark.parametrize("gone", ["layer2.1.conv2.weight", "conv1.weight"])
def test_incomplete_weights_are_refused(gone, tmp_path):
    state = random_weights("resnet20_cifar")
    del state[gone]
    with pytest.raises(ValueError, match=rf"no weights for 1 tensors of resnet20_cifar: {gone}"):
        initialise(architecture="resnet20_cifar", pretrained=write(tmp_path / "weights.safetensors", state))


def test_architecture_without_published_weights():
    with pytest.raises(ValueError, match=r"model\.pretrained=True can't be loaded into resnet20_cifar: No pretrained"):
        initialise(architecture="resnet20_cifar", pretrained=True)


@pytest.mark.parametrize("source", [True, "nobody/no-such-model"])
def test_weights_that_the_hub_can_not_give(source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"model\.pretrained={source} can't be loaded into test_resnet"):
        initialise(architecture="test_resnet", pretrained=source)


@pytest.mark.parametrize(
    ("name", "hint"), [("resnet32_cifra", "did you mean resnet32_cifar"), ("qqqqqq", r"timm\.list_models")]
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_unknown_architecture(name, hint, pretrained):
    with pytest.raises(ValueError, match=f"'{name}'.*{hint}"):
        initialise(architecture=name, pretrained=pretrained)


def test_more_arguments_for_the_encoders():
    config = ModelConfig(architecture="resnet20_cifar", num_experts=2, args={"widths": [8, 12, 20]})
    model = initialise_model(config, METHODS["bc_ensemble"], [3, 2], ["a", "b"])
    assert model.config.model_args == {"widths": [8, 12, 20]}
    assert [expert.head.in_features for expert in model.experts] == [20, 20]
    with pytest.raises(ValueError, match=r"model\.args must not hold checkpoint_path"):
        ModelConfig(args={"checkpoint_path": "weights.pth"})


@pytest.mark.parametrize(
    ("architecture", "pretrained", "tag", "leaks"),
    [
        ("resnet18", True, "resnet18.a1_in1k", True),
        ("vit_base_patch16_224", True, "vit_base_patch16_224.augreg2_in21k_ft_in1k", True),
        ("vit_base_patch16_224.augreg_in21k", True, "vit_base_patch16_224.augreg_in21k", False),
        ("vit_base_patch16_clip_224.openai", True, "vit_base_patch16_clip_224.openai", False),
        ("seresnextaa101d_32x8d.sw_in12k", True, "seresnextaa101d_32x8d.sw_in12k", False),
        ("resnet18", "timm/resnet18.fb_ssl_yfcc100m_ft_in1k", "timm/resnet18.fb_ssl_yfcc100m_ft_in1k", True),
        ("resnet18", False, None, False),
    ],
)
def test_weights_that_know_the_labels_are_told_by_their_tag(architecture, pretrained, tag, leaks):
    config = ModelConfig(architecture=architecture, pretrained=pretrained)
    assert pretrained_tag(config) == tag
    assert label_leak(config, "places_lt") is None
    assert bool(told := label_leak(config, "imagenet_lt")) == leaks
    assert not leaks or tag in told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share_blocks": 1}, r"^model\.share_blocks counts blocks behind shared stages: set model\.share_stages"),
        ({"num_experts": 65}, r"^model\.num_experts must lie in 1\.\.64, got 65$"),
        ({"image_size": 4096}, r"^model\.image_size: .*4096"),
        ({"classifier": "cosine", "classifier_scale": 20000.0}, r"^model\.classifier_scale must be .* at most 10000"),
        ({"args": {"widths": [16, 40000, 64]}}, r"^model: .*model_args add up to 40080"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_published_model_may_have_is_named_by_the_recipes_key(values, message):
    with pytest.raises(ValueError, match=message):
        initialise(**values)
