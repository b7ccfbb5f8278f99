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

import torch
from torch import Tensor

from ecl_hf.losses import contrast, full_precision, same_class


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
