"""Focal loss (Lin et al., ICCV 2017) on the softmax, as long-tailed recognition uses it.

Read: kaidic/LDAM-DRW@2536330 losses.py; hyperconnect/LADE@5db5d13 loss/FocalLoss.py. The paper itself, on object
detection, has a sigmoid for each class; that form with class weights is `cb_focal`, in `class_balanced.py`.

Readings: the exponent is 1, as in LDAM's code (LADE's has 2), and the gradient passes through the modulator (LADE's and
GCL's code stop it there).

Published, top-1 at imbalance 100 (LDAM's paper, CIFAR-10/100-LT, ResNet-32, best test epoch): 70.4 / 38.4.
"""

from dataclasses import dataclass

from ecl_hf.checks import require
from ecl_hf.losses import cross_entropies, focal_losses
from ecl_hf.methods.base import Experts, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class FocalSettings(Settings):
    """Of the focal loss."""

    gamma: float = 1.0
    """Exponent of the modulator; 0 gives cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma >= 0, f"loss.gamma must not be negative, got {self.gamma}")


def _focal(out: TaskOutputs, settings: FocalSettings) -> PerImage:
    return PerImage(focal_losses(cross_entropies(out.cls_logits, out.labels), settings.gamma).mean(0))


FOCAL = Term("supervision", _focal, two_labels=True)

METHODS = {"focal": Method((Stage((FOCAL,)),), FocalSettings, experts=Experts(1, most=1), logit_prior="train")}
