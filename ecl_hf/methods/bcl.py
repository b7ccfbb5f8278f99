"""BCL: balanced contrastive learning (Zhu et al., CVPR 2022).

Supervised contrast in which each class counts once among the competitors, however many of its pictures are in the
batch, and in which each class is present in every batch by a prototype made of its classifier's row.

Read: FlamieZhu/Balanced-Contrastive-Learning@f72d070 loss/contrastive.py, loss/logitadjust.py, models/resnext.py,
main.py. The published script does not run as it stands (an undefined name, broken indentation); the losses do. The
CIFAR script was never released: its settings here are those the paper is said to print, unchecked.

Published top-1: CIFAR-100-LT at imbalance 10/50/100 64.9/56.6/51.9, CIFAR-10-LT 91.1/87.2/84.3 (ResNet-32, 200 epochs,
AutoAugment); ImageNet-LT 56.0 (ResNet-50), 57.1 (ResNeXt-50), 90 epochs; iNaturalist 2018 71.8 (ResNet-50, 100 epochs).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import contrast, full_precision, same_class, share_evenly


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
