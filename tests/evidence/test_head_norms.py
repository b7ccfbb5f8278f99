"""Row lengths against class sizes: what is measured, and when something is said."""

import pytest
import torch

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.evidence.head_norms import diagnose, head_norms, tail_to_head

COUNTS = [3, 400, 20, 1000, 100, 5, 9, 50, 700, 2]


def build(exponent, classifier="linear", counts=COUNTS):
    """Two experts whose rows are as long as the class size to a power."""
    config = ECLConfig(architecture="resnet20_cifar", num_experts=2, class_counts=counts, classifier=classifier)
    model = ECLForImageClassification(config)
    for expert in model.experts:
        rows = torch.nn.functional.normalize(expert.head.weight.data, dim=-1)
        expert.head.weight.data = rows * torch.tensor(counts)[:, None] ** exponent
    return model


def test_norms_by_loop():
    model = build(0.3)
    rows = [[expert.head.weight[c].double() for expert in model.experts] for c in range(10)]
    expected = [sum(row.square().sum().sqrt().item() for row in pair) / 2 for pair in rows]
    assert head_norms(model).tolist() == pytest.approx(expected, rel=1e-5)
    assert tail_to_head(head_norms(model), COUNTS) == pytest.approx((2 / 1000) ** 0.3, rel=1e-4)


def test_a_starved_tail_is_named():
    assert "rarest classes are 0.29 times as long" in diagnose(build(0.2))


@pytest.mark.parametrize(
    ("exponent", "options"), [(0.0, {}), (0.3, {"classifier": "cosine"}), (0.3, {"counts": [7] * 10})]
)
def test_nothing_to_say(exponent, options):
    assert diagnose(build(exponent, **options)) is None
