"""GCL: Gaussian clouded logits (Li et al., CVPR 2022).

Read: Keke921/GCLLoss@c2a6233 losses.py, cifar_train_backbone.py, cifar_train_classifier.py, sampler.py.

Readings: with classes of equal size, where the code divides 0 by 0, there is no cloud.

Published: ImageNet-LT (ResNet-50) 54.88, 52.93 before the second stage; iNaturalist 2018 72.0, 70.3 before; both stages
chosen on the test set.
"""

import torch
from torch import Tensor

from ecl_hf import losses

NOISE = 1 / 3
"""Standard deviation of the noise, which is cut off at -1 and 1."""


def cloud_sizes(class_counts: Tensor) -> Tensor:
    """`log(n_max / n_c) / log(n_max / n_min)`: 0 for the largest class, 1 for the rarest; [C] -> [C]."""
    (counts,) = losses.full_precision(torch.as_tensor(class_counts))
    sizes = (counts.max() / counts).log()
    return sizes / sizes.max() if sizes.max() > 0 else sizes


def clouded_cosines(cosines: Tensor, noise: Tensor, sizes: Tensor, strength: float) -> Tensor:
    """Cosines, each lowered by its class's cloud: `cos_ic - k d_c |e_ic|`.

    Args:
        cosines: of feature and class weight, [B, C].
        noise: normal with standard deviation 1/3; cut off at -1 and 1 here; [B, C].
        sizes: `cloud_sizes`, [C].
        strength: k.

    Returns:
        [B, C].
    """
    return cosines - strength * sizes * noise.abs().clamp_max(1)


def gcl_losses(
    cosines: Tensor, labels: Tensor, noise: Tensor, sizes: Tensor, *, strength: float, margin: float, scale: float
) -> Tensor:
    """Cross-entropy of scaled clouded cosines after the label's has lost a margin.

    Args:
        cosines: [B, C].
        labels: class indices, [B].
        noise: as in `clouded_cosines`, [B, C].
        sizes: `cloud_sizes`, [C].
        strength: of the clouds.
        margin: of every class.
        scale: of the logits.

    Returns:
        [B].
    """
    cosines, noise = losses.full_precision(cosines, noise)
    clouded = clouded_cosines(cosines, noise, sizes, strength)
    margins = torch.full_like(sizes, margin)
    return losses.cross_entropies(losses.margin_logits(clouded, labels, margins, scale), labels)
