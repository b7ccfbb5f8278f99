"""The reading of class knowledge transfer by a loop, and its limits."""

import torch
from torch.testing import assert_close

from ecl_hf.methods import ckt

COUNTS = torch.tensor([90, 12, 40, 3, 25, 20])
WIDTH = 7
OPTIONS = {"rare": 20, "neighbours": 2, "temperature": 0.3, "own": 0.4}


def unit(v):
    return v / v.norm()


def draw():
    """Rows of a classifier and prototypes."""
    weight, prototypes = torch.randn(2, len(COUNTS), WIDTH, dtype=torch.double)
    return weight, torch.stack([unit(p) for p in prototypes])


def test_prototypes_by_a_loop():
    labels = torch.arange(18) % len(COUNTS)
    features = torch.randn(18, WIDTH).double()
    kept = labels != 4
    prototypes = ckt.class_prototypes(features[kept], labels[kept], len(COUNTS))
    for c in range(len(COUNTS)):
        members = [unit(v) for v, y in zip(features, labels, strict=True) if y == c]
        expected = torch.zeros(WIDTH).double() if c == 4 else unit(sum(members))
        assert_close(prototypes[c], expected)


def test_rows_by_a_loop():
    weight, prototypes = draw()
    rows = ckt.recomposed_rows(weight, prototypes, COUNTS, **OPTIONS)
    common = [c for c, n in enumerate(COUNTS) if n > 20]
    for c in range(len(COUNTS)):
        if c in common:
            assert_close(rows[c], unit(weight[c]))
            continue
        nearest = sorted(common, key=lambda j: -(prototypes[c] @ prototypes[j]))[:2]
        attention = torch.stack([prototypes[c] @ prototypes[j] / 0.3 for j in nearest]).softmax(0)
        received = sum(a * unit(weight[j]) for a, j in zip(attention, nearest, strict=True))
        assert_close(rows[c], unit(0.4 * prototypes[c] + 0.6 * unit(received)))


def test_limits():
    weight, prototypes = draw()
    few = COUNTS <= 20
    own = ckt.recomposed_rows(weight, prototypes, COUNTS, **OPTIONS | {"own": 1.0})
    assert_close(own[few], prototypes[few])
    twin = prototypes.clone()
    twin[3] = prototypes[2]  # a rare class that looks like a common one
    rows = ckt.recomposed_rows(weight, twin, COUNTS, **OPTIONS | {"own": 0.0, "temperature": 1e-4})
    assert_close(rows[3], unit(weight[2]))
    units = torch.stack([unit(w) for w in weight])
    assert_close(ckt.recomposed_rows(weight, prototypes, COUNTS, **OPTIONS | {"rare": 0}), units)
    assert_close(ckt.recomposed_rows(weight, prototypes, COUNTS, **OPTIONS | {"rare": 1000}), units)
    assert_close(
        ckt.recomposed_rows(weight, prototypes, COUNTS, **OPTIONS | {"neighbours": 99}),
        ckt.recomposed_rows(weight, prototypes, COUNTS, **OPTIONS | {"neighbours": 3}),
    )
