"""KCL against its published code, and the draw of its positives."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.losses import info_nce
from ecl_hf.methods.kcl import draw_positives, k_positive_contrast


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


@pytest.mark.parametrize("case", ["kcl_all", "kcl_k2"])
def test_published_values(published, case):
    values = {key: torch.from_numpy(value) for key, value in published("features_and_teachers/tsc_kcl").items()}
    raw, keys = values["q_raw"].requires_grad_(), F.normalize(values["k_raw"], dim=-1)
    picked = values[f"{case}_picked"].bool()
    queries = F.normalize(raw, dim=-1)
    loss = k_positive_contrast(queries, keys, values["queue"], picked, values["T"].item()).mean()
    assert_close(loss, values[f"{case}_loss"], rtol=1e-6, atol=0)
    assert_close(torch.autograd.grad(loss, raw)[0], values[f"{case}_grad_q_raw"], rtol=1e-5, atol=1e-8)


def test_without_drawn_positives_it_is_infonce():
    queries, keys, queue = unit(5, 6), unit(5, 6), unit(12, 6)
    loss = k_positive_contrast(queries, keys, queue, torch.zeros(5, 12).bool(), 0.2)
    assert_close(loss.mean(), info_nce(queries, keys, queue, 0.2))


def test_without_similarity_every_key_is_alike():
    picked = torch.rand(5, 12) < 0.4
    loss = k_positive_contrast(unit(5, 6), unit(5, 6), unit(12, 6), picked, 1e9)
    assert_close(loss, torch.full((5,), math.log(13)).double(), rtol=1e-6, atol=0)


def test_draw_without_replacement_of_the_own_class():
    labels, queue_labels = torch.tensor([0, 1, 2, 3]), torch.tensor([-1] * 3 + [0] * 8 + [1] * 2 + [3] * 5)
    own = labels[:, None] == queue_labels
    picked = torch.stack([draw_positives(labels, queue_labels, 4) for _ in range(400)])
    assert not (picked & ~own).any()
    assert picked.sum(-1).unique(dim=0).tolist() == [[4, 2, 0, 4]]
    frequency = picked.double().mean(0)
    assert_close(frequency[0, 3:11], torch.full((8,), 0.5).double(), atol=0.12, rtol=0)
    assert_close(frequency[3, 13:], torch.full((5,), 0.8).double(), atol=0.1, rtol=0)


@pytest.mark.parametrize("most", [0, 7, 18, 100])
def test_draw_of_all(most):
    labels, queue_labels = torch.tensor([0, 1, 2]), torch.tensor([-1] * 3 + [0] * 7 + [1] * 2 + [3] * 6)
    assert (draw_positives(labels, queue_labels, most) == (labels[:, None] == queue_labels)).all()
