"""Methods as tuples of loss terms (Eq. 10 and 11, Table III, and the controls the paper lacks).

To add one: write its loss in `losses.py`, a `Term` and an entry of `METHODS` here, a float64 loop in
`tests/reference.py` with a test, and a row in the README.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ecl_hf import losses
from ecl_hf.methods.base import Loss, Method, TaskOutputs, Term
from ecl_hf.methods.settings import LossConfig

HARD_FRACTION = 0.3
"""Share of the classes that NCL mines as hard: 30 of 100, 300 of 1000, 2442 of 8142 in its published files."""


def _over_experts(logits: Tensor, out: TaskOutputs, tau: float, reduction: str) -> Tensor:
    """Supervision of one kind of head (Eq. 10), reduced over the experts of [K, B, C] as asked."""
    k = len(logits)
    mean = losses.balanced_cross_entropy(logits.flatten(0, 1), out.labels.repeat(k), out.log_prior_shift, tau)
    return mean * k if reduction == "sum" else mean


def _plain(out: TaskOutputs, config: LossConfig) -> Tensor:
    return _over_experts(out.cls_logits, out, 0.0, config.sup_reduction)


def _supervision(out: TaskOutputs, config: LossConfig) -> Tensor:
    return _over_experts(out.cls_logits, out, config.tau, config.sup_reduction)


def _reference(out: TaskOutputs, config: LossConfig) -> Tensor:
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
    def loss(out: TaskOutputs, config: LossConfig) -> Tensor:
        return losses.logit_distillation(out.cls_logits, weights(out), config.temperature, detach_teacher)

    return loss


def _feature(detach_teacher: bool = False) -> Loss:
    def loss(out: TaskOutputs, config: LossConfig) -> Tensor:
        return losses.feature_distillation(out.features, config.temperature, detach_teacher)

    return loss


def _contrastive(out: TaskOutputs, config: LossConfig) -> Tensor:
    """Summed over experts, as printed in Eq. 9."""
    experts = zip(out.queries, out.keys, out.queues, strict=True)
    return sum(losses.info_nce(query, key, queue, config.contrast_temperature) for query, key, queue in experts)


def _hard(out: TaskOutputs) -> Tensor:
    """NCL mines the hard classes by its first expert."""
    return losses.hard_categories(out.cls_logits[0], out.labels, max(1, int(HARD_FRACTION * out.cls_logits.shape[-1])))


def _nested_supervision(out: TaskOutputs, config: LossConfig) -> Tensor:  # noqa: ARG001
    return losses.nested_cross_entropy(out.cls_logits, out.labels, out.log_class_counts, _hard(out))


def _nested_distillation(out: TaskOutputs, config: LossConfig) -> Tensor:  # noqa: ARG001
    return losses.nested_distillation(out.cls_logits, out.log_class_counts, _hard(out))


_REFERENCE = frozenset({"reference"})
_MOMENTUM = frozenset({"momentum"})

PLAIN = Term("supervision", _plain)
SUPERVISION = Term("supervision", _supervision)
REFERENCE = Term("reference", _reference, needs=_REFERENCE)
UNWEIGHTED = Term("logit", _logit(_no_weights), "alpha_logit")
BALANCED = Term("logit", _logit(_balanced_weights), "alpha_logit", _REFERENCE)
SHUFFLED = Term("logit", _logit(_shuffled_weights), "alpha_logit", _REFERENCE)
INVERTED = Term("logit", _logit(_inverted_weights), "alpha_logit", _REFERENCE)
BALANCED_DETACHED = Term("logit", _logit(_balanced_weights, detach_teacher=True), "alpha_logit", _REFERENCE)
FEATURE = Term("feature", _feature(), "alpha_feature")
FEATURE_DETACHED = Term("feature", _feature(detach_teacher=True), "alpha_feature")
CONTRASTIVE = Term("contrastive", _contrastive, "beta", _MOMENTUM)
NESTED_SUPERVISION = Term("supervision", _nested_supervision)
NESTED_DISTILLATION = Term("logit", _nested_distillation, "alpha_logit")

METHODS: dict[str, Method] = {
    # Single networks
    "ce": Method((PLAIN,), max_experts=1, logit_prior="train"),
    "bc": Method((SUPERVISION,), max_experts=1),
    # Table III, top to bottom: K independent experts, then balanced knowledge transfer (bkt), feature level
    # distillation (fld) and the contrastive proxy task (cpt)
    "bc_ensemble": Method((SUPERVISION,)),
    "bkt": Method((SUPERVISION, REFERENCE, BALANCED)),
    "fld": Method((SUPERVISION, FEATURE)),
    "cpt": Method((SUPERVISION, CONTRASTIVE)),
    "bkt_cpt": Method((SUPERVISION, REFERENCE, BALANCED, CONTRASTIVE)),
    "fld_cpt": Method((SUPERVISION, FEATURE, CONTRASTIVE)),
    "ecl": Method((SUPERVISION, REFERENCE, BALANCED, FEATURE, CONTRASTIVE)),
    # NCL as published, with its contrastive branch
    "ncl": Method((NESTED_SUPERVISION, NESTED_DISTILLATION, CONTRASTIVE)),
    # Controls
    "kd": Method((SUPERVISION, UNWEIGHTED)),
    "reference_only": Method((SUPERVISION, REFERENCE)),
    "ecl_unweighted": Method((SUPERVISION, REFERENCE, UNWEIGHTED, FEATURE, CONTRASTIVE)),
    "ecl_shuffled": Method((SUPERVISION, REFERENCE, SHUFFLED, FEATURE, CONTRASTIVE)),
    "ecl_inverted": Method((SUPERVISION, REFERENCE, INVERTED, FEATURE, CONTRASTIVE)),
    "ecl_detached": Method((SUPERVISION, REFERENCE, BALANCED_DETACHED, FEATURE_DETACHED, CONTRASTIVE)),
}
