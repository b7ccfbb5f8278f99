"""From a model and a test loader to the numbers that are reported."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecl_hf.metrics import expected_calibration_error, group_accuracy


@dataclass(frozen=True)
class Predictions:
    """Raw logits of a test set, on the CPU.

    Attributes:
        labels: [N].
        expert_logits: [N, K, C].
        flipped_logits: the same of the mirrored images, [N, K, C].
    """

    labels: Tensor
    expert_logits: Tensor
    flipped_logits: Tensor


@torch.no_grad()
def predict(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], gather: Callable[[Any], Any] = lambda tensors: tensors
) -> Predictions:
    """Run the ensemble over a test set, each image as it is and mirrored.

    Args:
        model: returns `expert_logits`, [B, K, C]; its mode is restored afterwards.
        batches: dictionaries with `pixel_values` [B, 3, H, W] and `labels` [B], on the model's device.
        gather: joins tensors of all processes without the padding (`Accelerator.gather_for_metrics`).
    """
    was_training = model.training
    model.eval()
    parts = []
    for batch in batches:
        pixel_values = batch["pixel_values"]
        logits = model(pixel_values).expert_logits.float()
        flipped = model(pixel_values.flip(-1)).expert_logits.float()
        parts.append([tensor.cpu() for tensor in gather((batch["labels"], logits, flipped))])
    model.train(was_training)
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def score(logits: Tensor, labels: Tensor, class_counts: list[int]) -> dict[str, float | None]:
    """Top-1, accuracy of the shot groups (None where a group is empty) and ECE of [N, C] logits; fractions in 0..1."""
    accuracy = group_accuracy(logits.argmax(-1), labels, class_counts)
    ece = expected_calibration_error(logits.double().softmax(-1), labels)
    return {"top1": accuracy.pop("overall"), **accuracy, "ece": ece}


def summarise(predictions: Predictions, class_counts: list[int]) -> dict[str, Any]:
    """Scores of the ensemble, each expert and their mean, without and with test-time flip.

    Test-time flip is the mean of the logits of an image and its mirror image.

    Returns:
        `{"plain" | "flip": {"ensemble": score, "experts": [score] * K, "expert_mean": score}}`.
    """
    both = (predictions.expert_logits + predictions.flipped_logits) / 2
    summary = {}
    for name, logits in (("plain", predictions.expert_logits), ("flip", both)):
        experts = [score(expert, predictions.labels, class_counts) for expert in logits.unbind(1)]
        mean = {
            key: None if experts[0][key] is None else sum(expert[key] for expert in experts) / len(experts)
            for key in experts[0]
        }
        ensemble = score(logits.mean(1), predictions.labels, class_counts)
        summary[name] = {"ensemble": ensemble, "experts": experts, "expert_mean": mean}
    return summary


def format_table(summary: dict[str, Any]) -> str:
    """A short text table of one entry of `summarise`, in percent."""
    rows = [("ensemble", summary["ensemble"])] if len(summary["experts"]) > 1 else []
    rows += [(f"expert {k}", expert) for k, expert in enumerate(summary["experts"])]
    columns = ("top1", "many", "medium", "few", "ece")
    lines = [f"{'':10}" + "".join(f"{name:>8}" for name in columns)]
    for name, row in rows:
        cells = ("none" if row[key] is None else f"{100 * row[key]:.1f}" for key in columns)
        lines.append(f"{name:10}" + "".join(f"{cell:>8}" for cell in cells))
    return "\n".join(lines)
