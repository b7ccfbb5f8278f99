"""Every kind of classification head by its formula, saved, reloaded, and begun anew for other classes."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.heads import create_head

NUM_CLASSES, WIDTH = 4, 6
KINDS = {
    "linear": {},
    "cosine": {"classifier_scale": 7.0},
    "normalised": {"classifier_chunks": 1},
    "chunks": {"classifier": "normalised", "classifier_chunks": 2},
    "disalign": {},
    "memory": {"classifier_scale": 7.0},
    "neck": {"classifier": "linear", "classifier_neck": 5},
}

kinds = pytest.mark.parametrize("kind", KINDS)
biases = pytest.mark.parametrize("bias", [True, False])


def configure(kind, **options):
    return ECLConfig(**{"classifier": kind, "num_labels": NUM_CLASSES, **KINDS[kind], **options})


def fill(head):
    """Numbers other than those of a new head, in its buffers too."""
    for tensor in (*head.parameters(), *head.buffers()):
        torch.nn.init.normal_(tensor)


def unit(v):
    return [x / math.hypot(*v) for x in v]


def dot(v, w):
    return math.fsum(x * y for x, y in zip(v, w, strict=True))


def layer(head, name, v):
    return [dot(v, w) + b for w, b in zip(head[f"{name}.weight"], head[f"{name}.bias"], strict=True)]


def remember(head, v):
    """What enters the cosine of a head with a memory, in plain floats."""
    memory, logits = head["memory"], layer(head, "probabilities", v)
    shares = [math.exp(x - max(logits)) for x in logits]
    said = [dot(shares, column) / sum(shares) for column in zip(*memory, strict=True)]
    reach = 10 / min(math.dist(v, m) for m in memory)
    selected = [math.tanh(x) for x in layer(head, "selector", v)]
    x = [reach * (a + e * m) for a, e, m in zip(v, selected, said, strict=True)]
    return [a / (1 + math.hypot(*x)) for a in x]


def logit(kind, head, v, c):
    """One logit, in plain floats."""
    if kind == "neck":
        v = [max(x, 0.0) for x in layer(head, "neck", v)]
        head = {name.removeprefix("classifier."): tensor for name, tensor in head.items()}
    w, b = head["weight"][c], head["bias"][c] if "bias" in head else 0.0
    if kind == "cosine":
        v, w = unit(v), [7.0 * x for x in unit(w)]
    if kind == "normalised":
        v = unit([x - m for x, m in zip(v, head["centre"], strict=True)])
    if kind == "chunks":
        moved = [x - m for x, m in zip(v, head["centre"], strict=True)]
        v = unit(moved[:3]) + unit(moved[3:])
    if kind == "memory":
        v, w = remember(head, v), [7.0 * x for x in unit(w)]
    z = dot(v, w) + b
    if kind == "disalign":
        u, (u0,) = head["confidence_weight"], head["confidence_bias"]
        g = 1 / (1 + math.exp(-u0 - dot(v, u)))
        z = (1 + g * head["logit_scale"][c]) * z + g * head["logit_bias"][c]
    return z


@kinds
@biases
def test_by_formula(kind, bias):
    head = create_head(configure(kind, classifier_bias=bias), WIDTH).double()
    fill(head)
    tensors = {name: tensor.tolist() for name, tensor in head.state_dict().items()}
    assert any(name.removeprefix("classifier.") == "bias" for name in tensors) == bias
    features = torch.randn(3, WIDTH).double()
    logits = head(features)
    for i, c in itertools.product(range(3), range(NUM_CLASSES)):
        assert logits[i, c].item() == pytest.approx(logit(kind, tensors, features[i].tolist(), c), rel=1e-9)


@kinds
@biases
def test_reload_is_bit_identical_and_other_classes_begin_anew(tmp_path, kind, bias):
    options = {"architecture": "test_resnet", "num_experts": 2, "classifier_bias": bias}
    model = ECLForImageClassification(configure(kind, **options)).eval()
    new = model.experts[1].head.state_dict()
    for expert in model.experts:
        fill(expert.head)
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    loaded = ECLForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).expert_logits, model(x).expert_logits)
    wider = ECLForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    logits = wider(x).expert_logits
    assert logits.shape == (2, 2, 9)
    assert logits.isfinite().all()
    head = wider.experts[1].head.state_dict()
    assert head.keys() == new.keys()
    for name in ("logit_scale", "logit_bias"):
        if kind == "disalign":
            assert_close(head[name], torch.full((9,), float(name == "logit_scale")))


def test_features_are_cut_into_equal_parts():
    with pytest.raises(ValueError, match="6 features can't be cut into 4 equal parts"):
        create_head(configure("chunks", classifier_chunks=4), WIDTH)


def test_a_feature_at_the_centre_has_finite_logits_and_gradients():
    head = create_head(configure("chunks"), WIDTH)
    fill(head)
    features = head.centre[None].clone().requires_grad_()
    logits = head(features)
    logits.sum().backward()
    assert_close(logits[0], head.bias)
    assert features.grad.isfinite().all()
