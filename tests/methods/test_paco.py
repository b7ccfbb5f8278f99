"""Parametric contrastive learning against its published code, and in closed form."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.methods.paco import parametric_contrast


def tensors(values):
    return {key: torch.from_numpy(value) for key, value in values.items()}


def drawn(images=6, classes=5, queue=20, dim=4):
    rows = [F.normalize(torch.randn(n, dim, dtype=torch.double), dim=-1) for n in (images, images, queue)]
    log_prior = torch.rand(classes, dtype=torch.double).log_softmax(-1)
    return torch.randn(images, classes).double(), log_prior, torch.tensor([0, 2, 2, 4, 0, 1]), *rows


@pytest.mark.parametrize("case", ["cifar", "imagenet", "other"])
def test_published_values(published, case):
    values = tensors(published("features_and_teachers/paco"))
    alpha, beta, gamma, logit_temperature, temperature = values[f"{case}_hyper"].tolist()
    logits, queries = values["logits"].requires_grad_(), values["q"].requires_grad_()
    log_prior = (values["counts"] / values["counts"].sum()).log()
    loss = parametric_contrast(
        logits,
        log_prior,
        values["labels"],
        queries,
        values["k"],
        values["queue"],
        values["queue_labels"],
        temperature,
        alpha,
        beta,
        gamma,
        logit_temperature,
    ).mean()
    # The code's masks are float32, and 1e-9 and 1e-12 are added within its logarithms
    assert_close(loss, values[f"{case}_loss"], rtol=1e-6, atol=0)
    by_queries, by_logits = torch.autograd.grad(loss, [queries, logits])
    assert_close(by_queries, values[f"{case}_grad_q"], rtol=1e-6, atol=1e-7)
    assert_close(by_logits, values[f"{case}_grad_logits"], rtol=1e-6, atol=1e-7)


def test_without_pictures_it_is_logit_adjustment():
    logits, log_prior, labels, *rows = drawn()
    queue_labels = torch.randint(5, (20,))
    loss = parametric_contrast(logits, log_prior, labels, *rows, queue_labels, 0.05, alpha=0, gamma=0)
    assert_close(loss, F.cross_entropy(logits + log_prior, labels, reduction="none"))


def test_gradient_of_the_logits():
    """More positives lower the weight of the centre: `exp(c) / D - [c = y] beta / (beta + alpha |P|)`."""
    logits, log_prior, labels, queries, keys, queue = drawn()
    temperature, constants = 0.2, (0.3, 0.7, 0.5, 2.0)
    alpha, beta, gamma, logit_temperature = constants
    queue_labels = torch.randint(5, (20,))
    logits.requires_grad_()
    loss = parametric_contrast(logits, log_prior, labels, queries, keys, queue, queue_labels, temperature, *constants)
    loss.mean().backward()
    expected = torch.zeros_like(logits)
    for i in range(len(labels)):
        centres = ((logits.detach()[i] + log_prior) / logit_temperature).exp()
        others = [(q, y) for j, (q, y) in enumerate(zip(queries, labels, strict=True)) if j != i]
        others += [*zip(keys, labels, strict=True), *zip(queue, queue_labels, strict=True)]
        total = centres.sum() + gamma * sum((queries[i] @ a / temperature).exp() for a, _ in others)
        positives = sum(int(y == labels[i]) for _, y in others)
        expected[i] = centres / total
        expected[i, labels[i]] -= beta / (beta + alpha * positives)
    assert_close(logits.grad, expected / (len(labels) * logit_temperature))


def test_order_of_the_queue_and_empty_slots_change_nothing():
    logits, log_prior, labels, queries, keys, queue = drawn()
    queue_labels = torch.randint(5, (20,))
    loss = parametric_contrast(logits, log_prior, labels, queries, keys, queue, queue_labels, 0.1, 0.05)
    order = torch.randperm(20)
    longer = torch.cat([queue[order], F.normalize(torch.randn(3, 4).double(), dim=-1)])
    longer_labels = torch.cat([queue_labels[order], torch.full((3,), -1)])
    again = parametric_contrast(logits, log_prior, labels, queries, keys, longer, longer_labels, 0.1, 0.05)
    assert_close(again, loss)


def test_half_precision_is_computed_in_single():
    logits, log_prior, labels, *rows = (x.bfloat16() if x.is_floating_point() else x for x in drawn())
    loss = parametric_contrast(logits, log_prior.float(), labels, *rows, torch.randint(5, (20,)), 0.05, 0.01)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
