"""LADE: balanced softmax with a regulariser of the label distribution (Hong et al., CVPR 2021).

Read: hyperconnect/LADE@5db5d13 loss/LADELoss.py, loss/PriorCELoss.py, run_networks.py, utils.py,
models/ResNet32Feature.py; LADE_poster.pdf for the paper's form of the regulariser.

Readings: the regulariser is the code's, whose numbers are the published ones; the paper's form weighs a sample by the
prior of its own class and leaves absent classes out, and differs much. The code's 1e-9 in logarithms are left out.

Published: CIFAR-100-LT (ResNet-32 with a doubled last block, imbalance 10/50/100) 61.7 / 50.5 / 45.4, ImageNet-LT
(ResNeXt-50, 180 epochs) 53.0, iNaturalist 2018 (ResNet-50, 200 epochs) 70.0; last epoch on CIFAR.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.methods.base import Experts, Method, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import BALANCED_CROSS_ENTROPY


@dataclass(kw_only=True)
class LADESettings(Settings):
    """Of LADE; ImageNet-LT and iNaturalist 2018 were published with an alpha of 0.05 and a lambda of 0.5."""

    alpha: float = 0.1
    """Weight of the regulariser."""
    regularisation: float = 0.01
    """Lambda, the weight of the squares within it."""
    form: Literal["code", "paper"] = "code"
    """The regulariser of the published code, or of the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "regularisation"):
            require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


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


def _regulariser(out: TaskOutputs, settings: LADESettings) -> Tensor:
    form = lader if settings.form == "code" else lader_of_the_paper
    return form(out.cls_logits[0], out.labels, out.log_prior_shift, settings.regularisation)


LADER = Term("regulariser", _regulariser, "alpha", whole_batch=True)

METHODS = {"lade": Method((Stage((BALANCED_CROSS_ENTROPY, LADER)),), LADESettings, experts=Experts(1, most=1))}
