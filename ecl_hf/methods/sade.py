"""SADE, also TADE: experts of different skills, weighted by unlabelled test images (Zhang et al., NeurIPS 2022).

Read: Vanint/SADE-AgnosticLT@cba11b8 model/loss.py 244-290, test_training_cifar.py 116-165 and 244-421, configs. The
first expert learns by cross-entropy, the second as if the test set were uniform, the third as if it were the training
set upside down. The losses are means over the batch and summed over the experts, so that shared stages see three times
the learning rate of a mean.

Readings: classes with equal counts are reversed in the order of a stable sort; the code's order of ties depends on the
sorting algorithm. No 1e-9 inside the logarithms.

On an exponential profile the mean of the raw logits is unbiased for a uniform test set at `tau` 1; the published 2
favours rare classes.

The weights for a test set are found by `training/weigh.py` (`evidence/weighing.py`) without labels, but from all of its
images before one is scored: such results are transductive, to be reported as that.

Published, uniform test set, mean of three experts, best test epoch on CIFAR: CIFAR-100-LT, ResNet-32, 200 epochs,
imbalance 10/50/100: 63.6 / 53.9 / 49.8; ImageNet-LT, ResNeXt-50, 180 epochs: 58.8; iNaturalist 2018, ResNet-50, 100
epochs: 72.9; Places-LT: 40.9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf.losses import carried_log_prior, log_class_prior, shifted_cross_entropy
from ecl_hf.methods.base import Experts, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.ride import all_but_two_stages
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class SADESettings(Settings):
    """Of the three experts."""

    tau: float = 2.0
    """Strength of the reversed prior for the third expert; published 1 for iNaturalist and Places-LT."""


def reversed_prior(log_prior: Tensor) -> Tensor:
    """The prior upside down: the class with the r-th smallest prior gets the r-th largest; logs, [C] -> [C]."""
    order = log_prior.argsort(stable=True)
    return torch.empty_like(log_prior).scatter(0, order, log_prior[order].flip(0))


def sade_shifts(class_counts: Tensor, tau: float) -> Tensor:
    """Added to the logits of the three experts: `0`, `log pi`, `log pi - tau log pi_reversed`; [C] -> [3, C]."""
    log_prior = log_class_prior(class_counts)
    return torch.stack([torch.zeros_like(log_prior), log_prior, log_prior - tau * reversed_prior(log_prior)])


def _supervision(out: TaskOutputs, settings: SADESettings) -> PerImage:
    shifts = sade_shifts(out.class_counts, settings.tau)
    return PerImage(shifted_cross_entropy(out.cls_logits, out.labels, shifts).sum(0))


def _carried(class_counts: Tensor, settings: SADESettings, _: int) -> Tensor:
    return carried_log_prior(class_counts, sade_shifts(class_counts, settings.tau))


SUPERVISION = Term("supervision", _supervision, two_labels=True)

METHODS = {
    "sade": Method(
        (Stage((SUPERVISION,), heads=unit_rows),),
        SADESettings,
        head=HeadKind("cosine", scale=30.0, bias=False),
        experts=Experts(3, least=3, most=3, shared=all_but_two_stages),
        logit_prior=_carried,
    )
}
