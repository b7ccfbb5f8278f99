"""Causal norm against the values of its published code, and what must hold for any mean feature."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.heads import ECLNormalisedHead
from ecl_hf.learning.batchnorm import statistics
from ecl_hf.methods import tde

NUM_CLASSES, WIDTH = 5, 8


def read(published, name):
    return {key: torch.as_tensor(value) for key, value in published(name).items()}


def make_head(weight, chunks, mean=None, **constants):
    head = ECLNormalisedHead(*reversed(weight.shape), bias=False, chunks=chunks).double()
    head.weight.data.copy_(weight)
    head = tde.CausalNormHead(head, **({"scale": 16.0, "gamma": 1 / 32, "alpha": 1.5, "momentum": 0.9} | constants))
    if mean is not None:
        head.running_mean.copy_(mean)
    return head


def cases(published):
    """Heads, inputs and published values of all settings in both files."""
    values = read(published, "reweighting_and_stages/tde")
    constants = {"scale": values["tau"].item(), "gamma": values["gamma"].item(), "alpha": values["alpha"].item()}
    head = make_head(values["weight"], values["num_head"].item(), values["embed"], **constants)
    yield head, values, {key: values[key] for key in ("logits_train", "logits_eval", "grad_features", "grad_weight")}
    values = read(published, "features_and_teachers/tde")
    names = [key.removesuffix("_hyper_heads_tau_alpha_gamma") for key in values if "_hyper_" in key]
    assert names
    for name in names:
        chunks, scale, alpha, gamma = values[f"{name}_hyper_heads_tau_alpha_gamma"].tolist()
        head = make_head(values["weight"], int(chunks), values["embed"], scale=scale, gamma=gamma, alpha=alpha)
        expected = {
            "logits_train": values[f"{name}_train_logits"],
            "logits_eval": values[f"{name}_test_logits"],
            "grad_features": values[f"{name}_ce_grad_features"],
            "grad_weight": values[f"{name}_ce_grad_weight"],
            "folded": values[f"{name}_folded_weight"],
        }
        yield head, values | {"labels": values[f"{name}_ce_labels"]}, expected


def test_as_published(published):
    for head, values, expected in cases(published):
        features = values["features"].clone().requires_grad_()
        mean = head.running_mean.clone()
        logits = head.train()(features)
        F.cross_entropy(logits, values["labels"]).backward()
        assert_close(logits.detach(), expected["logits_train"], rtol=1e-9, atol=1e-12)
        assert_close(features.grad, expected["grad_features"], rtol=1e-8, atol=1e-12)
        assert_close(head.head.weight.grad, expected["grad_weight"], rtol=1e-8, atol=1e-12)
        head.running_mean.copy_(mean)
        assert_close(head.eval()(features).detach(), expected["logits_eval"], rtol=1e-9, atol=1e-12)
        folded = head.fold()
        assert_close(folded(features).detach(), expected["logits_eval"], rtol=1e-9, atol=1e-12)
        if "folded" in expected:
            assert_close(folded.weight.data, expected["folded"], rtol=1e-9, atol=1e-12)


def test_the_moving_mean_has_the_published_direction(published):
    values = read(published, "features_and_teachers/tde")
    head = make_head(values["weight"], 2, momentum=values["momentum"].item())
    for batch in values["mean_batches"]:
        head.train()(batch)
    assert_close(F.normalize(head.running_mean, dim=0), F.normalize(values["embed"], dim=0), rtol=1e-9, atol=1e-12)
    before = head.running_mean.clone()
    head.eval()(values["features"])
    assert_close(head.running_mean, before, rtol=0, atol=0)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_the_direct_effect_by_a_loop(chunks):
    weight, mean, features = torch.randn(NUM_CLASSES, WIDTH), torch.randn(WIDTH), torch.randn(3, WIDTH)
    head = make_head(weight, chunks, mean, alpha=0.7).eval()
    for feature, logits in zip(features.double(), head(features.double()), strict=True):
        for c in range(NUM_CLASSES):
            total = 0.0
            parts = (part.double().chunk(chunks) for part in (feature, mean, weight[c]))
            for v, m, w in zip(*parts, strict=True):
                v, m = v / v.norm(), m / m.norm()
                total += (w / (w.norm() + 1 / 32)) @ (v - 0.7 * (v @ m) * m)
            assert_close(logits[c], 16 * total / chunks)


def test_what_the_answer_does_not_see():
    weight, mean = torch.randn(NUM_CLASSES, WIDTH), torch.randn(WIDTH)
    features = torch.randn(6, WIDTH, dtype=torch.double)
    direct = make_head(weight, 2, mean).eval()(features)
    assert_close(make_head(weight, 2, 3 * mean).eval()(features), direct)
    assert_close(make_head(weight, 2, mean).eval()(5 * features), direct)
    plain = make_head(weight, 2, mean, alpha=0.0)
    assert_close(plain.eval()(features), plain.train()(features))
    assert_close(make_head(weight, 2).eval()(features), plain(features))
    along = make_head(weight, 1, mean, alpha=1.0).eval()(mean.double()[None])
    assert_close(along, torch.zeros_like(along))


def test_a_dead_feature_has_finite_logits_and_gradients():
    head = make_head(torch.randn(NUM_CLASSES, WIDTH), 2).train()
    features = torch.zeros(2, WIDTH, dtype=torch.double, requires_grad=True)
    logits = head(features)
    logits.sum().backward()
    assert not logits.any()
    assert features.grad.isfinite().all()


def test_the_mean_of_several_processes_is_that_of_all_images():
    """Each process follows its own images; at the end the buffers are averaged, as those of BatchNorm are."""
    weight, batches = torch.randn(NUM_CLASSES, WIDTH), torch.randn(5, 6, WIDTH, dtype=torch.double)
    whole, *halves = (make_head(weight, 2).train() for _ in range(3))
    for batch in batches:
        whole(batch)
        for half, part in zip(halves, batch.chunk(2), strict=True):
            half(part)
    assert_close((halves[0].running_mean + halves[1].running_mean) / 2, whole.running_mean)
    assert {"running_mean"} == set(statistics(whole))
