"""LADE: balanced softmax with a regulariser of the label distribution (Hong et al., CVPR 2021).

Read: hyperconnect/LADE@5db5d13 loss/LADELoss.py, loss/PriorCELoss.py, run_networks.py, utils.py,
models/ResNet32Feature.py; LADE_poster.pdf for the paper's form of the regulariser.

Readings: the regulariser is the code's, whose numbers are the published ones; the paper's form weighs a sample by the
prior of its own class and leaves absent classes out, and differs much. The code's 1e-9 in logarithms are left out.

Published: CIFAR-100-LT (ResNet-32 with a doubled last block, imbalance 10/50/100) 61.7 / 50.5 / 45.4, ImageNet-LT
(ResNeXt-50, 180 epochs) 53.0, iNaturalist 2018 (ResNet-50, 200 epochs) 70.0; last epoch on CIFAR.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf import losses


def _class_losses(logits: Tensor, labels: Tensor, log_ratio: Tensor, regularisation: float) -> Tensor:
    """`-(mean of z_ic over the images of c) + R_c + lambda R_c^2`, `R_c = log mean_i exp(z_ic - log_ratio_ic)`; [C]."""
    (logits,) = losses.full_precision(logits)
    own = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    positives = (own * logits).sum(0) / own.sum(0).clamp_min(1)
    partition = (logits - log_ratio).logsumexp(0) - math.log(len(logits))
    return partition + regularisation * partition**2 - positives


def lader(logits: Tensor, labels: Tensor, log_prior_shift: Tensor, regularisation: float) -> Tensor:
    """The regulariser LADER as in the published code: a sample's logit of class c counts by the prior of c.

    Summed over all classes by their prior. A class without an image in the batch keeps its two terms in `R_c`, which
    lower its logits. Runs over the columns of a batch, so it is no mean of losses of single images.

    Args:
        logits: [B, C].
        labels: class indices, [B].
        log_prior_shift: `log p_s - log p_u` with a uniform p_u, [C].
        regularisation: lambda.

    Returns:
        [].
    """
    prior = log_prior_shift.softmax(-1)
    return (prior * _class_losses(logits, labels, log_prior_shift, regularisation)).sum()


def lader_of_the_paper(logits: Tensor, labels: Tensor, log_prior_shift: Tensor, regularisation: float) -> Tensor:
    """LADER as in the paper: a sample counts by the prior of its own class, and absent classes are left out.

    Arguments and result as those of `lader`.
    """
    prior = log_prior_shift.softmax(-1) * torch.zeros_like(log_prior_shift).index_fill(0, labels, 1)
    return (prior * _class_losses(logits, labels, log_prior_shift[labels, None], regularisation)).sum()
