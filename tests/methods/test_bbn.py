"""Bilateral branches: published values, and the two classifiers that the joint one becomes."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

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
