"""Terms that several methods share: cross-entropies, the mean over the experts; and deferred class weights."""

from typing import Any

from torch import Tensor

from ecl_hf.losses import cross_entropies, effective_number_weights
from ecl_hf.methods.base import PerImage, TaskOutputs, Term
from ecl_hf.methods.settings import DeferredSettings


def _plain(out: TaskOutputs, _: Any) -> PerImage:
    return PerImage(cross_entropies(out.cls_logits, out.labels).mean(0))


def _balanced(out: TaskOutputs, _: Any) -> PerImage:
    return PerImage(cross_entropies(out.cls_logits, out.labels, out.log_prior_shift).mean(0))


def deferred_weights(out: TaskOutputs, settings: DeferredSettings) -> Tensor | None:
    """Class weights of deferred re-weighting, [C]; None before they set in."""
    if not settings.has_begun(out.time.progress):
        return None
    return effective_number_weights(out.class_counts, settings.beta)


CROSS_ENTROPY = Term("supervision", _plain, two_labels=True)
BALANCED_CROSS_ENTROPY = Term("supervision", _balanced, two_labels=True)
"""Balanced softmax, which is logit adjustment with tau 1."""
