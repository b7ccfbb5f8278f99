"""Class-balanced losses by the effective number of images (Cui et al., CVPR 2019).

Read: richardaecn/class-balanced-loss@1d78572 src/cifar_main.py, src/model_base.py, tpu/run_inat2018.sh;
vandit15/Class-balanced-loss-pytorch@921ccb8, a port. In the port "softmax" means a binary cross-entropy of softmax
probabilities, and its "sigmoid" cannot run; ours are the original's.

The sums divide by the number of images, as in the original. LDAM's code divides its class-balanced cross-entropy by the
sum of the images' weights; that form is `losses.weighted_mean`. Departure: the first bias of `cb_focal`, which the
original keeps out of weight decay, decays as all parameters do. Its logits rank classes; their softmax means little.

Published, best of the paper's losses with beta and gamma chosen on the test set, ResNet-32, imbalance 10/50/100:
CIFAR-10-LT 87.49 / 79.27 / 74.57, CIFAR-100-LT 57.99 / 45.32 / 39.60; iNaturalist 2018 (ResNet-50, 90 epochs) 61.12.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.methods.base import Experts, HeadContext, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class ClassBalancedSettings(Settings):
    """Of the class-balanced losses."""

    beta: float = 0.9999
    """Of the effective number of images, in [0, 1): 0 weighs all classes alike, towards 1 the weights approach 1/n."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta < 1, f"loss.beta must lie in [0, 1), got {self.beta}")


@dataclass(kw_only=True)
class ClassBalancedFocalSettings(ClassBalancedSettings):
    """Of the class-balanced sigmoid focal loss."""

    gamma: float = 1.0
    """Exponent of the modulator; 0 gives the sigmoid cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma >= 0, f"loss.gamma must not be negative, got {self.gamma}")


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


def _class_balanced(out: TaskOutputs, settings: ClassBalancedSettings) -> PerImage:
    weights = losses.effective_number_weights(out.class_counts, settings.beta)
    return PerImage(class_balanced_losses(out.cls_logits[0], out.labels, weights))


def _class_balanced_focal(out: TaskOutputs, settings: ClassBalancedFocalSettings) -> PerImage:
    weights = losses.effective_number_weights(out.class_counts, settings.beta)
    return PerImage(class_balanced_focal_losses(out.cls_logits[0], out.labels, weights, settings.gamma))


def answering_no(head: nn.Linear, context: HeadContext) -> nn.Linear:
    """Give a new head the bias by which every class has the probability 1/C at first.

    Otherwise C - 1 answers of one half would drown the right one.
    """
    nn.init.constant_(head.bias, -math.log(len(context.class_counts) - 1))
    return head


CLASS_BALANCED = Term("supervision", _class_balanced, two_labels=True)
CLASS_BALANCED_FOCAL = Term("supervision", _class_balanced_focal, two_labels=True)

METHODS = {
    "cb": Method((Stage((CLASS_BALANCED,)),), ClassBalancedSettings, experts=Experts(1, most=1)),
    "cb_focal": Method(
        (Stage((CLASS_BALANCED_FOCAL,), heads=answering_no),),
        ClassBalancedFocalSettings,
        head=HeadKind("linear"),
        experts=Experts(1, most=1),
    ),
}
