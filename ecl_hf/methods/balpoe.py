"""BalPoE: a balanced product of experts that take different shares of the prior, with mixup (Aimar et al., CVPR 2023).

Read: emasa/BalPoE-CalibratedLT@ca607ae model/loss.py 8-62, utils/combiner.py 37-100, utils/util.py 325-350, README,
configs/mixup. Expert k learns by cross-entropy of `z_k + tau_k log pi`; the loss is the mean over the experts. The mean
logits suit a uniform test set iff the mean of the strengths is 1: so with (0, 1, 2) on CIFAR and (-1, 1, 3) on
iNaturalist, but not with (0, 1.25, 2.5) on ImageNet-LT. The paper writes `1 - tau_k`, with mean 0.

Readings: other numbers of experts have strengths at equal distances between the same limits; a single one has the
middle.

Published, last epoch, means of 5 seeds: CIFAR-100-LT, ResNet-32, imbalance 100: 52.0 after 200 epochs, 55.9 to 56.3
after 400 with AutoAugment; CIFAR-10-LT, imbalance 100, 400 epochs: 86.8; ImageNet-LT, ResNeXt-50, 400 epochs: 62.0;
iNaturalist 2018, ResNet-50: 75.0 after 100 epochs, 76.9 after 400. Not all of them could be read at their source.
"""

from dataclasses import dataclass

from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.data.mixing import mixup
from ecl_hf.losses import carried_log_prior, prior_shifts, shifted_cross_entropy, spread
from ecl_hf.methods.base import HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.ride import SHARING
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class BalPoESettings(Settings):
    """Of the experts' shares of the prior, and of mixup."""

    least_tau: float = 0.0
    """Strength of the class prior in the first expert's cross-entropy."""
    most_tau: float = 2.0
    """The same of the last one; published 2.5 for ImageNet-LT, and -1 to 3 for iNaturalist."""
    mixup_alpha: float = 0.4
    """Of the Beta distribution of mixup; published 0.8 for CIFAR-10, 0.3 for ImageNet-LT, 0.2 for iNaturalist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = f"{self.least_tau} and {self.most_tau}"
        require(self.least_tau <= self.most_tau, f"loss.least_tau must not exceed loss.most_tau, got {limits}")
        require(self.mixup_alpha > 0, f"loss.mixup_alpha must be positive, got {self.mixup_alpha}")


def balpoe_shifts(class_counts: Tensor, settings: BalPoESettings, num_experts: int) -> Tensor:
    """Added to the logits of the experts: `tau_k log pi`; [C] -> [K, C]."""
    return prior_shifts(class_counts, spread(settings.least_tau, settings.most_tau, num_experts))


def _supervision(out: TaskOutputs, settings: BalPoESettings) -> PerImage:
    shifts = balpoe_shifts(out.class_counts, settings, len(out.cls_logits))
    return PerImage(shifted_cross_entropy(out.cls_logits, out.labels, shifts).mean(0))


def _carried(class_counts: Tensor, settings: BalPoESettings, num_experts: int) -> Tensor:
    return carried_log_prior(class_counts, balpoe_shifts(class_counts, settings, num_experts))


SUPERVISION = Term("supervision", _supervision, two_labels=True)

METHODS = {
    "balpoe": Method(
        (Stage((SUPERVISION,), mixing=mixup(lambda settings: settings.mixup_alpha), heads=unit_rows),),
        BalPoESettings,
        head=HeadKind("cosine", scale=30.0, bias=False),
        experts=SHARING,
        logit_prior=_carried,
    )
}
