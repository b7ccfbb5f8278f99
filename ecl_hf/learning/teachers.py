"""The finished model that a method's student learns from."""

from pathlib import Path

from ecl_hf.modeling_ecl import ECLForImageClassification


def load_teacher(source: str, class_names: list[str], method: str) -> ECLForImageClassification:
    """Load a finished model, frozen and in evaluation mode.

    Args:
        source: run folder, model directory, or Hub repository.
        class_names: of the student, [C]; the teacher must know the same classes in the same order.
        method: what the teacher should have been trained with, for the message.

    Raises:
        ValueError: there is no finished model, or it is for other classes.
    """
    path = Path(source)
    if (path / "recipe.yaml").exists() and not (path / "model" / "config.json").exists():
        raise ValueError(f"model.teacher {source} is a run that is not finished; continue it with --resume")
    place = path / "model" if (path / "model" / "config.json").exists() else source
    try:
        teacher = ECLForImageClassification.from_pretrained(place)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"model.teacher {source} can't be read: {error}; a run of `--method {method}` makes a fitting one"
        ) from error
    names = [teacher.config.id2label[c] for c in range(teacher.config.num_labels)]
    if names != class_names:
        differing = next((pair for pair in zip(names, class_names, strict=False) if pair[0] != pair[1]), None)
        what = f"{differing[0]!r} for {differing[1]!r}" if differing else f"{len(names)} for {len(class_names)}"
        raise ValueError(f"model.teacher {source} was trained for other classes: {what}")
    return teacher.eval().requires_grad_(False)
