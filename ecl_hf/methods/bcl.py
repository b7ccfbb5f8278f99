"""BCL: balanced contrastive learning (Zhu et al., CVPR 2022).

Supervised contrast in which each class counts once among the competitors, however many of its pictures are in the
batch, and in which each class is present in every batch by a prototype made of its classifier's row.

Read: FlamieZhu/Balanced-Contrastive-Learning@f72d070 loss/contrastive.py, loss/logitadjust.py, models/resnext.py,
main.py. The published script does not run as it stands (an undefined name, broken indentation); the losses do. The
CIFAR script was never released: its settings here are those the paper is said to print, unchecked. The second and third
view are this package's contrastive view, which also blurs. The recipe chooses the head: the code has a cosine head of
scale 30 without bias on ImageNet-LT and iNaturalist 2018; for CIFAR a linear one is a reading.

Published top-1: CIFAR-100-LT at imbalance 10/50/100 64.9/56.6/51.9, CIFAR-10-LT 91.1/87.2/84.3 (ResNet-32, 200 epochs,
AutoAugment); ImageNet-LT 56.0 (ResNet-50), 57.1 (ResNeXt-50), 90 epochs; iNaturalist 2018 71.8 (ResNet-50, 100 epochs).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf.checks import require
from ecl_hf.losses import contrast, full_precision, same_class, share_evenly
from ecl_hf.methods.base import Experts, Method, Part, PartsContext, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import BALANCED_CROSS_ENTROPY


@dataclass(kw_only=True)
class BCLSettings(Settings):
    """Of balanced contrastive learning; the defaults are those for CIFAR."""

    supervision_weight: float = 2.0
    """Weight of the balanced cross-entropy; 1 on ImageNet-LT and iNaturalist 2018."""
    contrast_weight: float = 0.6
    """Weight of the balanced contrastive loss; 0.35 on ImageNet-LT and iNaturalist 2018."""
    temperature: float = 0.1
    """Temperature of the similarities; 0.07 on ImageNet-LT and iNaturalist 2018."""
    hidden_dim: int = 512
    """Width of the projectors' hidden layer; 2048 with ResNet-50."""
    projection_dim: int = 128
    """Width of the projections; 1024 with ResNet-50."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "hidden_dim", "projection_dim"):
            require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
        for name in ("supervision_weight", "contrast_weight"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


def balanced_contrast(features: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrast with the mean over a class's members in place of their sum among the competitors.

    Candidates are all other features of the batch and one prototype for each class; an anchor's positives are those of
    its class: `-mean_p (r.p / T - ln D)` with `D = sum_c mean_{a in c} exp(r.a / T)`.

    Args:
        features: L2-normalised projections of V views, [V, B, P]; each is an anchor.
        prototypes: L2-normalised, one for each class, [C, P]; no anchors.
        labels: class indices, [B].
        temperature: of the similarities.

    Returns:
        Mean over an image's V anchors, [B].
    """
    anchors, prototypes = full_precision(features.flatten(0, 1), prototypes)
    anchor_labels = labels.repeat(len(features))
    candidate_labels = torch.cat([anchor_labels, torch.arange(len(prototypes), device=labels.device)])
    others = torch.ones(len(anchors), len(candidate_labels), dtype=torch.bool, device=labels.device)
    others.fill_diagonal_(False)
    own_class = same_class(anchor_labels, candidate_labels)
    members = F.one_hot(candidate_labels, len(prototypes)).sum(0)[candidate_labels] - own_class.long()
    scores = anchors @ torch.cat([anchors, prototypes]).T / temperature
    positives = share_evenly(own_class & others, scores.dtype)
    losses = contrast(scores, positives, others.to(scores.dtype) / members)
    return losses.view(features.shape[:2]).mean(0)


class Projectors(Part):
    """Two projectors of one shape: of the features, and of the classifier's rows, which makes prototypes of them."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.features, self.rows = (
            nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))
            for _ in range(2)
        )

    def forward(self, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features [V, B, D] and the classifier's rows [C, D] -> L2-normalised [V, B, P] and [C, P]."""
        features, rows = full_precision(features, rows)
        projected = self.features(features.flatten(0, 1)).view(*features.shape[:2], -1)
        return F.normalize(projected, dim=-1), F.normalize(self.rows(rows), dim=-1)


def _projectors(context: PartsContext) -> Projectors:
    return Projectors(context.width, context.settings.hidden_dim, context.settings.projection_dim)


def _contrast(out: TaskOutputs, settings: BCLSettings) -> PerImage:
    features = torch.stack([view.features[0] for view in out.views])
    projected, prototypes = out.parts["contrast"](features, out.heads[0].weight)
    return PerImage(balanced_contrast(projected, prototypes, out.labels, settings.temperature))


SUPERVISION = replace(BALANCED_CROSS_ENTROPY, weight="supervision_weight")
CONTRAST = Term("contrast", _contrast, "contrast_weight", part=_projectors, whole_batch=True)

METHODS = {
    "bcl": Method(
        (Stage((SUPERVISION, CONTRAST), views=("contrastive", "contrastive")),), BCLSettings, experts=Experts(1, most=1)
    )
}
