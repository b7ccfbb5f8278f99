"""What a method is made of: terms of the loss, and what a training forward offers to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ecl_hf.methods.settings import LossConfig


@dataclass(frozen=True)
class TaskOutputs:
    """What one training forward offers to the terms; branches that no term needs are None.

    Attributes:
        labels: [B].
        cls_logits: raw logits of the classification heads, [K, B, C].
        features: pooled backbone features, [K, B, D].
        log_prior_shift: `log p_s - log p_t`, [C].
        log_class_counts: [C].
        ref_logits: raw logits of the reference heads, [K, B, C].
        queries: L2-normalised projections of the supervised view, [K, B, P].
        keys: L2-normalised keys of the contrastive view, [K, B, P].
        queues: negatives of each expert, [K, Q, P].
    """

    labels: Tensor
    cls_logits: Tensor
    features: Tensor
    log_prior_shift: Tensor
    log_class_counts: Tensor
    ref_logits: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    queues: Tensor | None = None


Loss = Callable[[TaskOutputs, LossConfig], Tensor]
"""Unweighted loss of a forward, []."""


@dataclass(frozen=True)
class Term:
    """One addend of the loss.

    Attributes:
        name: key in the logs.
        loss: unweighted loss of a forward, [].
        weight: name of its weight in `LossConfig`; None for 1.
        needs: train-only branches that it reads.
    """

    name: str
    loss: Loss
    weight: Literal["alpha_logit", "alpha_feature", "beta"] | None = None
    needs: frozenset[Literal["reference", "momentum"]] = frozenset()


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        terms: addends of the loss (Eq. 11).
        max_experts: experts that the method is defined for; None for any number.
        logit_prior: class prior that the trained raw logits carry, see `ECLConfig`.
    """

    terms: tuple[Term, ...]
    max_experts: int | None = None
    logit_prior: Literal["uniform", "train"] = "uniform"

    def experts(self, asked: int) -> int:
        """Number of experts to train where so many are asked for."""
        return min(asked, self.max_experts or asked)

    @property
    def needs(self) -> frozenset[str]:
        """Train-only branches of all terms."""
        return frozenset().union(*(term.needs for term in self.terms))
