"""LDAM, and LDAM with deferred re-weighting (Cao et al., NeurIPS 2019).

Read: kaidic/LDAM-DRW@2536330 losses.py, cifar_train.py, models/resnet_cifar.py.

Reading: re-weighting begins after four fifths of training, at the first drop of the published learning rate (epoch 160
of 200). The published code counts it in steps of 160 epochs into a list of two, and cannot train for more than 320.

Published (ResNet-32, imbalance 10/100, best test epoch) for LDAM-DRW: CIFAR-10-LT 88.16 / 77.03, CIFAR-100-LT
58.71 / 42.04.
"""

import torch
from torch import Tensor

from ecl_hf import losses


def ldam_margins(class_counts: Tensor, max_margin: float) -> Tensor:
    """Margins `n_c^(-1/4)`, scaled so that the rarest class has `max_margin`; [C] -> [C]."""
    (counts,) = losses.full_precision(torch.as_tensor(class_counts))
    return max_margin * (counts.min() / counts) ** 0.25


def ldam_losses(cosines: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """Cross-entropy of scaled cosines after the label's has lost its margin.

    Args:
        cosines: of feature and class weight, [B, C].
        labels: class indices, [B].
        margins: `ldam_margins`, [C].
        scale: of the logits.

    Returns:
        [B].
    """
    (cosines,) = losses.full_precision(cosines)
    return losses.cross_entropies(losses.margin_logits(cosines, labels, margins, scale), labels)
