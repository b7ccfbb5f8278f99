"""What each class gets: its scores as a table, the classes that fare worst, and which are taken for which."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ecl_hf.evidence.metrics import class_accuracy, class_f1
from ecl_hf.evidence.tables import as_csv
from ecl_hf.heads import log_prior_shift

SHOWN, PICTURES = 8, 4
"""Classes and pairs of classes that are shown, and pictures of each."""

SIDE = 96
"""Pixels of the longer side of a small picture; as a JPEG it takes less than 10 kB."""


def class_rows(
    logits: Tensor, labels: Tensor, class_counts: Sequence[int], carried: Tensor
) -> list[dict[str, int | float | None]]:
    """Scores of each class, in label order.

    Args:
        logits: of the ensemble as they are, [N, C].
        labels: [N].
        class_counts: training images of each class, [C].
        carried: class weights of the prior that the logits carry, [C].

    Returns:
        For each class `training_images`, `test_images`, `accuracy` and `f1`, and the same two of logits that are
        moved to the class frequencies of the training set; fractions in 0..1, None without test images.
    """
    shift = log_prior_shift(carried, torch.as_tensor(class_counts).clamp_min(1))
    images = labels.bincount(minlength=len(class_counts)).tolist()
    columns = {"training_images": list(class_counts), "test_images": images}
    for ending, moved in (("", logits), ("_training_prior", logits - shift)):
        predictions = moved.argmax(-1)
        for name, score in (("accuracy", class_accuracy), ("f1", class_f1)):
            values = score(predictions, labels, len(class_counts)).tolist()
            columns[name + ending] = [v if n else None for v, n in zip(values, images, strict=True)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def classes_csv(rows: Sequence[dict[str, int | float | None]], class_names: Sequence[str]) -> str:
    """`class_rows` with the names of the classes as CSV; the worst class comes first, untested ones last."""
    return as_csv(
        [
            {"class": class_names[c]} | {key: _cell(value) for key, value in rows[c].items()}
            for c in ranked_classes(rows)
        ]
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def ranked_classes(rows: Sequence[dict[str, int | float | None]]) -> list[int]:
    """Classes from the worst to the best accuracy; of equal ones first that with more test images, untested ones last.

    Args:
        rows: of `class_rows`.
    """
    return sorted(
        range(len(rows)),
        key=lambda c: (rows[c]["accuracy"] is None, rows[c]["accuracy"] or 0.0, -rows[c]["test_images"]),
    )


def confused_pairs(predictions: Tensor, labels: Tensor, num_classes: int, most: int = SHOWN) -> list[tuple[int, ...]]:
    """The pairs (true class, predicted class, images) that are confused most often, [N], [N] -> at most `most`."""
    wrong = predictions != labels
    pairs, images = (labels * num_classes + predictions)[wrong].unique(return_counts=True)
    order = images.argsort(descending=True, stable=True)[:most]
    return [(*divmod(pairs[i].item(), num_classes), images[i].item()) for i in order]


def mistakes(
    logits: Tensor, labels: Tensor, rows: Sequence[dict[str, int | float | None]], picture: Callable[[int], str | None]
) -> dict[str, list[dict[str, Any]]]:
    """The worst classes and the most confused pairs, with small pictures of the most confident mistakes.

    Args:
        logits: [N, C].
        labels: [N].
        rows: of `class_rows`.
        picture: makes a `thumbnail` of the test image at a position in N; None where that is not possible.

    Returns:
        `worst`: for up to `SHOWN` classes that are not always right `class`, `right`, `images` and `pictures`;
        `confused`: for as many pairs `class`, `predicted`, `images`, `of` (test images of the class) and `pictures`.
        Each of up to `PICTURES` pictures has `predicted`, `confidence` (0..1) and `src`.
    """
    confidence, predictions = logits.double().softmax(-1).max(-1)
    wrong = predictions != labels

    def shown(mask: Tensor) -> list[dict[str, Any]]:
        places = mask.nonzero()[:, 0]
        places = places[confidence[places].argsort(descending=True, stable=True)][:PICTURES].tolist()
        found = [
            {"predicted": predictions[i].item(), "confidence": confidence[i].item(), "src": picture(i)} for i in places
        ]
        return [entry for entry in found if entry["src"]]

    worst = [c for c in ranked_classes(rows) if rows[c]["accuracy"] is not None and rows[c]["accuracy"] < 1][:SHOWN]
    images = [row["test_images"] for row in rows]
    return {
        "worst": [
            {
                **{"class": c, "right": images[c] - int(wrong[labels == c].sum()), "images": images[c]},
                "pictures": shown(wrong & (labels == c)),
            }
            for c in worst
        ],
        "confused": [
            {
                **{"class": c, "predicted": other, "images": number, "of": images[c]},
                "pictures": shown((labels == c) & (predictions == other)),
            }
            for c, other, number in confused_pairs(predictions, labels, len(rows))
        ],
    }


def thumbnail(image: Image.Image) -> str:
    """A small RGB picture as the address of an image on a page; nothing but the pixels goes in."""
    small = Image.new("RGB", image.size)
    small.paste(image)
    small.thumbnail((SIDE, SIDE))
    buffer, kind = io.BytesIO(), "png" if max(small.size) <= SIDE // 3 else "jpeg"
    small.save(buffer, kind, **({} if kind == "png" else {"quality": 75}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
