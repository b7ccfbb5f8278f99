"""LGLA: experts for regions of the class counts, and one for the tail (Tao et al., ICCV 2023).

Read: Tao0-0/LGLA@0d72bdb model/loss.py 246-400. The classes are cut into K - 1 regions that hold about the same number
of images. Expert k discriminates within region k, for it knows the prior there and takes the highest for all other
classes; the last one takes the prior `tau` times. Images whose angle to their class is above the mean of the batch's
images of the same region count more. The losses are summed over the experts; heads are cosines without a bias.

Departures, only where the code would leave a region empty or make too few: the most frequent classes always have a
region of their own, and fewer different counts than regions are refused.

Published: the repository shows no numbers, and the paper's could not be read.
"""

import torch
from torch import Tensor

from ecl_hf.losses import full_precision, log_class_prior


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
def angle_weights(label_logits: Tensor, groups: Tensor, scale: float) -> Tensor:
    """Weights of images by how far they are from their class, `1 + max(0, angle - mean angle of their region)`.

    Args:
        label_logits: `scale * cos(angle)` of each image to its label, [K, B].
        groups: region of each image's label, [B].
        scale: of the cosine heads.

    Returns:
        At least 1, without gradient, [K, B].
    """
    (label_logits,) = full_precision(label_logits)
    angles = (label_logits / scale).clamp(-1, 1).arccos()
    same = (groups[:, None] == groups).to(angles.dtype)
    return 1 + (angles - angles @ same / same.sum(0)).clamp_min(0)
