"""Experts that share their first stages: what they compute, learn, cost, and how they are stored."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from train import main

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.backbones import CifarResNet, block_names, create_encoder, cut_encoder, stage_names
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.learning.memory import checkpoint_blocks, checkpoint_experts, counted_once
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import ECLSettings
from ecl_hf.publishing.hub import save_timm
from ecl_hf.runs.folder import describe_model
from tests.children import TINY

COUNTS = [20, 9, 4]
SWIN = {"img_size": 56, "embed_dim": 16, "depths": [2, 1], "num_heads": [1, 2], "drop_path_rate": 0.0}


def ensemble(share_stages=2, **settings):
    settings = {"architecture": "resnet20_cifar", "num_experts": 2, "class_counts": COUNTS} | settings
    torch.manual_seed(3)
    return ECLForImageClassification(ECLConfig(share_stages=share_stages, **settings))


def separate(model):
    """The same ensemble with a copy of the trunk in every expert."""
    config = copy.deepcopy(model.config)
    config.share_stages = 0
    whole = ECLForImageClassification(config)
    trunk = model.trunk.backbone.state_dict()
    for ours, theirs in zip(whole.experts, model.experts, strict=True):
        ours.backbone.load_state_dict(trunk | theirs.backbone.state_dict())
        ours.head.load_state_dict(theirs.head.state_dict())
    return whole


def test_stages_are_those_of_timm_with_weights():
    assert stage_names(create_encoder("resnet20_cifar")) == ["layer1", "layer2", "layer3"]
    assert stage_names(create_encoder("test_resnet")) == ["layer1", "layer2", "layer3", "layer4"]
    assert stage_names(create_encoder("test_byobnet")) == [f"stages.{i}" for i in range(3)]  # timm counts its stem too
    assert stage_names(create_encoder("test_convnext")) == [f"stages.{i}" for i in range(4)]


@pytest.mark.parametrize("architecture", ["resnet20_cifar", "test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("stages", [1, 2])
def test_two_parts_are_the_whole_encoder(architecture, stages):
    whole = create_encoder(architecture).eval()
    first, rest = (cut_encoder(copy.deepcopy(whole), stages, keep) for keep in ("first", "rest"))
    assert not first.state_dict().keys() & rest.state_dict().keys()
    assert first.state_dict().keys() | rest.state_dict().keys() == whole.state_dict().keys()
    assert f"{stage_names(whole)[stages - 1]}." in " ".join(first.state_dict())
    assert f"{stage_names(whole)[stages]}." in " ".join(rest.state_dict())
    image = torch.randn(2, *whole.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(rest(first.forward_features(image)), whole(image))


@pytest.mark.parametrize(
    ("architecture", "model_args", "blocks"),
    [
        ("resnet20_cifar", {}, 2),
        ("test_resnet", {"layers": (1, 1, 3, 1)}, 2),
        ("test_convnext", {"depths": (1, 1, 2, 1)}, 1),
        ("swin_tiny_patch4_window7_224", SWIN | {"depths": [1, 1, 3], "num_heads": [1, 2, 4]}, 1),
    ],
)
def test_two_parts_within_a_stage_are_the_whole_encoder(architecture, model_args, blocks):
    whole = create_encoder(architecture, **model_args).eval()
    first, rest = (cut_encoder(copy.deepcopy(whole), 2, keep, blocks) for keep in ("first", "rest"))
    assert not first.state_dict().keys() & rest.state_dict().keys()
    assert first.state_dict().keys() | rest.state_dict().keys() == whole.state_dict().keys()
    names = block_names(whole, stage_names(whole)[2])
    for part, own in ((first, names[:blocks]), (rest, names[blocks:])):
        assert [name for name in names if [*part.get_submodule(name).parameters()]] == own
    image = torch.randn(2, 3, *[model_args.get("img_size", 32)] * 2)
    with torch.no_grad():
        torch.testing.assert_close(rest(first.forward_features(image)), whole(image))


def test_equals_experts_with_copies_of_the_trunk():
    """Logits, loss, keys, and the gradient of the trunk, which is the sum of those of the copies; then one EMA step."""
    model = ensemble().double()
    tasks = []
    for ensemble_ in (model, separate(model).double()):
        torch.manual_seed(5)
        tasks.append(CollaborativeTask(ensemble_, METHODS["ecl"], ECLSettings(queue_size=8)).double())
    ours, theirs = tasks
    images, second = torch.randn(2, 6, 3, 16, 16).double()
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    ours.queue.load_state_dict(theirs.queue.state_dict())
    for branch in ("references", "projectors"):
        getattr(ours, branch).load_state_dict(getattr(theirs, branch).state_dict())
    for mine, other in zip(ours.momentum, theirs.momentum, strict=True):
        mine.projector.load_state_dict(other.projector.state_dict())
    outputs = [task(images, labels, second) for task in tasks]
    torch.testing.assert_close(outputs[0]["loss"], outputs[1]["loss"])
    torch.testing.assert_close(outputs[0]["keys"], outputs[1]["keys"])
    for out in outputs:
        out["loss"].backward()
    for name, parameter in ours.model.trunk.backbone.named_parameters():
        copies = [expert.backbone.get_parameter(name).grad for expert in theirs.model.experts]
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, sum(copies))
    for mine, other in zip(ours.model.experts, theirs.model.experts, strict=True):
        for name, parameter in mine.backbone.named_parameters():
            torch.testing.assert_close(parameter.grad, other.backbone.get_parameter(name).grad)
    before = {name: value.clone() for name, value in ours.momentum_trunk.named_parameters()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(parameter.requires_grad)
    ours.follow()
    momentum = ours.settings.key_momentum
    for name, value in ours.momentum_trunk.named_parameters():
        query = ours.model.trunk.get_parameter(name)
        torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * query)
        assert not value.requires_grad


def test_trunk_costs_once():
    model = ensemble(num_experts=3)
    shared, apart, single = (describe_model(m) for m in (model, separate(model), ensemble(0, num_experts=1)))
    with FlopCounterMode(display=False) as counter:
        cut_encoder(create_encoder("resnet20_cifar"), 2, "first").forward_features(torch.zeros(1, 3, 32, 32))
    trunk = counter.get_total_flops() // 2
    assert shared["macs"] == apart["macs"] - 2 * trunk
    assert shared["parameters"] == apart["parameters"] - 2 * sum(p.numel() for p in model.trunk.parameters())
    assert {key: shared[key] for key in ("macs_per_expert", "parameters_per_expert")} == {
        key: single[key.removesuffix("_per_expert")] for key in ("macs_per_expert", "parameters_per_expert")
    }


def test_one_file_per_expert_and_one_of_what_they_share(tmp_path):
    model = ensemble(num_experts=3).eval()
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = {}
    for key, name in index.items():
        files.setdefault(name, set()).add(".".join(key.split(".")[:2]))
    assert sorted(map(sorted, files.values())) == [["experts.0"], ["experts.1"], ["experts.2"], ["trunk.backbone"]]
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(image).expert_logits
        torch.testing.assert_close(ECLForImageClassification.from_pretrained(tmp_path)(image).expert_logits, expected)
        (tmp_path / next(name for name, parts in files.items() if parts == {"experts.0"})).unlink()  # is not read
        some = ECLForImageClassification.from_pretrained(tmp_path, experts=[2, 1])
        torch.testing.assert_close(some(image).expert_logits, expected[:, [2, 1]])
    del index["trunk.backbone.conv1.weight"]
    weights = {key: name for key, name in index.items() if not key.startswith("trunk")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises(ValueError, match="names no weights of trunk"):
        ECLForImageClassification.from_pretrained(tmp_path, experts=[1])


@pytest.mark.parametrize(
    ("architecture", "model_args"),
    [
        ("resnet20_cifar", None),
        ("test_resnet", None),
        ("test_convnext", None),
        ("test_efficientnet", {"drop_path_rate": 0.0}),
        ("swin_tiny_patch4_window7_224", SWIN),
    ],
)
def test_fewer_activations_kept_are_the_same_gradients(architecture, model_args):
    tasks = []
    for ways in ([], [checkpoint_blocks], [checkpoint_blocks, checkpoint_experts]):
        model = ensemble(1, architecture=architecture, model_args=model_args)
        for way in ways:
            way(model)
        tasks.append(CollaborativeTask(model, METHODS["bc_ensemble"]).train())
    images, labels = torch.randn(6, 3, 56, 56), torch.tensor([0, 1, 2, 0, 1, 0])
    kept = []
    for task in tasks:
        sizes = {}
        with saved_tensors_hooks(lambda x, sizes=sizes: (x, sizes.setdefault(x.data_ptr(), x.nbytes))[0], lambda x: x):
            out = task(images, labels)
        kept.append(sum(sizes.values()))
        with counted_once(task):
            out["loss"].backward()
    assert kept[2] < kept[1] < kept[0]
    plain, *saving = ({n: p.grad for n, p in task.named_parameters()} | dict(task.named_buffers()) for task in tasks)
    for other in saving:
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_experts", [1, 2])
def test_whole_encoder_is_shared(tmp_path, num_experts):
    model = ensemble("all", num_experts=num_experts, aggregation="mean").eval()
    assert {name.split(".")[2] for name in model.experts.state_dict() if name} <= {"weight", "bias"}
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        output = model(image, output_features=True)
        features = model.trunk.backbone(image)
        for k, expert in enumerate(model.experts):
            torch.testing.assert_close(output.features[:, k], features)
            torch.testing.assert_close(output.expert_logits[:, k], expert.head(features))
        model.save_pretrained(tmp_path / "ecl")
        assert len(list((tmp_path / "ecl").glob("*.safetensors"))) == num_experts + 1
        again = ECLForImageClassification.from_pretrained(tmp_path / "ecl")
        torch.testing.assert_close(again(image).logits, output.logits)
        (tmp_path / "timm").mkdir()
        save_timm(model, num_experts - 1, tmp_path / "timm")
        plain = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        torch.testing.assert_close(plain(image), output.expert_logits[:, -1])
    sizes = describe_model(model)
    heads = num_experts * sum(parameter.numel() for parameter in model.experts[0].parameters())
    assert sizes["parameters"] == heads + sum(
        parameter.numel() for parameter in create_encoder("resnet20_cifar").parameters()
    )


def test_trunks_run_once_and_keep_their_activations_once():
    model = ensemble(num_experts=3)
    calls, kept = [], []
    for ensemble_ in (model, separate(model)):
        task = CollaborativeTask(ensemble_, METHODS["ecl"], ECLSettings(queue_size=8)).train()
        for trunk in filter(None, [task.model.trunk, task.momentum_trunk]):
            trunk.register_forward_hook(lambda *_: calls.append(1))
        images, sizes = torch.randn(2, 6, 3, 16, 16), {}
        with saved_tensors_hooks(lambda x, sizes=sizes: (x, sizes.setdefault(x.data_ptr(), x.nbytes))[0], lambda x: x):
            output = task(images[0], torch.tensor([0, 1, 2, 0, 1, 0]), images[1])  # held, so that no address is reused
        kept.append(sum(sizes.values()))
        del output
    assert len(calls) == 2
    assert kept[0] < 0.6 * kept[1]


@pytest.mark.parametrize("shared", [2, "all"])
def test_chosen_expert_downloads_its_file_and_the_trunks(hub, shared):
    model, image = ensemble(shared, num_experts=3).eval(), torch.randn(2, 3, 32, 32)
    model.push_to_hub("owner/shared")
    loaded = ECLForImageClassification.from_pretrained("owner/shared", experts=[1])
    assert torch.equal(loaded(image).expert_logits, model(image).expert_logits[:, [1]])
    assert {name for name in hub.downloaded("owner/shared") if name.endswith(".safetensors")} == {
        "model-00002-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
    }


@pytest.mark.parametrize("num_experts", [1, 3])
def test_trunk_larger_than_an_expert_comes_back(tmp_path, num_experts):
    """It is one file, and so is each expert's."""
    model = ensemble(4, architecture="test_efficientnet", num_experts=num_experts).eval()
    trunk, expert = (sum(p.numel() for p in part.parameters()) for part in (model.trunk, model.experts[0]))
    assert trunk > expert
    model.save_pretrained(tmp_path)
    weights = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {
        prefix: {file for key, file in weights.items() if key.startswith(prefix)} for prefix in ("experts", "trunk")
    }
    assert len(parts["experts"]) == num_experts
    assert len(parts["trunk"]) == 1
    assert not parts["experts"] & parts["trunk"]
    loaded = ECLForImageClassification.from_pretrained(tmp_path, experts=[num_experts - 1])
    image = torch.randn(2, *model.config.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(image).expert_logits, model(image).expert_logits[:, -1:], rtol=1e-5, atol=1e-6
        )


def test_shared_blocks_come_back(tmp_path):
    model = ensemble(share_blocks=2).eval()
    own = {name.removeprefix("backbone.layer3.")[0] for name in model.experts[1].state_dict() if "layer" in name}
    assert own == {"2"}  # the last of three blocks
    model.save_pretrained(tmp_path)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            ECLForImageClassification.from_pretrained(tmp_path, experts=[1])(image).expert_logits,
            model(image).expert_logits[:, [1]],
        )


@pytest.mark.parametrize("model_args", [None, {"layers": [1, 2, 1, 1]}])
def test_expert_and_trunk_become_a_plain_timm_model(tmp_path, model_args):
    blocks = 0 if model_args is None else 1
    model = ensemble(1, architecture="test_resnet", share_blocks=blocks, model_args=model_args).eval()
    save_timm(model, 1, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(2, *model.config.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(plain(image), model(image).expert_logits[:, 1])


def test_pretrained_weights_reach_trunk_and_experts(tmp_path):
    torch.manual_seed(0)
    encoder = timm.create_model("test_resnet", num_classes=7)
    file = tmp_path / "weights.pth"
    torch.save(encoder.state_dict(), file)
    config = ModelConfig(architecture="test_resnet", share_stages=2, pretrained=str(file), num_experts=2)
    model = initialise_model(config, METHODS["ecl"], COUNTS, ["a", "b", "c"])
    for part in (model.trunk, *model.experts):
        assert all(torch.equal(encoder.state_dict()[key], value) for key, value in part.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "stages", "message"),
    [
        ("resnet20_cifar", 3, "share_stages is 3: of resnet20_cifar's 3 stages at most 2 can be shared"),
        ("resnet20_cifar", -1, "share_stages must not be negative"),
        ("test_vit", 1, "test_vit has weights outside of its stages: cls_token"),
        ("legacy_xception", 1, "share_stages is 1: legacy_xception has none"),
    ],
)
def test_what_cannot_be_cut_is_refused(architecture, stages, message):
    with pytest.raises(ValueError, match=message):
        initialise_model(
            ModelConfig(architecture=architecture, share_stages=stages, num_experts=1),
            METHODS["ecl"],
            COUNTS,
            ["a", "b", "c"],
        )


def test_encoder_that_uses_the_picture_twice_is_refused(monkeypatch):
    """Its parts fit, and compute something else."""
    forward = CifarResNet.forward_features
    monkeypatch.setattr(CifarResNet, "forward_features", lambda self, x: forward(self, x) + x.mean())
    config = ModelConfig(architecture="resnet20_cifar", share_stages=2, num_experts=1)
    with pytest.raises(ValueError, match="resnet20_cifar can't be cut between its stages: they compute something else"):
        initialise_model(config, METHODS["ecl"], COUNTS, ["a", "b", "c"])


@pytest.mark.slow
def test_training_resumes_bit_by_bit(tmp_path):
    flags = [*TINY, "--model.share_stages=2", "--train.experts_one_by_one=true"]
    whole = main([*flags, f"--output_dir={tmp_path / 'whole'}"])
    for more in (["--train.max_steps=8"], ["--resume"]):
        parts = main([*flags, f"--output_dir={tmp_path / 'parts'}", *more])
    names = [path.name for path in (whole / "model").glob("*.safetensors")]
    assert len(names) == 3
    for name in names:
        ours, theirs = (load_file(run / "model" / name) for run in (whole, parts))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
