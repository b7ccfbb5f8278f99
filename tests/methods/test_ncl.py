"""NCL: values of its published code, and loops."""

from itertools import permutations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
from ecl_hf.methods import ncl
from tests import reference
from tests.methods.comparing import agrees, tensors

FACTOR = 0.6


@pytest.fixture
def values(published):
    return tensors(published("experts/ncl"))


def bounded_distillation(logits, log_counts, hard, floor):
    """NCL's divergences as its code has them: the student's logarithm is of the softmax plus a floor."""
    adjusted, k = logits + log_counts, len(logits)
    pairs = [
        F.kl_div((scores[s].softmax(-1) + floor).log(), scores[t].softmax(-1), reduction="batchmean")
        for scores in (adjusted, adjusted * hard)
        for t, s in permutations(range(k), 2)
    ]
    return sum(pairs) / (k - 1)


@pytest.mark.parametrize("num_hard", [3, 10])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_losses(values, k, num_hard):
    logits, labels, log_counts = values[f"logits_k{k}"], values["labels"], values["class_counts"].double().log()
    hard = ncl.hard_categories(logits[0], labels, num_hard)
    case = f"k{k}_hard{num_hard}"

    def supervision(z):
        return ncl.nested_cross_entropy(z, labels, log_counts, hard)

    def published_distillation(z):
        return bounded_distillation(z, log_counts, hard, 1e-9)

    both = [values[f"{case}_nil_all_{kind}"] + values[f"{case}_nil_hard_{kind}"] for kind in ("loss", "grad")]
    agrees(supervision, logits, *both)
    agrees(published_distillation, logits, values[f"{case}_nbod_loss"], values[f"{case}_nbod_grad"])
    total = values[f"{case}_loss"], values[f"{case}_grad"]
    agrees(lambda z: supervision(z) + FACTOR * published_distillation(z), logits, *total)
    # Ours has no floor
    variable = logits.clone().requires_grad_()
    exact = bounded_distillation(variable, log_counts, hard, 0.0)
    (gradient,) = torch.autograd.grad(exact, variable)
    agrees(lambda z: ncl.nested_distillation(z, log_counts, hard), logits, exact.detach(), gradient)


def test_hard_classes(values):
    mask = ncl.hard_categories(values["logits_k3"][0], values["labels"], 3)
    assert_close(mask.double(), values["mask_hard3"])


def test_contrast(values):
    keys, queues = F.normalize(values["con_keys"], dim=-1), values["con_queues"].transpose(1, 2)

    def loss(queries):
        queries, temperature = F.normalize(queries, dim=-1), values["con_temperature"].item()
        return sum(losses.info_nce(*expert, temperature) for expert in zip(queries, keys, queues, strict=True))

    agrees(loss, values["con_queries"], values["con_loss"], values["con_grad"])


# Beside the scalar loops of `reference`


def is_loop(actual, expected, rtol=1e-9, atol=1e-12):
    assert_close(actual, torch.tensor(expected, dtype=torch.double), rtol=rtol, atol=atol)


@pytest.mark.parametrize("num_hard", [1, 3, 9, 10])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_hard_categories_by_loop(num_hard, scale):
    logits, labels = (scale * torch.randn(20, 10, dtype=torch.double)).requires_grad_(), torch.arange(20) % 10
    mask = ncl.hard_categories(logits, labels, num_hard)
    assert mask.dtype == torch.bool
    assert mask.sum(-1).tolist() == [num_hard] * 20
    assert mask.gather(-1, labels[:, None]).all()
    chosen = [set(row.nonzero().flatten().tolist()) for row in mask]
    assert chosen == [
        reference.ncl_hard_categories(z, y, num_hard) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]


@pytest.mark.parametrize("num_experts", [1, 2, 3])
@pytest.mark.parametrize(("num_classes", "num_hard"), [(2, 1), (2, 2), (10, 1), (10, 3)])
def test_losses_by_loop(num_experts, num_classes, num_hard):
    counts = [90, 10] if num_classes == 2 else [500, 250, 120, 60, 33, 20, 9, 5, 2, 1]
    labels = torch.tensor([0, 1, num_classes - 1, 0])
    logits = 2 * torch.randn(num_experts, len(labels), num_classes, dtype=torch.double)
    log_counts = torch.tensor(counts, dtype=torch.double).log()
    hard = ncl.hard_categories(logits[0], labels, num_hard)
    arguments = logits.tolist(), labels.tolist(), counts, num_hard
    actual = ncl.nested_cross_entropy(logits, labels, log_counts, hard)
    is_loop(actual, reference.ncl_cross_entropy(*arguments))
    is_loop(ncl.nested_distillation(logits, log_counts, hard), reference.ncl_distillation(*arguments))


def test_teachers_learn_too():
    logits, counts = torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True), [9, 5, 2, 1]
    hard = ncl.hard_categories(logits[0], torch.tensor([3, 1]), 2)
    log_counts = torch.tensor(counts, dtype=torch.double).log()
    (actual,) = torch.autograd.grad(ncl.nested_distillation(logits, log_counts, hard), logits)
    expected = reference.gradient(lambda z: reference.ncl_distillation(z, [3, 1], counts, 2), logits.tolist())
    is_loop(actual, expected, rtol=1e-6, atol=1e-8)
