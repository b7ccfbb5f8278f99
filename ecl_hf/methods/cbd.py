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

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf import losses


def feature_losses(student: Tensor, teachers: Tensor) -> Tensor:
    """Cosine distance of the student's features from the teachers', `1 - cos(v, [u(t_1) ... u(t_J)])`, u normalising.

    Args:
        student: features v, [B, J * D].
        teachers: features t of the J teachers, [J, B, D]; they carry no gradient.

    Returns:
        [B], in 0..2.
    """
    student, teachers = losses.full_precision(student, teachers.detach())
    targets = F.normalize(teachers, dim=-1).transpose(0, 1).flatten(1)
    return 1 - torch.cosine_similarity(student, targets)
