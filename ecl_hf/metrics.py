"""What is reported: accuracy by shot group, calibration, agreement of the experts' features (Sec. VI-B)."""

from collections.abc import Sequence

import torch
from torch import Tensor

MANY_ABOVE = 100
FEW_BELOW = 20


def shot_groups(class_counts: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Many (> 100), medium (20 to 100) and few (< 20) shot classes by their training images (Sec. VI-B).

    Args:
        class_counts: [C].

    Returns:
        A boolean mask [C] for each of "many", "medium", "few".
    """
    counts = torch.as_tensor(class_counts)
    many, few = counts > MANY_ABOVE, counts < FEW_BELOW
    return {"many": many, "medium": ~many & ~few, "few": few}


def group_accuracy(
    predictions: Tensor, labels: Tensor, class_counts: Sequence[int] | Tensor
) -> dict[str, float | None]:
    """Top-1 accuracy over all images and over those of each shot group.

    Args:
        predictions: predicted classes, [N].
        labels: true classes, [N].
        class_counts: training images of each class, [C].

    Returns:
        Fractions in 0..1 for "overall", "many", "medium", "few"; None where there is no image.

    Raises:
        ValueError: predictions and labels differ in shape.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {list(predictions.shape)} and labels {list(labels.shape)} differ in shape")
    correct = predictions == labels
    masks = {"overall": torch.ones_like(labels, dtype=torch.bool)}
    masks |= {name: group.to(labels.device)[labels] for name, group in shot_groups(class_counts).items()}
    return {name: correct[mask].double().mean().item() if mask.any() else None for name, mask in masks.items()}


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    """Expected calibration error (Eq. 13): equal-width bins on the largest probability.

    Reading: the standard binned form, sum over bins of their share times |accuracy - mean confidence|.

    Args:
        probabilities: rows that sum to one, [N, C].
        labels: [N].
        num_bins: bins on 0..1.

    Returns:
        A number in 0..1.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, predictions = probabilities.double().max(-1)
    # torchmetrics opens one more bin for a confidence of exactly 1, which belongs to the last one.
    confidence = confidence.clamp(max=1 - torch.finfo(torch.float64).eps)
    return binary_calibration_error(confidence, (predictions == labels).long(), n_bins=num_bins, norm="l1").item()


def feature_distance(features_a: Tensor, features_b: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class-wise mean L2 distance of two experts' features of the same images (Eq. 12).

    Args:
        features_a: raw features of one expert, [N, D].
        features_b: raw features of another, [N, D].
        labels: [N].
        num_classes: C.

    Returns:
        [C]; NaN for a class without image.
    """
    distance = (features_a - features_b).norm(dim=-1)
    total = distance.new_zeros(num_classes).index_add_(0, labels, distance)
    return total / torch.bincount(labels, minlength=num_classes)
