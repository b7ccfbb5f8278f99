"""Targeted supervised contrast against its published code; targets, centroids and their assignment."""

from itertools import permutations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ecl_hf.methods.kcl import k_positive_contrast
from ecl_hf.methods.tsc import Targets, assign, move_centroids, simplex, spread, spread_targets, targeted_contrast


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


def read(published):
    return {key: torch.from_numpy(value) for key, value in published("features_and_teachers/tsc_kcl").items()}


@pytest.mark.parametrize("case", ["tsc_all", "tsc_k20", "tsc_k2"])
def test_published_values(published, case):
    values = read(published)
    raw, keys = values["q_raw"].requires_grad_(), F.normalize(values["k_raw"], dim=-1)
    queries, labels, targets = F.normalize(raw, dim=-1), values["labels"], values["targets"]

    sums = torch.zeros_like(targets).index_add_(0, labels, queries.detach())
    centroids = move_centroids(values["centroids_before"], sums)
    assert_close(centroids, values[f"{case}_centroids_after"], rtol=1e-6, atol=1e-9)
    assignment = assign(centroids, targets)
    assert assignment.tolist() == values[f"{case}_assignment"].tolist()

    loss = targeted_contrast(
        queries,
        keys,
        values["queue"],
        values[f"{case}_picked"].bool(),
        targets,
        assignment[labels],
        values["T"].item(),
        values[f"{case}_target_weight"].item(),
        as_in_code=True,
    ).mean()
    assert_close(loss, values[f"{case}_loss"], rtol=1e-6, atol=0)
    assert_close(torch.autograd.grad(loss, raw)[0], values[f"{case}_grad_q_raw"], rtol=1e-5, atol=1e-8)


def test_paper_form_against_loops():
    """The mean over key and picked keys, plus the target's weight times its log-probability, undivided."""
    queries, keys, queue, targets = unit(3, 4), unit(3, 4), unit(6, 4), unit(5, 4)
    picked, own = torch.tensor([[1, 0, 1, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 1, 1]]).bool(), torch.tensor([4, 0, 2])
    expected = []
    for i in range(3):
        candidates = torch.cat([keys[i : i + 1], queue, targets])
        log_p = (candidates @ queries[i] / 0.3).log_softmax(0)
        positives = [0] + [1 + j for j in range(6) if picked[i, j]]
        expected.append(-log_p[positives].mean() - 0.2 * log_p[7 + own[i]])
    actual = targeted_contrast(queries, keys, queue, picked, targets, own, 0.3, 0.2)
    assert_close(actual, torch.stack(expected))


def test_order_of_the_targets_changes_nothing():
    arguments = unit(3, 4), unit(3, 4), unit(6, 4), torch.rand(3, 6) < 0.5
    targets, own, order = unit(5, 4), torch.tensor([4, 0, 2]), torch.tensor([3, 0, 4, 1, 2])
    loss = targeted_contrast(*arguments, targets, own, 0.3, 0.2)
    assert_close(targeted_contrast(*arguments, targets[order], order.argsort()[own], 0.3, 0.2), loss)


def test_targets_without_weight_are_further_keys_of_kcl():
    queries, keys, queue, picked, targets = unit(3, 4), unit(3, 4), unit(6, 4), torch.rand(3, 6) < 0.5, unit(5, 4)
    own = torch.tensor([4, 0, 2])
    loss = targeted_contrast(queries, keys, queue, picked, targets, own, 0.3, target_weight=0.0)
    expected = k_positive_contrast(queries, keys, torch.cat([queue, targets]), F.pad(picked, (0, 5)), 0.3)
    assert_close(loss, expected)


def test_published_spread(published):
    values = read(published)
    rows = values["uniform_input"].requires_grad_()
    loss = spread(rows, values["uniform_T"].item())
    assert_close(loss, values["uniform_loss"], rtol=1e-6, atol=0)
    assert_close(torch.autograd.grad(loss, rows)[0], values["uniform_grad"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 1), (2, 5), (5, 4), (5, 9)])
def test_simplex(num_classes, dim):
    rows = simplex(num_classes, dim)
    assert rows.shape == (num_classes, dim)
    cosines = torch.full((num_classes, num_classes), -1 / (num_classes - 1)).fill_diagonal_(1)
    assert_close(rows @ rows.T, cosines, rtol=0, atol=1e-6)


def test_search_comes_near_what_is_known():
    """Six targets on a circle belong on the corners of a hexagon."""
    angles = 2 * torch.pi * torch.arange(6) / 6
    polygon = spread(torch.stack([angles.cos(), angles.sin()], dim=1))
    found, start = spread_targets(6, 2, steps=800), spread_targets(6, 2, steps=1)
    assert_close(found.norm(dim=1), torch.ones(6))
    assert spread(start) - polygon > 0.3
    assert 0 < spread(found) - polygon < 0.02


def test_best_of_all_assignments():
    centroids, targets = unit(5, 3), unit(5, 3)
    assignment = assign(centroids, targets)
    gains = {order: sum(centroids[c] @ targets[t] for c, t in enumerate(order)) for order in permutations(range(5))}
    assert tuple(assignment.tolist()) == max(gains, key=gains.get)


def test_centroids_stay_where_a_class_is_absent():
    centroids, sums = unit(3, 4), unit(3, 4)
    sums[1] = 0
    moved = move_centroids(centroids, 5 * sums, momentum=0.9)
    assert_close(moved[1], centroids[1], rtol=0, atol=0)
    for c in (0, 2):
        mixed = 0.9 * centroids[c] + 0.1 * sums[c] / sums[c].norm()
        assert_close(moved[c], mixed / mixed.norm())


def test_centroids_move_by_all_pictures_of_a_step():
    part, labels = Targets(4, 5, steps=1), torch.tensor([0, 2, 2, 0, 1])
    before, queries = part.centroids.clone(), F.normalize(torch.randn(5, 5), dim=-1)
    part.collect(queries[:3], labels[:3])  # two micro-batches
    part.collect(queries[3:], labels[3:])
    assert torch.equal(part.centroids, before)
    part.after_step()
    for c in range(4):
        mean = queries[labels == c].mean(0) if c in labels else before[c]
        moved = 0.9 * before[c] + 0.1 * mean / mean.norm()
        assert_close(part.centroids[c], moved / moved.norm())
    assert part.assignment.tolist() == assign(part.centroids, part.targets).tolist()
    centroids = part.centroids.clone()
    part.after_step()  # of a step without pictures
    assert torch.equal(part.centroids, centroids)
