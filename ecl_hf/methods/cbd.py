"""CBD and CBD-ENS: class-balanced distillation (Iscen et al., BMVC 2021).

A student that sees all classes equally often keeps the features of teachers that saw the pictures as they come. With
several teachers (CBD-ENS) the student's features pass a layer of its own that is as wide as theirs together.

Read: google-research/google-research, class_balanced_distillation (train.py, resnet.py, input_pipeline.py, configs).
Its TensorFlow code was not run. Readings: `cbd` has one teacher and no layer (the published `stage_two_cbd` repeats the
configuration of the ensemble); classes are balanced by draws with replacement, whose expectation is that of the
published stream of thinned and repeated pictures; pictures are normalised as everywhere here, not to 0..1.

Published: CBD-ENS with ResNet-50 and four teachers, two of them with more colour jitter, 55.6 on ImageNet-LT (90
epochs) and 73.6 on iNaturalist 2018 (200 epochs); nothing on CIFAR-LT.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf import losses
from ecl_hf.checks import require
from ecl_hf.data.samplers import class_balanced
from ecl_hf.methods.base import Experts, HeadKind, Method, PerImage, Stage, TaskOutputs, Term
from ecl_hf.methods.settings import Settings
from ecl_hf.methods.terms import CROSS_ENTROPY

TEACHERS = 4
"""Of the ensemble that CBD-ENS learns from."""


@dataclass(kw_only=True)
class CBDSettings(Settings):
    """Of class-balanced distillation."""

    alpha: float = 0.4
    """Share of the distillation in the loss; the rest is the cross-entropy's."""
    beta: float = 100.0
    """Factor on the cosine distance, which is small beside a cross-entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"loss.alpha must lie in 0..1, got {self.alpha}")
        require(self.beta >= 0, f"loss.beta must not be negative, got {self.beta}")


def feature_losses(student: Tensor, teachers: Tensor) -> Tensor:
    """Cosine distance of the student's features from the teachers', `1 - cos(v, [u(t_1) ... u(t_J)])`, u normalising.

    Args:
        student: features v, [B, J * D].
        teachers: features t of the J teachers, [J, B, D]; they carry no gradient.

    Returns:
        [B], in 0..2.

    Raises:
        ValueError: the student's features are not as wide as the teachers' together.
    """
    student, teachers = losses.full_precision(student, teachers.detach())
    targets = F.normalize(teachers, dim=-1).transpose(0, 1).flatten(1)
    require(
        student.shape == targets.shape,
        f"the student has {student.shape[-1]} features, and its teacher {len(teachers)} x {teachers.shape[-1]}: "
        "model.teacher must be of the same architecture, with as many experts as the method learns from",
    )
    return 1 - torch.cosine_similarity(student, targets)


def _features(out: TaskOutputs, _: CBDSettings) -> PerImage:
    return PerImage(feature_losses(out.features[0], out.teacher.features))


def _embedded(out: TaskOutputs, _: CBDSettings) -> PerImage:
    (features,) = losses.full_precision(out.features[0])
    return PerImage(feature_losses(out.heads[0].embed(features), out.teacher.features))


def _rest(_: TaskOutputs, settings: CBDSettings) -> float:
    return 1 - settings.alpha


def _weight(_: TaskOutputs, settings: CBDSettings) -> float:
    return settings.alpha * settings.beta


SUPERVISION = replace(CROSS_ENTROPY, weight=_rest)
FEATURES = Term("features", _features, _weight, frozenset({"teacher"}))
EMBEDDED = replace(FEATURES, loss=_embedded)
COSINE = HeadKind("cosine", scale=20.0, bias=False)

METHODS = {
    "cbd_teachers": Method((Stage((CROSS_ENTROPY,)),), head=COSINE, experts=Experts(TEACHERS), logit_prior="train"),
    "cbd": Method(
        (Stage((SUPERVISION, FEATURES), sampler=class_balanced()),),
        CBDSettings,
        head=COSINE,
        experts=Experts(1, most=1),
        teacher="ce",
    ),
    "cbd_ens": Method(
        (Stage((SUPERVISION, EMBEDDED), sampler=class_balanced()),),
        CBDSettings,
        head=replace(COSINE, neck=TEACHERS),
        experts=Experts(1, most=1),
        teacher="cbd_teachers",
    ),
}
