"""NCL: values of its published code."""

from itertools import permutations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf import losses
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
    hard = losses.hard_categories(logits[0], labels, num_hard)
    case = f"k{k}_hard{num_hard}"

    def supervision(z):
        return losses.nested_cross_entropy(z, labels, log_counts, hard)

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
    agrees(lambda z: losses.nested_distillation(z, log_counts, hard), logits, exact.detach(), gradient)


def test_hard_classes(values):
    mask = losses.hard_categories(values["logits_k3"][0], values["labels"], 3)
    assert_close(mask.double(), values["mask_hard3"])


def test_contrast(values):
    keys, queues = F.normalize(values["con_keys"], dim=-1), values["con_queues"].transpose(1, 2)

    def loss(queries):
        queries, temperature = F.normalize(queries, dim=-1), values["con_temperature"].item()
        return sum(losses.info_nce(*expert, temperature) for expert in zip(queries, keys, queues, strict=True))

    agrees(loss, values["con_queries"], values["con_loss"], values["con_grad"])
