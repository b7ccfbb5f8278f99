"""MDCS: experts with different shares of the prior, each its own teacher across views (Zhao et al., ICCV 2023).

Read: fistyee/MDCS@1a1d54e model/loss.py 307-449, trainer, data_loader, configs. Weakly and strongly augmented images go
through one forward, both with their labels. Expert k learns by cross-entropy of `z_k + log n^lambda_k` on all rows, and
its strong view from its weak one wherever that is right. The mean of the published lambda is 1, so the mean logits suit
a uniform test set. The losses are summed over the experts.

The divergence is divided by the number of images that the expert gets right, not by the batch; none right adds 0.

Published, best test epoch on CIFAR, 400 epochs: CIFAR-100-LT, ResNet-32, imbalance 100/50: 56.1 / 60.1 (another paper
measures 55.4 with this code); ImageNet-LT, ResNet-50 / ResNeXt-50: 60.7 / 61.8; iNaturalist 2018: 75.6; Places-LT:
42.4.
"""

import torch
from torch import Tensor

from ecl_hf.losses import soft_label_losses


def consistency(weak: Tensor, strong: Tensor, labels: Tensor) -> Tensor:
    """Divergence of each expert's strong view from its weak one, over the images whose weak view it gets right.

    Args:
        weak: shifted logits of the weak view, [K, B, C]; carry no gradient.
        strong: shifted logits of the strong view, [K, B, C].
        labels: class indices, [B].

    Returns:
        [K]; 0 for an expert that is right nowhere.
    """
    weak = weak.detach()
    right = weak.argmax(-1) == labels
    kl = torch.stack([soft_label_losses(own, teacher, 1.0) for own, teacher in zip(strong, weak, strict=True)])
    return (kl * right).sum(-1) / right.sum(-1).clamp_min(1)


def ramp(epoch: int, epochs: int = 20) -> float:
    """Weight of the consistency in an epoch counted from 0: `min((epoch + 1) / epochs, 1)`."""
    return min((epoch + 1) / epochs, 1.0)
