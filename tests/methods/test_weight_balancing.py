"""Weight balancing against the values of its published code, and what a projection must do."""

import re

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.methods import weight_balancing
from ecl_hf.methods.decoupling import tau_normalised


def read(published, name):
    return {key: torch.as_tensor(value) for key, value in published(f"reweighting_and_stages/{name}").items()}


def test_maxnorm_as_published(published):
    values = read(published, "ltr_wd")
    shares = [match[1] for key in values if (match := re.fullmatch(r"threshold_(.+)", key))]
    assert shares
    for share in shares:
        limit = weight_balancing.norm_limit(values["weight"], float(share))
        assert_close(limit, values[f"threshold_{share}"], rtol=1e-9, atol=0)
        for before, after in (("weight", "weight_after_pgd"), ("weight_second", "weight_second_after_pgd")):
            actual = weight_balancing.limit_norms(values[before], limit)
            assert_close(actual, values[f"{after}_{share}"], rtol=1e-9, atol=1e-12)


def test_the_rows_without_training_as_published(published):
    values = read(published, "ltr_wd")
    taus = [match[1] for key in values if (match := re.fullmatch(r"weight_normalizer_tau(.+)", key))]
    assert taus
    for tau in taus:
        actual = tau_normalised(values["weight"], float(tau))
        assert_close(actual, values[f"weight_normalizer_tau{tau}"], rtol=1e-9, atol=1e-12)


def test_loss_as_published(published):
    values = read(published, "class_balanced")
    logits = values["logits"].clone().requires_grad_()
    losses = weight_balancing.softmax_binary_cross_entropy(logits, values["labels"])
    loss = (values["weight_beta0.9999"][values["labels"]] * losses).mean()
    loss.backward()
    assert_close(loss.detach(), values["loss_ltrwd_softmax_bce"], rtol=1e-9, atol=0)
    assert_close(logits.grad, values["grad_ltrwd_softmax_bce"], rtol=1e-8, atol=1e-12)


def test_with_two_classes_it_is_cross_entropy():
    logits, labels = torch.randn(6, 2).double(), torch.arange(6) % 2
    actual = weight_balancing.softmax_binary_cross_entropy(logits, labels)
    assert_close(actual, F.cross_entropy(logits, labels, reduction="none"))


def test_certain_logits_have_a_finite_loss_and_gradient():
    logits = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    weight_balancing.softmax_binary_cross_entropy(logits, torch.tensor([2])).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_projection(share):
    weight = torch.randn(6, 4).double()
    limit = weight_balancing.norm_limit(weight, share)
    cut = weight_balancing.limit_norms(weight, limit)
    assert (cut.norm(dim=-1) <= limit + 1e-12).all()
    assert_close(weight_balancing.limit_norms(cut, limit), cut)
    assert_close(F.normalize(cut, dim=-1), F.normalize(weight, dim=-1))
    short = weight.norm(dim=-1) <= limit
    assert_close(cut[short], weight[short])
    if share == 1.0:
        assert_close(cut, weight)
