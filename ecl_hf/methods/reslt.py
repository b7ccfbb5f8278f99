"""ResLT: residual learning for long-tailed recognition (Cui et al., TPAMI 2022).

Three branches share encoder and classifier. The first learns from all classes, the second from the medium and rare
ones, the third from the rare ones; their logits are added, so that the later ones correct the first.

Read: jiequancui/ResLT@9650d93 (CIFAR/cifarTrain_reslt_cifar100.py, CIFAR/networks/resnet_cifar.py, ImageNetLT). Ours is
the CIFAR form for every encoder: a branch is a BatchNorm of its own on the encoder's last map. The published models for
ImageNet-LT have a 1x1 convolution there, and compute something else in the test than in training.

Published weights of the branches' loss (200 epochs, crop and flip): 0.72, 0.99 and 0.995 for CIFAR-100-LT with
imbalance 10, 50 and 100; 0.96, 0.998 and 0.998 for CIFAR-10-LT. Published accuracy, with RIDE's three experts in place
of one network: ImageNet-LT 57.6 (ResNeXt-50), iNaturalist 2018 72.9.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf import losses

EPSILON = 1e-7
"""Added to the probabilities in the published loss of the branches: its values are at most 16.1."""


def nested_classes(class_counts: Tensor, medium: int, tail: int) -> Tensor:
    """Classes that each of the three branches learns from: all, the `medium` rarest, the `tail` rarest.

    Args:
        class_counts: training images of each class, [C]; of equally large ones the first is the more frequent.
        medium: number of classes of the second branch.
        tail: of the third.

    Returns:
        [3, C], boolean.
    """
    rank = class_counts.argsort(descending=True, stable=True).argsort()
    sizes = torch.tensor([len(class_counts), medium, tail], device=class_counts.device)
    return rank >= len(class_counts) - sizes[:, None]


def branch_losses(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Negative log-probability of the label, averaged over the branches that learn from its class.

    The mean over images with the weights `classes.sum(0)` is the published loss: the sum over branches and their
    images, divided by the number of its addends.

    Args:
        logits: of the branches, [3, B, C].
        labels: class indices, [B].
        classes: of each branch, [3, C]; every class belongs to the first.

    Returns:
        [B].
    """
    (logits,) = losses.full_precision(logits)
    probabilities = logits.softmax(-1).gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]
    takes_part = classes[:, labels]
    return -((probabilities + EPSILON).log() * takes_part).sum(0) / takes_part.sum(0)


def folded_classifier(weight: Tensor, bias: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The linear classifier on pooled features that computes the sum of branches `W (g_b v + s_b) + b`.

    Args:
        weight: W, [C, D].
        bias: b, [C].
        scales: g, factor of each branch on each channel, [3, D].
        offsets: s, [3, D].

    Returns:
        Weight [C, D] and bias [C].
    """
    return weight * scales.sum(0), F.linear(offsets.sum(0), weight) + len(scales) * bias
