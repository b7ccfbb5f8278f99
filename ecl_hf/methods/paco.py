"""PaCo: parametric contrastive learning (Cui et al., ICCV 2021).

The classifier's logits join the similarities in one softmax, as learnable centres of the classes: a rare class that has
no other picture at hand still has its centre, and the centre's weight falls as positives grow more.

Read: dvlab-research/Parametric-Contrastive-Learning@fe56535 PaCo/LT/{losses.py,paco_cifar.py,paco_lt.py},
moco/builder.py. Code and paper differ: the paper sums the weighted logarithms, the code divides by the sum of the
weights; this is the code's form. Left out: the initial queue, which there has random labels and rows that are not of
unit length (here an empty slot counts for nothing), and the 1e-12 and 1e-9 in logarithms.

Published top-1, best test epoch: CIFAR-100-LT at imbalance 10/50/100 64.2/56.0/52.0 (ResNet-32, 400 epochs,
AutoAugment); ImageNet-LT 57.0 (ResNet-50), 58.2 (ResNeXt-50), iNaturalist 2018 73.2 (ResNet-50), all 400 epochs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.losses import contrast, full_precision, same_class
from ecl_hf.methods.base import Experts, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import MomentumSettings


@dataclass(kw_only=True)
class PaCoSettings(MomentumSettings):
    """Of parametric contrastive learning; the defaults are those for CIFAR-100-LT."""

    queue_size: int = 1024
    """Keys in the queue; 8192 on ImageNet-LT and iNaturalist 2018."""
    projection_dim: int = 32
    """Width of the contrastive projections; 128 on ImageNet-LT and iNaturalist 2018."""
    projector_batchnorm: bool = True
    """BatchNorm between the two layers of the projector."""
    temperature: float = 0.05
    """Temperature of the similarities; 0.2 with ResNet-50, 0.07 with ResNeXt-50."""
    alpha: float = 0.01
    """Weight of a picture as a positive; 0.05 on ImageNet-LT and iNaturalist 2018."""
    beta: float = 1.0
    """Weight of the label's centre."""
    gamma: float = 1.0
    """How often a picture counts among the competitors."""
    logit_temperature: float = 1.0
    """Temperature of the centres' logits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "beta", "logit_temperature"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
        for name in ("alpha", "gamma"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


def parametric_contrast(
    logits: Tensor,
    log_prior: Tensor,
    labels: Tensor,
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
    temperature: float,
    alpha: float,
    beta: float = 1.0,
    gamma: float = 1.0,
    logit_temperature: float = 1.0,
) -> Tensor:
    """Parametric contrastive loss: log-probabilities of the label's centre and of all pictures of the label.

    With c = (z + ln p) / logit_temperature, and A the other queries, the keys and the queue, of which P are of the same
    class: `-[beta (c_y - ln D) + alpha sum_P (s_a - ln D)] / (beta + alpha |P|)`, where
    `D = sum_c exp(c_c) + gamma sum_A exp(s_a)` and `s_a = q.a / temperature`.

    Args:
        logits: raw, of the first view, [B, C].
        log_prior: log shares of the classes in the training set, [C].
        labels: class indices, [B].
        queries: L2-normalised projections of the first view, [B, P]; the gradient also passes where one is a candidate.
        keys: L2-normalised keys of the second view, [B, P]; carry no gradient.
        queue: keys of earlier batches, [Q, P].
        queue_labels: their class indices, [Q]; -1 for an empty slot.
        temperature: of the similarities.
        alpha: weight of a picture as a positive.
        beta: weight of the centre.
        gamma: how often a picture counts in D.
        logit_temperature: of the centres' logits.

    Returns:
        [B].
    """
    logits, queries, keys, queue = full_precision(logits, queries, keys.detach(), queue)
    centres = (logits + log_prior) / logit_temperature
    candidates = torch.cat([queries, keys, queue])
    candidate_labels = torch.cat([labels, labels, queue_labels])
    present = (candidate_labels >= 0).expand(len(queries), -1).clone()
    present.fill_diagonal_(False)  # a query is no candidate for itself
    positives = alpha * (same_class(labels, candidate_labels) & present)
    own_centre = torch.zeros_like(centres).scatter_(1, labels[:, None], beta)
    weights = torch.cat([own_centre, positives], dim=1)
    return contrast(
        torch.cat([centres, queries @ candidates.T / temperature], dim=1),
        weights / weights.sum(1, keepdim=True),
        torch.cat([torch.ones_like(centres), gamma * present], dim=1),
    )


def _loss(out: TaskOutputs, settings: PaCoSettings) -> PerImage:
    losses = parametric_contrast(
        out.cls_logits[0],
        out.log_class_counts.log_softmax(0),
        out.labels,
        out.queries[0],
        out.keys[0],
        out.queues[0],
        out.queue_labels,
        settings.temperature,
        settings.alpha,
        settings.beta,
        settings.gamma,
        settings.logit_temperature,
    )
    return PerImage(losses)


PARAMETRIC = Term("parametric_contrast", _loss, needs=frozenset({"momentum"}), whole_batch=True)

METHODS = {"paco": Method((Stage((PARAMETRIC,)),), PaCoSettings, experts=Experts(1, most=1))}
