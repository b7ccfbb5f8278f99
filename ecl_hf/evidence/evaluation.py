"""From a model and a test loader to the numbers that are reported."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecl_hf.aggregation import combine
from ecl_hf.evidence.metrics import expected_calibration_error, group_accuracy, macro_f1, topk_accuracy
from ecl_hf.heads import log_prior_shift


@dataclass(frozen=True)
class Predictions:
    """Raw logits of a test set, on the CPU.

    Attributes:
        labels: [N].
        expert_logits: [N, K, C].
        flipped_logits: the same of the mirrored images, [N, K, C].
        features: pooled backbone features of the images as they are, [N, K, D], when asked for.
        combined: logits of the ensemble without and with test-time flip, [N, 2, C]; means over the experts when None.
        left_out: positions in the test set of images that could not be decoded; they are none of the N.
    """

    labels: Tensor
    expert_logits: Tensor
    flipped_logits: Tensor
    features: Tensor | None = None
    combined: Tensor | None = None
    left_out: tuple[int, ...] = ()

    @property
    def both_logits(self) -> Tensor:
        """Test-time flip: mean of the logits of an image and its mirror image, [N, K, C]."""
        return (self.expert_logits + self.flipped_logits) / 2

    @property
    def ensemble_logits(self) -> Tensor:
        """Logits of the ensemble for the images as they are, [N, C]."""
        return self.expert_logits.mean(1) if self.combined is None else self.combined[:, 0]

    @property
    def ways(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Logits of ensemble [N, C] and experts [N, K, C], without and with test-time flip."""
        both = self.both_logits
        flip = both.mean(1) if self.combined is None else self.combined[:, 1]
        return {"plain": (self.ensemble_logits, self.expert_logits), "flip": (flip, both)}


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    gather: Callable[[Any], Any] = lambda tensors: tensors,
    with_features: bool = False,
    with_flip: bool = True,
) -> Predictions:
    """Run the ensemble over a test set, each image as it is and mirrored.

    Args:
        model: returns `expert_logits`, [B, K, C], `expert_weights`, and if asked `features`, [B, K, D]; its mode is
            restored afterwards.
        batches: dictionaries with `pixel_values` [B, 3, H, W] and `labels` [B], on the model's device; an image whose
            label is -1 is left out. Where a model takes something else for images, `mirrored_pixel_values` are those
            of the mirrored ones.
        gather: joins tensors of all processes without the padding (`Accelerator.gather_for_metrics`).
        with_features: keep the features too.
        with_flip: else the mirrored images are not looked at, and `flipped_logits` are those of the images as they are.
    """
    asked = {"output_features": True} if with_features else {}
    was_training = model.training
    model.eval()
    parts = []
    for batch in batches:
        pixel_values = batch["pixel_values"]
        output = model(pixel_values, **asked)
        mirrored = batch.get("mirrored_pixel_values")
        mirrored = pixel_values.flip(-1) if mirrored is None else mirrored
        flipped = model(mirrored).expert_logits if with_flip else output.expert_logits
        part = {
            "labels": batch["labels"],
            "expert_logits": output.expert_logits.float(),
            "flipped_logits": flipped.float(),
        }
        if with_features:
            part["features"] = output.features.float()
        if (weights := output.expert_weights) is not None:
            both = (output.expert_logits + flipped) / 2
            ways = [combine(logits.float(), weights.float()) for logits in (output.expert_logits, both)]
            part["combined"] = torch.stack(ways, dim=1)
        gathered = zip(part, gather(tuple(part.values())), strict=True)
        parts.append({name: tensor.cpu() for name, tensor in gathered})
    model.train(was_training)
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    there = tensors["labels"] >= 0
    left_out = tuple(torch.nonzero(~there)[:, 0].tolist())
    if left_out:
        tensors = {name: tensor[there] for name, tensor in tensors.items()}
    return Predictions(**tensors, left_out=left_out)


def score(logits: Tensor, labels: Tensor, class_counts: list[int]) -> dict[str, float | None]:
    """Scores of [N, C] logits as fractions in 0..1; None where there is nothing to measure.

    Returns:
        `top1` and `top5` over images (top-5 only above 5 classes), `balanced`, `many`, `medium`, `few` and `macro_f1`
        over classes with images, and `ece`.
    """
    predictions = logits.argmax(-1)
    accuracy = group_accuracy(predictions, labels, class_counts)
    return {
        "top1": accuracy.pop("overall"),
        **accuracy,
        "macro_f1": macro_f1(predictions, labels, logits.shape[-1]),
        "ece": expected_calibration_error(logits.double().softmax(-1), labels),
        "top5": topk_accuracy(logits, labels),
    }


def score_for_training_prior(
    predictions: Predictions, class_counts: list[int], carried: Tensor
) -> dict[str, dict[str, float | None]]:
    """Scores of the ensemble when its logits are moved to the class prior of the training set.

    That is what fits a test set as skewed as the training set; the logits as they are fit the prior that they carry.

    Args:
        predictions: of the test set.
        class_counts: training images of each class, [C].
        carried: class weights of the prior that the raw logits carry, [C].

    Returns:
        `{"plain" | "flip": score}`.
    """
    shift = log_prior_shift(carried, torch.tensor(class_counts).clamp_min(1))
    ways = predictions.ways.items()
    return {name: score(logits - shift, predictions.labels, class_counts) for name, (logits, _) in ways}


def summarise(predictions: Predictions, class_counts: list[int]) -> dict[str, Any]:
    """Scores of the ensemble, each expert, their mean and the best of them, without and with test-time flip.

    The best expert is chosen by its top-1 on the very images that are reported, which flatters it; the mean does not.

    Returns:
        `{"plain" | "flip": {"ensemble": score, "experts": [score] * K, "expert_mean": score, "expert_best": score}}`.
    """
    summary = {}
    for name, (combined, logits) in predictions.ways.items():
        experts = [score(expert, predictions.labels, class_counts) for expert in logits.unbind(1)]
        mean = {
            key: None if experts[0][key] is None else sum(expert[key] for expert in experts) / len(experts)
            for key in experts[0]
        }
        ensemble = score(combined, predictions.labels, class_counts)
        best = max(experts, key=lambda expert: expert["top1"])
        summary[name] = {"ensemble": ensemble, "experts": experts, "expert_mean": mean, "expert_best": best}
    return summary


@torch.no_grad()
def measure_speed(model: nn.Module, pixel_values: Tensor, repeats: int = 5) -> float:
    """Images per second of the whole model's forward pass, without loading and flip; its mode is restored afterwards.

    Args:
        model: takes `pixel_values`.
        pixel_values: a batch on the model's device, [B, 3, H, W].
        repeats: timed passes, after one to warm up.
    """
    was_training = model.training
    model.eval()
    model(pixel_values)
    accelerator = torch.accelerator if pixel_values.device.type != "cpu" else None
    if accelerator:
        accelerator.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        model(pixel_values)
    if accelerator:
        accelerator.synchronize()
    seconds = time.perf_counter() - started
    model.train(was_training)
    return repeats * len(pixel_values) / seconds


def percent(score: float | None) -> str:
    """A fraction in percent, with one decimal; "none" where there was nothing to measure."""
    return "none" if score is None else f"{100 * score:.1f}"


def format_table(summary: dict[str, Any]) -> str:
    """A short text table of one entry of `summarise`, in percent."""
    rows = [("ensemble", summary["ensemble"])] if len(summary["experts"]) > 1 else []
    rows += [(f"expert {k}", expert) for k, expert in enumerate(summary["experts"])]
    columns = ("top1", "balanced", "macro_f1", "many", "medium", "few", "ece")
    lines = [f"{'':10}" + "".join(f"{name:>9}" for name in columns)]
    for name, row in rows:
        lines.append(f"{name:10}" + "".join(f"{percent(row.get(key)):>9}" for key in columns))
    return "\n".join(lines)
