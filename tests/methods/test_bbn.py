"""Bilateral branches: published values, and the two classifiers that the joint one becomes."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.methods.base import Time
from ecl_hf.methods.bbn import conventional_share, joint_logits, joint_losses, split_classifier
from tests.methods.comparing import tensors


@pytest.fixture
def values(published):
    return tensors(published("experts/bbn"))


def lengths(values):
    found = [int(key.removeprefix("alpha_")) for key in values if key.startswith("alpha_")]
    assert found
    return found


def test_published_shares(values):
    for epochs in lengths(values):
        found = [conventional_share(e, int(values[f"div_epoch_{epochs}"])) for e in range(epochs)]
        assert_close(torch.tensor(found).double(), values[f"alpha_{epochs}"])


def test_published_values(values):
    cases = [key.removesuffix("_loss") for key in values if key.endswith("_loss")]
    assert cases
    classifier = values["classifier_weight"], values["classifier_bias"]
    for case in cases:
        epoch, epochs = (int(part) for part in case.removeprefix("e").split("_of_"))
        share = conventional_share(epoch - 1, int(values[f"div_epoch_{epochs}"]))
        features = [values[key].clone().requires_grad_() for key in ("feature_a", "feature_b")]
        logits = joint_logits(*features, *classifier, share)
        loss = joint_losses(logits, values["labels_a"], values["labels_b"], share).mean()
        assert_close(logits, values[f"{case}_logits"])
        assert_close(loss, values[f"{case}_loss"])
        gradients = torch.autograd.grad(loss, [logits, *features])
        for name, gradient in zip(("logits", "a", "b"), gradients, strict=True):
            assert_close(gradient, values[f"{case}_grad_{name}"], rtol=1e-9, atol=1e-12)


def test_at_first_the_second_branch_learns_nothing():
    features = torch.randn(2, 6, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    share = conventional_share(0, 200)
    logits = joint_logits(*features, weight, torch.zeros(5).double(), share)
    loss = joint_losses(logits, torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([4] * 6), share).sum()
    of_features, of_weight = torch.autograd.grad(loss, [features, weight])
    assert (of_features[1] == 0).all()
    assert (of_weight[:, 4:] == 0).all()
    assert of_features[0].abs().min() > 0


def test_the_halves_of_the_classifier_are_two_experts(values):
    halves = split_classifier(values["classifier_weight"])
    experts = [
        F.linear(values[key], half, values["classifier_bias"])
        for key, half in zip(("feature_a", "feature_b"), halves, strict=True)
    ]
    assert_close(torch.stack(experts).mean(0), values["inference_logits"])


def build():
    """A task of two branches, and a batch of both streams."""
    config = ModelConfig(architecture="resnet20_cifar")
    model = initialise_model(config, METHODS["bbn"], [9, 5, 2], ["a", "b", "c"])
    batch = {
        "pixel_values": torch.randn(6, 3, 16, 16),
        "labels": torch.tensor([0, 0, 0, 0, 1, 2]),
        "partner_pixel_values": torch.randn(6, 3, 16, 16),
        "partner_labels": torch.tensor([2, 2, 1, 2, 0, 1]),
    }
    return CollaborativeTask(model, METHODS["bbn"]), batch


def test_branches_share_all_but_their_last_block_and_see_a_stream_each():
    task, batch = build()
    model, linear = task.model, task.parts["supervision"].linear
    assert {tuple(name.split(".")[:2]) for name in model.experts[0].backbone.state_dict()} == {("layer3", "2")}
    task.time = Time(4, 8)
    loss = task.train()(**batch)["loss"]
    statistics = [dict(expert.named_buffers()) for expert in model.experts]
    model.train()  # anew, by hand: the trunk's running statistics don't enter
    streams = [batch["pixel_values"], batch["partner_pixel_values"]]
    before = [{name: buffer.clone() for name, buffer in each.items()} for each in statistics]
    features = [expert.backbone(model.trunk(x)) for expert, x in zip(model.experts, streams, strict=True)]
    logits = joint_logits(*features, linear.weight, linear.bias, 0.75)
    expected = joint_losses(logits, batch["labels"], batch["partner_labels"], 0.75).mean()
    assert_close(loss, expected)
    for one, other in zip(before, statistics, strict=True):
        assert int(one["backbone.layer3.2.bn1.num_batches_tracked"]) == 1
        assert int(other["backbone.layer3.2.bn1.num_batches_tracked"]) == 2
    assert int(model.trunk.backbone.bn1.num_batches_tracked) == 4


def test_the_experts_heads_are_the_halves_of_the_trained_classifier():
    task, batch = build()
    part = task.parts["supervision"]
    assert not any(parameter.requires_grad for expert in task.model.experts for parameter in expert.head.parameters())
    assert not any("heads" in name for name in part.state_dict())
    task.keep_average(0.0)  # which forgets all but the last step
    task.follow()
    for model in (task.model.eval(), task.average.module.eval()):
        with torch.no_grad():
            output = model(batch["pixel_values"], output_features=True)
            expected = joint_logits(*output.features.transpose(0, 1), part.linear.weight, part.linear.bias, 0.5)
        assert_close(output.logits, expected)


def test_an_encoder_without_blocks_is_refused():
    with pytest.raises(ValueError, match="weights outside of its stages"):
        initialise_model(ModelConfig(architecture="test_vit"), METHODS["bbn"], [9, 5, 2], ["a", "b", "c"])
