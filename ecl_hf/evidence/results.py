"""What a run folder says of a finished run, and the short table of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ecl_hf.evidence.evaluation import Predictions, format_table, score_for_training_prior, summarise
from ecl_hf.evidence.metrics import shot_groups
from ecl_hf.runs.folder import Progress, RunFolder, read_results
from ecl_hf.runs.recipe import Recipe


def describe_run(
    recipe: Recipe,
    progress: Progress,
    predictions: Predictions,
    class_counts: list[int],
    class_names: list[str],
    carried: Tensor,
    broken_test_pictures: list[str],
    finished: bool,
) -> dict[str, Any]:
    """The content of `results.json`, but for the model's size and the environment.

    Args:
        recipe: of the run; paths keep their last part, since where they lead is this machine's affair.
        progress: at the end of the run.
        predictions: of the test set.
        class_counts: training images of each class, [C].
        class_names: [C].
        carried: class weights of the prior that the raw logits carry, [C].
        broken_test_pictures: the first ones that could not be decoded.
        finished: whether all epochs were trained.
    """
    recorded, seconds = asdict(recipe), progress.total_seconds + progress.seconds
    places = [("data", key) for key in ("path", "train_list", "test_list", "split")]
    for section, key in (*places, ("model", "teacher"), ("model", "pretrained")):
        place = recorded[section][key]
        if isinstance(place, str | Path) and (section == "data" or Path(place).exists()):
            recorded[section][key] = Path(place).resolve().name
    return {
        "method": recipe.method,
        "seed": recipe.seed,
        "finished": finished,
        "epochs": progress.epoch,
        "steps": progress.step,
        "test": summarise(predictions, class_counts),
        "test_with_training_prior": score_for_training_prior(predictions, class_counts, carried),
        "classes_without_test_images": int((predictions.labels.bincount(minlength=len(class_counts)) == 0).sum()),
        "test_images": len(predictions.labels),
        "broken_pictures": {
            "train": len(progress.broken),
            "test": len(predictions.left_out),
            "first": progress.broken[:10] + broken_test_pictures,
        },
        "skipped_steps": progress.skipped,
        "class_counts": class_counts,
        "class_names": class_names,
        "shot_groups": {name: int(mask.sum()) for name, mask in shot_groups(class_counts).items()},
        "training_seconds": seconds,
        "training_images_per_second": progress.step * recipe.batch_size / seconds if seconds else None,
        "feature_seconds": progress.feature_seconds,
        "peak_memory_bytes": progress.peak_memory or None,
        "recipe": recorded,
    }


def report(run: RunFolder) -> str:
    """The short table of a finished run, and where things are."""
    scores = {f"test.{way}.{kind}": dict for way in ("plain", "flip") for kind in ("ensemble", "expert_mean")}
    results = read_results(run.results_file, {"shot_groups": dict, "recipe.data.horizontal_flip": bool, **scores})
    groups = ", ".join(f"{name} {count}" for name, count in results["shot_groups"].items())
    lines = [f"accuracy, macro F1 and calibration error on the test split, in % (classes: {groups})"]
    if absent := results.get("classes_without_test_images"):
        lines.append(f"{absent} classes have no test image and are in no mean over classes")
    lines.append(format_table(results["test"]["plain"]))
    if results["recipe"]["data"]["horizontal_flip"]:
        lines += ["with test-time horizontal flip", format_table(results["test"]["flip"])]
    if adjusted := results.get("test_with_training_prior"):
        top1, balanced = (f"{100 * adjusted['plain'][name]:.1f}" for name in ("top1", "balanced"))
        lines.append(f"adjusted to the class frequencies of the training set: top1 {top1}, balanced {balanced}")
    if run.classes_file.exists():
        lines.append(f"{run.classes_file}: each class, the worst one first")
    lines += [f"{run.results_file}: all numbers", f"{run.model}: the model, for from_pretrained and pipeline"]
    return "\n".join(lines)
