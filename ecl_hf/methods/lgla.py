"""LGLA: experts for regions of the class counts, and one for the tail (Tao et al., ICCV 2023).

Read: Tao0-0/LGLA@0d72bdb model/loss.py 246-400. The classes are cut into K - 1 regions that hold about the same number
of images. Expert k discriminates within region k, for it knows the prior there and takes the highest for all other
classes; the last one takes the prior `tau` times. Images whose angle to their class is above the mean of the batch's
images of the same region count more; the batch is that of all processes, and micro-batches are refused. The losses are
summed over the experts; heads are cosines without a bias.

Departures, only where the code would leave a region empty or make too few: the most frequent classes always have a
region of their own, and fewer different counts than regions are refused.

Published: the repository shows no numbers, and the paper's could not be read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ecl_hf.losses import carried_log_prior, cross_entropies, full_precision, log_class_prior
from ecl_hf.methods.base import (
    Experts,
    HeadKind,
    Method,
    Part,
    PartsContext,
    PerImage,
    Stage,
    TaskOutputs,
    Term,
    mean_over_processes,
)
from ecl_hf.methods.ldam import unit_rows
from ecl_hf.methods.ride import all_but_two_stages
from ecl_hf.methods.settings import Settings


@dataclass(kw_only=True)
class LGLASettings(Settings):
    """Of the last expert."""

    tau: float = 2.5
    """Strength of the class prior for the last expert; published 3 for CIFAR-10 and iNaturalist, 2.8 for ImageNet."""


def count_regions(class_counts: Tensor, num_regions: int) -> Tensor:
    """Cut the classes by their counts into regions of about equally many images.

    Going up from the rarest class, a region closes with the count that takes it beyond its share of all images, or that
    leaves just one for each further region. Classes with the same count stay together.

    Args:
        class_counts: training images of each class, [C].
        num_regions: R.

    Returns:
        Which class lies in which region, the frequent classes first, boolean [R, C].

    Raises:
        ValueError: there are fewer different counts than regions.
    """
    different, classes = class_counts.unique(return_counts=True)
    if len(different) < num_regions:
        raise ValueError(
            f"the class counts have {len(different)} different values, and can't be cut into {num_regions} regions; "
            "take fewer experts, or a data set with a tail"
        )
    limits, images = [0], 0
    for position, (count, number) in enumerate(zip(different.tolist(), classes.tolist(), strict=True), 1):
        images += count * number
        left, further = len(different) - position, num_regions - len(limits)
        if left == further or (further and images > class_counts.sum() // num_regions):
            limits.append(count)
            images = 0
    bounds = zip(reversed(limits[:-1]), reversed(limits[1:]), strict=True)
    return torch.stack([(class_counts > low) & (class_counts <= high) for low, high in bounds])


def lgla_shifts(class_counts: Tensor, regions: Tensor, tau: float) -> Tensor:
    """Added to the logits of the K experts.

    Args:
        class_counts: training images of each class, [C].
        regions: of the first K - 1 experts, boolean [K - 1, C].
        tau: strength of the prior for the last expert.

    Returns:
        [K, C].
    """
    log_prior = log_class_prior(class_counts)
    return torch.cat([torch.where(regions, log_prior, log_prior.max()), tau * log_prior[None]])


@torch.no_grad()
def angle_weights(label_logits: Tensor, groups: Tensor, num_groups: int, scale: float) -> Tensor:
    """Weights of images by how far they are from their class, `1 + max(0, angle - mean angle of their region)`.

    Args:
        label_logits: `scale * cos(angle)` of each image to its label, [K, B].
        groups: region of each image's label, [B].
        num_groups: regions.
        scale: of the cosine heads.

    Returns:
        At least 1, without gradient, [K, B].
    """
    (label_logits,) = full_precision(label_logits)
    angles = (label_logits / scale).clamp(-1, 1).arccos()
    region = F.one_hot(groups, num_groups).to(angles.dtype)
    number = mean_over_processes(region.sum(0)).clamp_min(torch.finfo(angles.dtype).tiny)
    return 1 + (angles - (mean_over_processes(angles @ region) / number)[:, groups]).clamp_min(0)


class Regions(Part):
    """What follows from the class counts: the experts' shifts [K, C], and the region of each class [C]."""

    def __init__(self, context: PartsContext) -> None:
        super().__init__()
        regions = count_regions(context.class_counts, len(context.model.experts) - 1)
        self.register_buffer("shifts", lgla_shifts(context.class_counts.float(), regions, context.settings.tau))
        self.register_buffer("region", regions.int().argmax(0))


def _supervision(out: TaskOutputs, settings: LGLASettings) -> PerImage:  # noqa: ARG001
    regions: Regions = out.parts["supervision"]
    own = out.cls_logits.gather(-1, out.labels.expand(out.cls_logits.shape[:-1])[..., None])[..., 0]
    weights = angle_weights(own, regions.region[out.labels], len(regions.shifts) - 1, out.heads[0].scale)
    return PerImage((weights * cross_entropies(out.cls_logits, out.labels, regions.shifts[:, None])).sum(0))


def _carried(class_counts: Tensor, settings: LGLASettings, num_experts: int) -> Tensor:
    shifts = lgla_shifts(class_counts, count_regions(class_counts, num_experts - 1), settings.tau)
    return carried_log_prior(class_counts, shifts)


SUPERVISION = Term("supervision", _supervision, part=Regions, whole_batch=True, across_processes=True)

METHODS = {
    "lgla": Method(
        (Stage((SUPERVISION,), heads=unit_rows),),
        LGLASettings,
        head=HeadKind("cosine", scale=30.0, bias=False),
        experts=Experts(3, least=2, shared=all_but_two_stages),
        logit_prior=_carried,
    )
}
