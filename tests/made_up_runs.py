"""A run folder as train.py and evaluate.py leave it, from random numbers: for tests of what reads it."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ecl_hf.evidence.analysis import pairwise_feature_distance, posthoc_accuracy, sample_features, shifted_accuracy
from ecl_hf.evidence.classes import class_rows, mistakes, thumbnail
from ecl_hf.evidence.evaluation import Predictions, summarise
from ecl_hf.evidence.metrics import class_accuracy, confusion_matrix, reliability_table

MACHINE = {"platform": "a machine", "device": "cpu", "processes": 1, "threads_per_process": 1}


def class_tables(logits: torch.Tensor, labels: torch.Tensor, counts: list[int]) -> dict:
    """Each class and the mistakes, with pictures in one colour."""
    rows = class_rows(logits, labels, counts, torch.ones(len(counts)))
    sizes = [(8, 8), (640, 480), (300, 900)]

    def picture(i: int) -> str:
        return thumbnail(Image.new("RGB", sizes[i % 3], (20 * i % 255, 90, 200 - 2 * i)))

    return {"classes": rows, **mistakes(logits, labels, rows, picture)}


def make_run(folder: Path, seed: int = 0, experts: int = 3, landscape: bool = True) -> Path:
    """Write results.json, metrics.jsonl, evaluation.json and .npz of a made-up run on ten classes."""
    torch.manual_seed(seed)
    counts = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    labels = torch.arange(10).repeat_interleave(8)
    logits = torch.randn(80, experts, 10) + 2 * F.one_hot(labels, 10)[:, None]
    features = torch.randn(80, experts, 6) + F.one_hot(labels, 10)[:, None, :6]
    predictions = Predictions(labels, logits, logits + 0.1 * torch.randn_like(logits), features)
    ensemble = logits.mean(1)
    shared = {
        "test": summarise(predictions, counts),
        "test_images": 80,
        "class_counts": counts,
        "class_names": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "<truck>"],
        **{"parameters": 1000, "macs": 2000, "commit": "abc", "versions": {"torch": "1"}, "machine": MACHINE},
    }
    evaluation = {
        **shared,
        **{"model": "somewhere/model", "images_per_second": 10.0, "landscape_images": 4, "logit_prior": "uniform"},
        "reliability": {"plain": {"ensemble": reliability_table(ensemble.softmax(-1), labels)}},
        "posthoc": posthoc_accuracy(logits, logits.mean(1), labels, counts, [-1, 0.0, 1.0]),
        **class_tables(ensemble, labels, counts),
        "shifted": shifted_accuracy(ensemble, labels, counts, [1] * 10),
    }
    arrays = {
        "class_accuracy_plain": class_accuracy(ensemble.argmax(-1), labels, 10)[None].numpy(),
        "confusion": confusion_matrix(ensemble.argmax(-1), labels, 10).numpy(),
        "feature_distance": pairwise_feature_distance(features, labels, 10).numpy(),
        "transfer_value": np.random.default_rng(seed).random(10),
        **{f"sampled_{name}": values for name, values in sample_features(features[:, 0], labels, counts).items()},
    }
    if landscape:
        arrays |= {"landscape_magnitudes": np.linspace(-1, 1, 5)}
        arrays |= {f"landscape_{name}": np.random.default_rng(seed).random((5, 5)) for name in ("loss", "accuracy")}
    folder.mkdir(parents=True)
    recipe = {"epochs": 3, "data": {"horizontal_flip": True}}
    results = {**shared, "method": "ecl", "seed": seed, "epochs": 3, "training_seconds": 60.0, "recipe": recipe}
    (folder / "results.json").write_text(json.dumps(results))
    lines = [{"epoch": e, "loss": 3.0 / e, "supervision": 2.0 / e, "lr": 0.1, "val/top1": 0.2} for e in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    np.savez(folder / "evaluation.npz", **arrays)
    return folder
