"""Hybrid-SC and Hybrid-PSC: contrastive features and a classifier, each from its own batches (Wang et al., CVPR 2021).

Features are trained on an instance-balanced stream, the classifier on a class-balanced one; the weight moves from the
first to the second along a parabola. SC is the supervised contrastive loss, PSC compares with learned class prototypes.

There is no official code. Read: the paper's equations as a third-party reproduction quotes them
(CENG502-Projects/CENG502-Spring2022 Project_Durmus-Yavuz), which did not reach the published numbers. Readings: a mean
over the pictures where the paper prints a sum; epochs from 0; two views for PSC; prototypes are free parameters of unit
length; the projector has one hidden layer as wide as the features; each stream has the recipe's batch size.

Published top-1 (ResNet-32, 200 epochs): SC CIFAR-10-LT at imbalance 10/50/100 91.12/85.36/81.40, CIFAR-100-LT at 50/100
51.87/46.72; PSC 90.06/83.86/78.82, CIFAR-100-LT at 100 44.97; iNaturalist 2018 68.1 (PSC, ResNet-50).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.data.samplers import class_balanced
from ecl_hf.losses import contrast, cross_entropies, full_precision, same_class, supervised_contrast
from ecl_hf.methods.base import Experts, Method, Part, PartsContext, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class HybridSettings(Settings):
    """Of Hybrid-SC."""

    temperature: float = 0.1
    """Temperature of the similarities."""
    projection_dim: int = 128
    """Width of the projections."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "projection_dim"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")


@dataclass(kw_only=True)
class PrototypeSettings(HybridSettings):
    """Of Hybrid-PSC; a temperature of 1 was published for CIFAR-10-LT."""

    own_class: bool = False
    """Count the own class among the competitors, which the paper does not."""


def prototypical_contrast(
    features: Tensor, prototypes: Tensor, labels: Tensor, temperature: float, own_class: bool = False
) -> Tensor:
    """Prototypical supervised contrastive loss: `-ln[ exp(r.p_y / T) / sum_{j != y} exp(r.p_j / T) ]`.

    As printed, the own class is no competitor of itself: the loss may be negative, and the pull to the prototype never
    ends.

    Args:
        features: L2-normalised projections of V views, [V, B, P].
        prototypes: L2-normalised, [C, P].
        labels: class indices, [B].
        temperature: of the similarities.
        own_class: count the own class among the competitors, which makes it a softmax.

    Returns:
        Mean over an image's V views, [B].
    """
    anchors, prototypes = full_precision(features.flatten(0, 1), prototypes)
    own = same_class(labels.repeat(len(features)), torch.arange(len(prototypes), device=labels.device))
    losses = contrast(anchors @ prototypes.T / temperature, own, None if own_class else ~own)
    return losses.view(features.shape[:2]).mean(0)


def feature_share(progress: float) -> float:
    """Weight of the feature loss, `1 - (e / E)^2`; the classifier's is the rest."""
    return 1 - progress**2


class Projector(Part):
    """One hidden layer on the features, and for PSC a prototype of each class."""

    def __init__(self, width: int, dim: int, prototypes: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.rows = nn.Parameter(torch.randn(prototypes, dim)) if prototypes else None

    def forward(self, views: list[Tensor]) -> Tensor:
        """Features of V views, [B, D] each -> L2-normalised projections, [V, B, P]."""
        return F.normalize(self.layers(*full_precision(torch.stack(views))), dim=-1)

    @property
    def prototypes(self) -> Tensor:
        """Of unit length, [C, P]."""
        return F.normalize(self.rows, dim=-1)


def _projector(context: PartsContext) -> Projector:
    return Projector(context.width, context.settings.projection_dim)


def _projector_and_prototypes(context: PartsContext) -> Projector:
    return Projector(context.width, context.settings.projection_dim, len(context.class_counts))


def _project(out: TaskOutputs) -> Tensor:
    return out.parts["features"]([out.features[0], *(view.features[0] for view in out.views)])


def _supervised(out: TaskOutputs, settings: HybridSettings) -> PerImage:
    return PerImage(supervised_contrast(_project(out), out.labels, settings.temperature))


def _prototypical(out: TaskOutputs, settings: PrototypeSettings) -> PerImage:
    prototypes = out.parts["features"].prototypes
    losses = prototypical_contrast(_project(out), prototypes, out.labels, settings.temperature, settings.own_class)
    return PerImage(losses)


def _classify(out: TaskOutputs, _: Any) -> PerImage:
    return PerImage(cross_entropies(out.partner.logits[0], out.partner_labels))


def _feature_weight(out: TaskOutputs, _: Any) -> float:
    return feature_share(out.time.progress)


def _classifier_weight(out: TaskOutputs, _: Any) -> float:
    return 1 - feature_share(out.time.progress)


SC = Term("features", _supervised, _feature_weight, part=_projector, whole_batch=True)
PSC = Term("features", _prototypical, _feature_weight, part=_projector_and_prototypes)
CLASSIFIER = Term("classifier", _classify, _classifier_weight)


def _method(features: Term, settings: type[HybridSettings]) -> Method:
    stage = Stage((features, CLASSIFIER), partners=class_balanced(), views=("supervised",))
    return Method((stage,), settings, experts=Experts(1, most=1))


METHODS = {"hybrid_sc": _method(SC, HybridSettings), "hybrid_psc": _method(PSC, PrototypeSettings)}
