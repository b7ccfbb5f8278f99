"""tau-norm, LWS and NCM against the values of their published code, and what folding must not change."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.heads import ECLHead
from ecl_hf.methods import decoupling

NUM_CLASSES, WIDTH = 5, 4


def read(published, name):
    return {key: torch.as_tensor(value) for key, value in published(f"reweighting_and_stages/{name}").items()}


def draw_head():
    return ECLHead(WIDTH, NUM_CLASSES).double()


# tau-norm


def test_tau_norm_as_published(published):
    values = read(published, "tau_norm")
    taus = [match[1] for key in values if (match := re.fullmatch("weight_tau(.+)", key))]
    assert len(taus) > 1
    for tau in taus:
        weight = decoupling.tau_normalised(values["weight"], float(tau))
        assert_close(weight, values[f"weight_tau{tau}"], rtol=1e-9, atol=0)
        assert_close(values["features"] @ weight.T, values[f"logits_tau{tau}"], rtol=1e-9, atol=1e-12)


def test_tau_norm_of_rows():
    weight = torch.randn(NUM_CLASSES, WIDTH, dtype=torch.double)
    assert_close(decoupling.tau_normalised(weight, 0.0), weight)
    scaled = decoupling.tau_normalised(weight * torch.rand(NUM_CLASSES, 1), 1.0)
    assert_close(scaled, decoupling.tau_normalised(weight, 1.0))
    assert_close(scaled.norm(dim=-1), torch.ones(NUM_CLASSES).double())
    weight[0] = 0
    assert_close(decoupling.tau_normalised(weight, 0.7)[0], weight[0])


# LWS


def test_lws_as_published(published):
    values = read(published, "lws")
    head = ECLHead(*reversed(values["weight"].shape)).double()
    head.load_state_dict({"weight": values["weight"], "bias": values["bias"]})
    scaled = decoupling.ScaledHead(head)
    scaled.scales.data.copy_(values["scales"])
    logits = scaled(values["features"])
    loss = F.cross_entropy(logits, values["labels"])
    loss.backward()
    assert_close(logits.detach(), values["logits"], rtol=1e-9, atol=1e-12)
    assert_close(loss.detach(), values["loss"], rtol=1e-9, atol=0)
    assert_close(scaled.scales.grad, values["grad_scales"], rtol=1e-9, atol=1e-12)


def test_scales_start_at_the_head_and_fold_into_it():
    head, features = draw_head(), torch.randn(7, WIDTH).double()
    plain = head(features).detach()
    scaled = decoupling.ScaledHead(head)
    assert_close(scaled(features), plain)
    scaled.scales.data.copy_(torch.rand(NUM_CLASSES) + 0.5)
    expected = scaled(features).detach()
    assert (expected - plain).abs().max() > 0.1
    folded = scaled.fold()
    assert type(folded) is ECLHead
    assert_close(folded(features), expected)


# NCM


KINDS = {"un": "raw", "l2n": "normalised", "cl2n": "centred"}


def test_ncm_as_published(published):
    values = read(published, "ncm")
    labels = values["train_labels"]
    for name, kind in KINDS.items():
        means = values[f"centroids_{name}"]
        head = decoupling.nearest_mean_head(values["train_features"], labels, len(means), kind)
        assert_close(head.weight / 2, means, rtol=1e-9, atol=1e-12)
        if kind == "centred":
            assert_close(head.centre, values["feature_mean"], rtol=1e-9, atol=1e-12)
        logits, distances = head(values["features"]), values[f"logits_{name}_l2"]
        offset = (logits - distances).mean(-1, keepdim=True)  # |v|^2, which the published logits keep
        assert_close(logits - offset, distances, rtol=1e-9, atol=1e-9)


def draw_classes():
    labels = torch.arange(NUM_CLASSES).repeat(4)
    return torch.randn(len(labels), WIDTH, dtype=torch.double), labels


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_nearest_mean_by_a_loop(kind):
    features, labels = draw_classes()
    head = decoupling.nearest_mean_head(features, labels, NUM_CLASSES, kind)
    moved = features - features.mean(0) if kind == "centred" else features
    seen = moved if kind == "raw" else moved / moved.norm(dim=-1, keepdim=True)
    for vector, logits in zip(seen, head(features), strict=True):
        distances = [(vector - seen[labels == c].mean(0)).square().sum() for c in range(NUM_CLASSES)]
        assert_close(logits, vector.square().sum() - torch.stack(distances))


def test_what_the_nearest_mean_does_not_see():
    features, labels = draw_classes()
    queries, shift = torch.randn(6, WIDTH, dtype=torch.double), torch.randn(WIDTH, dtype=torch.double)
    of_centred = decoupling.nearest_mean_head(features, labels, NUM_CLASSES, "centred")(queries)
    moved = decoupling.nearest_mean_head(features + shift, labels, NUM_CLASSES, "centred")(queries + shift)
    assert_close(moved, of_centred)
    of_normalised = decoupling.nearest_mean_head(features, labels, NUM_CLASSES, "normalised")
    assert_close(of_normalised(3 * queries), of_normalised(queries))


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_class_without_images_is_never_the_nearest(kind):
    features, labels = draw_classes()
    absent = 2
    kept = labels != absent
    head = decoupling.nearest_mean_head(features[kept], labels[kept], NUM_CLASSES, kind)
    logits = head(torch.randn(50, WIDTH, dtype=torch.double))
    assert logits.isfinite().all()
    assert not (logits.argmax(-1) == absent).any()
