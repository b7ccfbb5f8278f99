"""The reading of class knowledge transfer by a loop, and its limits."""

import torch
from torch.testing import assert_close

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.stages import begin_heads
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS, ckt
from ecl_hf.methods.base import EpochContext, Time

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


def test_rows_are_recomposed_once_before_the_retraining():
    model = ECLForImageClassification(
        ECLConfig(
            architecture="resnet20_cifar",
            num_experts=1,
            classifier="cosine",
            classifier_bias=False,
            class_counts=COUNTS.tolist(),
        )
    )
    settings, stage = ckt.CKTSettings(neighbours=2), METHODS["ckt"].stages[1]
    begin_heads(model, stage, settings)
    task = CollaborativeTask(model, METHODS["ckt"], settings, stage=1)
    labels = torch.arange(24) % len(COUNTS)
    features = torch.randn(24, 1, 64)
    labels[-1], features[-1] = -1, float("nan")  # could not be decoded

    def begin_epoch(epoch):
        predict = lambda: (labels, None, features)  # noqa: E731
        task.parts["supervision"].before_epoch(EpochContext(Time(epoch, 3), model, settings, COUNTS, predict))

    begin_epoch(1)
    head = model.experts[0].head
    units = torch.stack([unit(w) for w in head.head.weight.detach()])
    assert_close(head.recomposed, units)
    begin_epoch(0)
    prototypes = torch.stack([unit(sum(unit(v) for v in features[:-1, 0][labels[:-1] == c])) for c in range(6)])
    expected = ckt.recomposed_rows(head.head.weight.detach(), prototypes, COUNTS, 20, 2, 0.1, 0.5)
    assert_close(head.recomposed, expected)
    new = torch.stack([unit(w) for w in head.retrained.weight.detach()])
    query = torch.randn(64)
    logits = [16 * (torch.stack([u, v, w]) @ unit(query)).mean() for u, v, w in zip(units, new, expected, strict=True)]
    assert_close(head.eval()(query[None])[0].detach(), torch.stack(logits))
    assert_close(head.train()(query[None])[0].detach(), 16 * new @ unit(query))
