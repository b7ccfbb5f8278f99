"""Terms that several methods share: cross-entropies, the mean over the experts."""

from typing import Any

from ecl_hf.losses import cross_entropies
from ecl_hf.methods.base import PerImage, TaskOutputs, Term


def _plain(out: TaskOutputs, _: Any) -> PerImage:
    return PerImage(cross_entropies(out.cls_logits, out.labels).mean(0))


def _balanced(out: TaskOutputs, _: Any) -> PerImage:
    return PerImage(cross_entropies(out.cls_logits, out.labels, out.log_prior_shift).mean(0))


CROSS_ENTROPY = Term("supervision", _plain, two_labels=True)
BALANCED_CROSS_ENTROPY = Term("supervision", _balanced, two_labels=True)
"""Balanced softmax, which is logit adjustment with tau 1."""
