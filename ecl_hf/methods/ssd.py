"""SSD: self-supervision to distillation for long-tailed recognition (Li, Wang, Wu, ICCV 2021).

`ssd_teacher` trains an encoder with cross-entropy and a contrastive task, and then its head's scales on balanced
batches (stages I and II); `ssd` trains a new one from the labels and from that teacher's probabilities, with one head
for each (III), and then scales the head of the second (IV). The model is that with the soft labels' head.

Read: MCG-NJU/SSD-LT@5eaa1db (SSD_LT/builder.py, ssd_stage_i.py, ssd_stage_ii.py, ssd_stage_iii.py,
models/tau_norm_classifier.py, loader.py). Readings: frozen encoders are in evaluation mode (published: their BatchNorm
keeps counting, in the teacher as well); stage IV scales the soft head (the published loader would take the other); an
empty slot of the queue is of no class (published: of class 0); the settings for CIFAR-LT, which the code does not have.

Published: CIFAR-100-LT 62.3, 50.5 and 46.0 for imbalance 10, 50 and 100; ImageNet-LT 56.0 (ResNeXt-50, 135 epochs; 55.4
without stage IV); iNaturalist 2018 71.5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.data.samplers import class_aware
from ecl_hf.methods.base import Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.decoupling import ONE_LINEAR, SCALES_ALONE, FrozenEncoderSettings, with_scales
from ecl_hf.methods.settings import MomentumSettings
from ecl_hf.methods.terms import CROSS_ENTROPY


@dataclass(kw_only=True)
class ScalesSettings(FrozenEncoderSettings):
    """Of a stage that trains the head's scales."""

    shift_statistics: bool = False
    """Let the BatchNorm statistics of the frozen encoder follow the balanced batches, as published."""


@dataclass(kw_only=True)
class SSDTeacherSettings(MomentumSettings, ScalesSettings):
    """Of the teacher: the contrastive task, then the scales."""

    contrast_temperature: float = 0.2
    """Temperature of the contrastive loss."""
    queue_size: int = 10752
    """Keys in the queue: the most that are a multiple of the batch and no more than the pictures of CIFAR-100-LT.
    Published for ImageNet-LT: 115712."""
    projection_dim: int = 128
    """Width of the contrastive projections."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.contrast_temperature > 0,
            f"loss.contrast_temperature must be positive, got {self.contrast_temperature}",
        )


@dataclass(kw_only=True)
class SSDSettings(ScalesSettings):
    """Of the student: the distillation, then the scales."""

    temperature: float = 2.0
    """Temperature of the teacher's and the student's probabilities."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"loss.temperature must be positive, got {self.temperature}")


def other_class_contrast(
    query: Tensor, key: Tensor, queue: Tensor, labels: Tensor, queue_labels: Tensor, temperature: float
) -> Tensor:
    """Contrastive loss whose negatives are the keys of other classes alone: nothing pushes a class apart.

    Args:
        query: L2-normalised projections, [B, P].
        key: L2-normalised keys of the second view, [B, P]; carries no gradient.
        queue: keys of earlier batches, [Q, P]; carries no gradient.
        labels: class indices, [B].
        queue_labels: of the queue's keys, [Q].
        temperature: of the similarities.

    Returns:
        [B]; 0 where the queue has no key of another class.
    """
    similarities = losses.key_similarities(query, key, queue) / temperature
    others = ~losses.same_class(labels, queue_labels)
    own = torch.ones_like(others[:, :1])
    candidates = torch.cat([own, others], dim=1)
    return losses.contrast(similarities, torch.cat([own, torch.zeros_like(others)], dim=1), candidates)


def _contrast(out: TaskOutputs, settings: SSDTeacherSettings) -> PerImage:
    keys = out.keys[0], out.queues[0]
    temperature = settings.contrast_temperature
    return PerImage(other_class_contrast(out.queries[0], *keys, out.labels, out.queue_labels, temperature))


def _hard(out: TaskOutputs, _: SSDSettings) -> PerImage:
    return PerImage(losses.cross_entropies(out.ref_logits[0], out.labels))


def _soft(out: TaskOutputs, settings: SSDSettings) -> PerImage:
    return PerImage(losses.soft_label_losses(out.cls_logits[0], out.teacher.logits.mean(0), settings.temperature))


CONTRAST = Term("contrast", _contrast, needs=frozenset({"momentum"}))
HARD = Term("hard_labels", _hard, needs=frozenset({"reference"}))
SOFT = Term("soft_labels", _soft, needs=frozenset({"teacher"}))
SHARE = 135 / 140
"""Of the epochs, for the encoder; the rest is for the scales."""
SCALES = Stage((CROSS_ENTROPY,), "scales", class_aware(2), trains=SCALES_ALONE, heads=with_scales, share=1 - SHARE)

METHODS = {
    "ssd_teacher": Method(
        (Stage((CROSS_ENTROPY, CONTRAST), "representation", share=SHARE), SCALES), SSDTeacherSettings, **ONE_LINEAR
    ),
    "ssd": Method(
        (Stage((HARD, SOFT), "distillation", share=SHARE), SCALES), SSDSettings, teacher="ssd_teacher", **ONE_LINEAR
    ),
}
