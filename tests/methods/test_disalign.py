"""DisAlign against the values of its published code, and its limits."""

import re

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.heads import ECLDisAlignHead, ECLHead
from ecl_hf.methods import disalign

TRAINED = ("logit_scale", "logit_bias", "confidence_weight", "confidence_bias")


def read(published):
    return {key: torch.as_tensor(value) for key, value in published("reweighting_and_stages/disalign").items()}


def make_head(values):
    head = ECLDisAlignHead(*reversed(values["weight"].shape)).double()
    for name, parameter in head.named_parameters():
        parameter.data.copy_(values[name].view_as(parameter))
    return head


def rhos(values):
    found = [match[1] for key in values if (match := re.fullmatch("grw_weight_rho(.+)", key))]
    assert found
    return found


def test_as_published(published):
    values = read(published)
    for rho in rhos(values):
        head = make_head(values)
        weights = disalign.generalised_weights(values["class_counts"].double(), float(rho))
        assert_close(weights, values[f"grw_weight_rho{rho}"], rtol=1e-9, atol=0)
        logits = head(values["features"])
        loss = F.cross_entropy(logits, values["labels"], weights)
        loss.backward()
        assert_close(logits.detach(), values["logits"], rtol=1e-9, atol=1e-12)
        assert_close(loss.detach(), values[f"loss_rho{rho}"], rtol=1e-9, atol=0)
        for name in TRAINED:
            expected = values[f"grad_{name}_rho{rho}"]
            assert_close(head.get_parameter(name).grad.view_as(expected), expected, rtol=1e-8, atol=1e-12)


def test_starts_as_published(published):
    values = read(published)
    torch.manual_seed(1)
    head = ECLDisAlignHead(*reversed(values["weight"].shape)).double()
    for name in TRAINED[:3]:
        parameter = head.get_parameter(name)
        assert_close(parameter.data, values[f"init_{name}"].view_as(parameter))
    assert 0 < head.confidence_bias.abs() < head.in_features**-0.5  # torch's default


def test_without_a_calibration_it_is_the_classifier():
    head, features = ECLDisAlignHead(4, 3).double(), torch.randn(6, 4).double()
    torch.nn.init.zeros_(head.logit_scale)
    plain = ECLHead(4, 3).double()
    plain.load_state_dict({"weight": head.weight, "bias": head.bias})
    assert_close(head(features), plain(features))


def test_with_one_confidence_for_all_images_it_folds():
    head, features = ECLDisAlignHead(4, 3).double(), torch.randn(6, 4).double()
    torch.nn.init.zeros_(head.confidence_weight)
    torch.nn.init.zeros_(head.confidence_bias)
    head.logit_scale.data.copy_(torch.randn(3))
    head.logit_bias.data.copy_(torch.randn(3))
    rows = head.weight * (1 + head.logit_scale / 2)[:, None]
    assert_close(head(features), features @ rows.T + head.bias * (1 + head.logit_scale / 2) + head.logit_bias / 2)


def test_the_papers_form_is_the_same():
    head, features = ECLDisAlignHead(4, 3).double(), torch.randn(6, 4).double()
    head.logit_bias.data.copy_(torch.randn(3))
    head.logit_scale.data.copy_(torch.randn(3))
    z = F.linear(features, head.weight, head.bias)
    g = (features @ head.confidence_weight + head.confidence_bias).sigmoid()[:, None]
    a = head.logit_scale + 1
    assert_close(head(features), g * (a * z + head.logit_bias) + (1 - g) * z)


def test_rho_0_and_equal_counts_weigh_alike():
    ones = torch.ones(4).double()
    assert_close(disalign.generalised_weights(torch.tensor([900.0, 30.0, 5.0, 1.0]).double(), 0.0), ones)
    assert_close(disalign.generalised_weights(7 * ones, 1.2), ones)
