"""MDCS: experts with different shares of the prior, each its own teacher across views (Zhao et al., ICCV 2023).

Read: fistyee/MDCS@1a1d54e model/loss.py 307-449, trainer, data_loader, configs. Weakly and strongly augmented images go
through one forward, both with their labels; here the strong view is the recipe's, and the weak one RIDE's (`rotated`).
Expert k learns by cross-entropy of `z_k + log n^lambda_k` on all rows, and its strong view from its weak one wherever
that is right. The mean of the published lambda is 1, so the mean logits suit a uniform test set. The losses are summed
over the experts.

The divergence is divided by the number of images that the expert gets right, not by the batch; none right adds 0. The
number is that of all processes; micro-batches are refused.

Published, best test epoch on CIFAR, 400 epochs: CIFAR-100-LT, ResNet-32, imbalance 100/50: 56.1 / 60.1 (another paper
measures 55.4 with this code); ImageNet-LT, ResNet-50 / ResNeXt-50: 60.7 / 61.8; iNaturalist 2018: 75.6; Places-LT:
42.4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf.checks import require
from ecl_hf.losses import carried_log_prior, prior_shifts, shifted_cross_entropy, soft_label_losses, spread
from ecl_hf.methods.base import HeadKind, Method, PerImage, Stage, TaskOutputs, Term, mean_over_processes
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.ride import SHARING
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class MDCSSettings(Settings):
    """Of the experts' shares of the prior, and of the consistency between two views."""

    least_power: float = -0.5
    """Power of the class counts in the first expert's cross-entropy."""
    most_power: float = 2.5
    """The same of the last one; the others lie between at equal distances."""
    consistency: float = 0.6
    """Weight of the divergence of the strong view from the weak one."""
    ramp_epochs: int = 20
    """Epochs over which this weight rises."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = f"{self.least_power} and {self.most_power}"
        require(self.least_power <= self.most_power, f"loss.least_power must not exceed loss.most_power, got {limits}")
        require(self.consistency >= 0, f"loss.consistency must not be negative, got {self.consistency}")
        require(self.ramp_epochs >= 1, f"loss.ramp_epochs must be at least 1, got {self.ramp_epochs}")


def consistency(weak: Tensor, strong: Tensor, labels: Tensor) -> Tensor:
    """Divergence of each expert's strong view from its weak one, over the images whose weak view it gets right.

    Args:
        weak: shifted logits of the weak view, [K, B, C]; carry no gradient.
        strong: shifted logits of the strong view, [K, B, C].
        labels: class indices, [B].

    Returns:
        [K]; 0 for an expert that is right nowhere. With several processes, their mean is the divergence of all images.
    """
    weak = weak.detach()
    right = weak.argmax(-1) == labels
    kl = torch.stack([soft_label_losses(own, teacher, 1.0) for own, teacher in zip(strong, weak, strict=True)])
    number = mean_over_processes(right.sum(-1, dtype=kl.dtype))
    return (kl * right).sum(-1) / number.clamp_min(torch.finfo(kl.dtype).tiny)


def ramp(epoch: int, epochs: int) -> float:
    """Weight of the consistency in an epoch counted from 0: `min((epoch + 1) / epochs, 1)`."""
    return min((epoch + 1) / epochs, 1.0)


def mdcs_shifts(class_counts: Tensor, settings: MDCSSettings, num_experts: int) -> Tensor:
    """Added to the logits of the experts: `lambda_k log pi`, for the softmax the same as `log n^lambda_k`; [K, C]."""
    return prior_shifts(class_counts, spread(settings.least_power, settings.most_power, num_experts))


def _supervision(out: TaskOutputs, settings: MDCSSettings) -> PerImage:
    shifts = mdcs_shifts(out.class_counts, settings, len(out.cls_logits))
    (weak,) = out.views
    both = [shifted_cross_entropy(logits, out.labels, shifts).sum(0) for logits in (weak.logits, out.cls_logits)]
    return PerImage(torch.stack(both).mean(0))


def _consistency(out: TaskOutputs, settings: MDCSSettings) -> Tensor:
    shifts = mdcs_shifts(out.class_counts, settings, len(out.cls_logits))[:, None]
    (weak,) = out.views
    return consistency(weak.logits + shifts, out.cls_logits + shifts, out.labels).sum()


def _weight(out: TaskOutputs, settings: MDCSSettings) -> float:
    return settings.consistency * ramp(out.time.epoch, settings.ramp_epochs)


def _carried(class_counts: Tensor, settings: MDCSSettings, num_experts: int) -> Tensor:
    return carried_log_prior(class_counts, mdcs_shifts(class_counts, settings, num_experts))


SUPERVISION = Term("supervision", _supervision)
CONSISTENCY = Term("consistency", _consistency, _weight, whole_batch=True, across_processes=True)

METHODS = {
    "mdcs": Method(
        (Stage((SUPERVISION, CONSISTENCY), views=("rotated",), heads=unit_rows),),
        MDCSSettings,
        head=HeadKind("cosine", scale=30.0, bias=False),
        experts=SHARING,
        logit_prior=_carried,
    )
}
