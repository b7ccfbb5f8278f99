"""Class-balanced losses by the effective number of images (Cui et al., CVPR 2019).

Read: richardaecn/class-balanced-loss@1d78572 src/cifar_main.py, src/model_base.py, tpu/run_inat2018.sh;
vandit15/Class-balanced-loss-pytorch@921ccb8, a port. In the port "softmax" means a binary cross-entropy of softmax
probabilities, and its "sigmoid" cannot run; ours are the original's.

The sums divide by the number of images, as in the original. LDAM's code divides its class-balanced cross-entropy by the
sum of the images' weights; that form is `losses.weighted_mean`.

Published, best of the paper's losses with beta and gamma chosen on the test set, ResNet-32, imbalance 10/50/100:
CIFAR-10-LT 87.49 / 79.27 / 74.57, CIFAR-100-LT 57.99 / 45.32 / 39.60; iNaturalist 2018 (ResNet-50, 90 epochs) 61.12.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf import losses


def class_balanced_losses(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Softmax cross-entropy times the weight of the label's class.

    Args:
        logits: [B, C].
        labels: class indices, [B].
        class_weights: `losses.effective_number_weights`, [C].

    Returns:
        [B].
    """
    return class_weights[labels] * losses.cross_entropies(logits, labels)


def class_balanced_focal_losses(logits: Tensor, labels: Tensor, class_weights: Tensor, gamma: float) -> Tensor:
    """Sigmoid focal loss over all classes, times the weight of the label's class.

    Summed over the classes: each is a question of its own, whose right answer is yes for the label alone.

    Args:
        logits: [B, C].
        labels: class indices, [B].
        class_weights: `losses.effective_number_weights`, [C].
        gamma: focusing exponent; 0 gives the sigmoid cross-entropy.

    Returns:
        [B].
    """
    (logits,) = losses.full_precision(logits)
    answers = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    questions = F.binary_cross_entropy_with_logits(logits, answers, reduction="none")
    # (1 - p)^gamma from the cross-entropy of the wrong answer: no power of a probability that has rounded to 0
    modulator = torch.exp(-gamma * F.binary_cross_entropy_with_logits(logits, 1 - answers, reduction="none"))
    return class_weights[labels] * (modulator * questions).sum(-1)
