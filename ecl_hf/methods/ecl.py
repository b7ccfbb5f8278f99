"""ECL: effective collaborative learning (Xu et al., IEEE TMM 2023).

Eq. 10 and 11, the rows of Table III, and the controls that the paper lacks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.methods.base import Experts, Loss, Method, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import MomentumSettings, Settings


@dataclass(kw_only=True)
class BalancedSettings(Settings):
    """Of the balanced cross-entropy (Eq. 3 and 10)."""

    sup_reduction: Literal["mean", "sum"] = "mean"
    """Supervision over the experts (Eq. 10): `mean` as printed; `sum` keeps each expert's gradient whole."""
    tau: float = 1.0
    """Strength of the class prior in the balanced cross-entropy (Eq. 3)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tau >= 0, f"loss.tau must not be negative, got {self.tau}")


@dataclass(kw_only=True)
class DistillationSettings(Settings):
    """Of both distillations (Eq. 7 and 8)."""

    temperature: float = 1.0
    """Temperature of both distillations (Eq. 7 and 8)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"loss.temperature must be positive, got {self.temperature}")


@dataclass(kw_only=True)
class LogitWeight(Settings):
    """Of the logit distillation."""

    alpha_logit: float = 0.6
    """Weight of the logit distillation (Eq. 11)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha_logit >= 0, f"loss.alpha_logit must not be negative, got {self.alpha_logit}")


@dataclass(kw_only=True)
class FeatureWeight(Settings):
    """Of the feature distillation."""

    alpha_feature: float = 0.6
    """Weight of the feature distillation (Eq. 11)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha_feature >= 0, f"loss.alpha_feature must not be negative, got {self.alpha_feature}")


@dataclass(kw_only=True)
class ContrastiveSettings(MomentumSettings):
    """Of the contrastive proxy task (Eq. 9)."""

    beta: float = 1.0
    """Weight of the contrastive proxy task (Eq. 11)."""
    contrast_temperature: float = 0.2
    """Temperature of the contrastive loss (Eq. 9)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= 0, f"loss.beta must not be negative, got {self.beta}")
        positive = self.contrast_temperature > 0
        require(positive, f"loss.contrast_temperature must be positive, got {self.contrast_temperature}")


@dataclass(kw_only=True)
class LogitSettings(DistillationSettings, LogitWeight, BalancedSettings):
    """Of supervision and logit distillation."""


@dataclass(kw_only=True)
class FeatureSettings(DistillationSettings, FeatureWeight, BalancedSettings):
    """Of supervision and feature distillation."""


@dataclass(kw_only=True)
class ProxySettings(ContrastiveSettings, BalancedSettings):
    """Of supervision and the contrastive proxy task."""


@dataclass(kw_only=True)
class LogitProxySettings(ContrastiveSettings, LogitSettings):
    """Of supervision, logit distillation and the contrastive proxy task."""


@dataclass(kw_only=True)
class FeatureProxySettings(ContrastiveSettings, FeatureSettings):
    """Of supervision, feature distillation and the contrastive proxy task."""


@dataclass(kw_only=True)
class ECLSettings(ContrastiveSettings, DistillationSettings, FeatureWeight, LogitWeight, BalancedSettings):
    """Weights and constants of the loss terms (Eq. 3 to 11)."""


def _over_experts(logits: Tensor, out: TaskOutputs, tau: float, reduction: str) -> Tensor:
    """Supervision of one kind of head (Eq. 10), reduced over the experts of [K, B, C] as asked."""
    k = len(logits)
    mean = losses.balanced_cross_entropy(logits.flatten(0, 1), out.labels.repeat(k), out.log_prior_shift, tau)
    return mean * k if reduction == "sum" else mean


def _plain(out: TaskOutputs, _: Settings) -> Tensor:
    return _over_experts(out.cls_logits, out, 0.0, "mean")


def _supervision(out: TaskOutputs, config: BalancedSettings) -> Tensor:
    return _over_experts(out.cls_logits, out, config.tau, config.sup_reduction)


def _reference(out: TaskOutputs, config: BalancedSettings) -> Tensor:
    return _over_experts(out.ref_logits, out, config.tau, config.sup_reduction)


def _no_weights(out: TaskOutputs) -> None:
    """Every sample counts alike."""


def _balanced_weights(out: TaskOutputs) -> Tensor:
    return losses.transfer_weights(out.ref_logits, out.cls_logits, out.labels)


def _shuffled_weights(out: TaskOutputs) -> Tensor:
    """The same values on other samples of the batch; one permutation for all experts."""
    weights = _balanced_weights(out)
    return weights[:, torch.randperm(weights.shape[1], device=weights.device)]


def _inverted_weights(out: TaskOutputs) -> Tensor:
    """The other orientation of Eq. 6."""
    return losses.transfer_weights(out.cls_logits, out.ref_logits, out.labels)


def _logit(weights: Callable[[TaskOutputs], Tensor | None], detach_teacher: bool = False) -> Loss:
    def loss(out: TaskOutputs, config: DistillationSettings) -> Tensor:
        return losses.logit_distillation(out.cls_logits, weights(out), config.temperature, detach_teacher)

    return loss


def _feature(detach_teacher: bool = False) -> Loss:
    def loss(out: TaskOutputs, config: DistillationSettings) -> Tensor:
        return losses.feature_distillation(out.features, config.temperature, detach_teacher)

    return loss


def _contrastive(out: TaskOutputs, config: ContrastiveSettings) -> Tensor:
    """Summed over experts, as printed in Eq. 9."""
    experts = zip(out.queries, out.keys, out.queues, strict=True)
    return sum(losses.info_nce(query, key, queue, config.contrast_temperature) for query, key, queue in experts)


_REFERENCE = frozenset({"reference"})
_MOMENTUM = frozenset({"momentum"})

PLAIN = Term("supervision", _plain, two_labels=True)
SUPERVISION = Term("supervision", _supervision, two_labels=True)
REFERENCE = Term("reference", _reference, needs=_REFERENCE)
UNWEIGHTED = Term("logit", _logit(_no_weights), "alpha_logit")
BALANCED = Term("logit", _logit(_balanced_weights), "alpha_logit", _REFERENCE)
SHUFFLED = Term("logit", _logit(_shuffled_weights), "alpha_logit", _REFERENCE)
INVERTED = Term("logit", _logit(_inverted_weights), "alpha_logit", _REFERENCE)
BALANCED_DETACHED = Term("logit", _logit(_balanced_weights, detach_teacher=True), "alpha_logit", _REFERENCE)
FEATURE = Term("feature", _feature(), "alpha_feature")
FEATURE_DETACHED = Term("feature", _feature(detach_teacher=True), "alpha_feature")
CONTRASTIVE = Term("contrastive", _contrastive, "beta", _MOMENTUM)


def _method(settings: type[BalancedSettings], *terms: Term) -> Method:
    return Method((Stage(terms),), settings)


PAPERS = {
    "ce": "Cross-entropy, the baseline, in ECL's paper too (Xu et al., IEEE TMM 2023)",
    "bc": "Balanced softmax (Ren et al., NeurIPS 2020), the balanced cross-entropy of ECL (Eq. 3)",
    "bc_ensemble": "Independent networks with balanced softmax (Ren et al., NeurIPS 2020), the baseline of ECL",
}
"""What is not ECL's own."""

METHODS: dict[str, Method] = {
    # Single networks
    "ce": Method((Stage((PLAIN,)),), Settings, experts=Experts(1, most=1), logit_prior="train"),
    "bc": Method((Stage((SUPERVISION,)),), BalancedSettings, experts=Experts(1, most=1)),
    # Table III, top to bottom: K independent experts, then balanced knowledge transfer (bkt), feature level
    # distillation (fld) and the contrastive proxy task (cpt)
    "bc_ensemble": _method(BalancedSettings, SUPERVISION),
    "bkt": _method(LogitSettings, SUPERVISION, REFERENCE, BALANCED),
    "fld": _method(FeatureSettings, SUPERVISION, FEATURE),
    "cpt": _method(ProxySettings, SUPERVISION, CONTRASTIVE),
    "bkt_cpt": _method(LogitProxySettings, SUPERVISION, REFERENCE, BALANCED, CONTRASTIVE),
    "fld_cpt": _method(FeatureProxySettings, SUPERVISION, FEATURE, CONTRASTIVE),
    "ecl": _method(ECLSettings, SUPERVISION, REFERENCE, BALANCED, FEATURE, CONTRASTIVE),
    # Controls
    "kd": _method(LogitSettings, SUPERVISION, UNWEIGHTED),
    "reference_only": _method(BalancedSettings, SUPERVISION, REFERENCE),
    "ecl_unweighted": _method(ECLSettings, SUPERVISION, REFERENCE, UNWEIGHTED, FEATURE, CONTRASTIVE),
    "ecl_shuffled": _method(ECLSettings, SUPERVISION, REFERENCE, SHUFFLED, FEATURE, CONTRASTIVE),
    "ecl_inverted": _method(ECLSettings, SUPERVISION, REFERENCE, INVERTED, FEATURE, CONTRASTIVE),
    "ecl_detached": _method(ECLSettings, SUPERVISION, REFERENCE, BALANCED_DETACHED, FEATURE_DETACHED, CONTRASTIVE),
}
