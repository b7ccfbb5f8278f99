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
    """Top-1 accuracy over all images, over all classes, and over those of each shot group.

    Args:
        predictions: predicted classes, [N].
        labels: true classes, [N].
        class_counts: training images of each class, [C].

    Returns:
        Fractions in 0..1, None where there is no image. "overall": share of the images that are right. "balanced": mean
        of the classes' accuracies; "many", "medium", "few": the same over the classes of a shot group. Classes without
        images are left out of the means.

    Raises:
        ValueError: predictions and labels differ in shape.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {list(predictions.shape)} and labels {list(labels.shape)} differ in shape")
    accuracy = class_accuracy(predictions, labels, len(class_counts))
    tested = ~accuracy.isnan()
    masks = {"balanced": torch.ones_like(tested)}
    masks |= {name: group.to(tested.device) for name, group in shot_groups(class_counts).items()}
    means = {
        name: accuracy[mask & tested].mean().item() if (mask & tested).any() else None for name, mask in masks.items()
    }
    return {"overall": (predictions == labels).double().mean().item() if len(labels) else None, **means}


def class_f1(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """F1 of each class, the harmonic mean of precision and recall, [N], [N] -> [C], float64; NaN without image."""
    images = torch.bincount(labels, minlength=num_classes)
    hits = torch.bincount(labels[predictions == labels], minlength=num_classes).double()
    f1 = 2 * hits / (images + torch.bincount(predictions, minlength=num_classes))
    return f1.masked_fill(images == 0, torch.nan)


def macro_f1(predictions: Tensor, labels: Tensor, num_classes: int) -> float | None:
    """Mean over the classes with images of their F1, the harmonic mean of precision and recall.

    A class that is never predicted has F1 0. Images that are wrongly given a class without images lower the recall of
    their own classes.

    Args:
        predictions: [N].
        labels: [N].
        num_classes: C.

    Returns:
        A fraction in 0..1; None without images.
    """
    if not len(labels):
        return None
    return class_f1(predictions, labels, num_classes).nanmean().item()


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


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 5) -> float | None:
    """Share of the images whose class is among the k largest logits; None where that is no achievement (C <= k).

    Args:
        logits: [N, C].
        labels: [N].
        k: classes that may be named.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    if logits.shape[-1] <= k:
        return None
    return multiclass_accuracy(logits, labels, num_classes=logits.shape[-1], average="micro", top_k=k).item()


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Images of each true class (row) that were given each class (column), [N], [N] -> [C, C], int64."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predictions, labels, num_classes=num_classes)


def class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Accuracy of each class, [N], [N] -> [C], float64; NaN for a class without image."""
    hits = torch.bincount(labels[predictions == labels], minlength=num_classes)
    return hits.double() / torch.bincount(labels, minlength=num_classes)


def reliability_table(probabilities: Tensor, labels: Tensor, num_bins: int = 15) -> dict[str, list[float | None]]:
    """The bins behind `expected_calibration_error` (Fig. 9).

    Args:
        probabilities: rows that sum to one, [N, C].
        labels: [N].
        num_bins: equal-width bins on 0..1 of the largest probability; an inner edge belongs to the bin above it.

    Returns:
        For each bin its `share` of the images, and their mean `confidence` and `accuracy`, None where it is empty.
    """
    confidence, predictions = probabilities.double().max(-1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=num_bins - 1)
    size = torch.bincount(bins, minlength=num_bins)

    def mean(values: Tensor) -> list[float | None]:
        total = torch.zeros_like(edges[1:]).index_add_(0, bins, values.double())
        return [(t / n).item() if n else None for t, n in zip(total, size, strict=True)]

    share = (size.double() / len(labels)).tolist()
    return {"share": share, "confidence": mean(confidence), "accuracy": mean(predictions == labels)}
