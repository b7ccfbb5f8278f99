"""The run folder: the evidence of a run, read by everything that comes later.

recipe.yaml      the resolved recipe         metrics.jsonl   a line per epoch
model/           the published model         results.json    test metrics of this model
checkpoints/     resumable state             classes.csv     the same of each class, the worst one first
features.safetensors   of a frozen encoder, if heads alone are trained
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from ecl_hf.files import (
    find_damaged,
    read_bytes,
    read_entries,
    read_object,
    replacing,
    synchronise,
    write_checksums,
)
from ecl_hf.modeling_ecl import ECLForImageClassification
from ecl_hf.runs.checkpoints import MOST, discard, find_defect, publish, remove_partial, synchronise_folder
from ecl_hf.runs.interruption import writing
from ecl_hf.runs.locks import FolderLock
from ecl_hf.runs.recipe import Recipe

FREE_TO_CHANGE = (
    *("train.max_steps", "train.checkpoint_every", "train.keep_last", "data.path", "data.num_workers", "model.teacher"),
    *("train.on_nonfinite", "train.timeout", "train.connect_timeout", "data.on_error", "data.train_list"),
    *("data.test_list", "data.split"),
    *("train.gradient_checkpointing", "train.experts_one_by_one"),
    *("hub.push", "hub.repo_id", "hub.private", "hub.every", "hub.license"),
)
"""Recipe keys that may differ when a run is continued."""

MAX_LOG = 1 << 24
"""Bytes of `metrics.jsonl`: ten thousand epochs have less."""

OF_EVERY_LINE = ("epoch", "stage", "step", "images_per_second", "lr")
"""Entries of a line of `metrics.jsonl` beside the losses."""

PACKAGES = ("ecl-hf", "torch", "torchvision", "timm", "transformers", "datasets", "accelerate")


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        stage: position of the running stage.
        epoch: the running epoch of the run, from 0.
        batch: micro-batches of it that are done.
        step: optimiser steps of the whole run.
        seconds: training time of the running epoch.
        total_seconds: training time of the epochs before it.
        commit: of the code that began the run.
        sums: loss terms summed over the running epoch's micro-batches.
        broken: training pictures that could not be decoded, in the whole run: split, row, file and reason.
        skipped: optimiser steps of the whole run that were left out: not finite, or overflown in half precision.
        skipped_before: those of them before the running stage.
        best: the best balanced accuracy on the validation pictures so far, and after which epoch (from 1) it was found.
        mixed_precision: of a CPU that was asked for bfloat16: `bf16`, or `no` where it did not pay; else None.
        peak_memory: largest resident memory of a process so far, in bytes.
        feature_seconds: time in which a frozen encoder looked at the pictures.
        ended: whether the run came to its end before its last epoch, since it did not get better.
        missing: micro-batches of the running epoch that are not in its sums, because their step was left out.
        images: training pictures; None in a checkpoint of an older version, as the next one.
        batch_size: of an optimiser step.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    commit: str | None = None
    sums: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    skipped: int = 0
    skipped_before: int = 0
    missing: int = 0
    best: float | None = None
    best_epoch: int | None = None
    ended: bool = False
    mixed_precision: str | None = None
    peak_memory: int = 0
    feature_seconds: float = 0.0
    images: int | None = None
    batch_size: int | None = None

    @classmethod
    def read(cls, file: Path) -> "Progress":
        """What a checkpoint says; ValueError names the file and the value that can't be."""
        values = read_object(file)
        kinds = {item.name: str(item.type).removeprefix("<class '").removesuffix("'>") for item in fields(cls)}
        if unknown := sorted(values.keys() - kinds.keys()):
            raise ValueError(f"{file} holds {unknown[0]!r}, which this version does not know")
        for name, value in values.items():
            kind = kinds[name]
            listed = {"dict[str, float]": (dict, float), "list[str]": (list, str)}.get(kind)
            if listed:
                inner = list(value.values()) if isinstance(value, dict) else value
                good = isinstance(value, listed[0]) and all(_is_a(item, listed[1].__name__) for item in inner)
            else:
                good = (value is None and kind.endswith("| None")) or _is_a(value, kind.partition(" ")[0])
                good = good and not (isinstance(value, int | float) and value < 0)
            if not good:
                raise ValueError(f"{file}: {name} can't be {repr(value)[:80]}")
        return cls(**values)

    def check(self, stage_epochs: Sequence[int], images: int, batch_size: int, accumulation: int) -> None:
        """See that a run of these sizes can have come so far, or can go on from there; ValueError says why not.

        Args:
            stage_epochs: epochs of each stage.
            images: training pictures.
            batch_size: of an optimiser step.
            accumulation: micro-batches of a step.
        """
        ends = [sum(stage_epochs[:stage]) for stage in range(self.stage, self.stage + 2)]
        if self.stage >= len(stage_epochs) or not ends[0] <= self.epoch <= ends[1] - (self.batch > 0):
            raise ValueError(
                f"stage {self.stage + 1} after {self.epoch} epochs is outside of the recipe's stages, which have "
                f"{', '.join(map(str, stage_epochs))} epochs"
            )
        before = (self.images or images, self.batch_size or batch_size)
        steps = before[0] // before[1]
        done = (self.step - self.epoch * steps) * accumulation
        if self.batch and (before != (images, batch_size) or done != self.batch or self.batch >= steps * accumulation):
            raise ValueError(
                "it stands within an epoch, which another batch size, accumulation or number of pictures can't "
                "continue; let the old recipe come to the end of the epoch"
            )
        if not self.batch and done:
            raise ValueError(f"step {self.step} is not the end of {self.epoch} epochs of {steps} steps")
        if self.skipped > self.step or self.skipped_before > self.skipped or self.missing > self.batch:
            raise ValueError(f"it left out more steps than it took: {self.skipped} of {self.step}")
        if self.sums and (self.missing == self.batch or not self.sums.keys().isdisjoint(OF_EVERY_LINE)):
            raise ValueError(f"its sums can't be those of losses: {', '.join(self.sums)[:80]}")
        if (self.best is None) != (self.best_epoch is None) or not 0 <= (self.best_epoch or 0) <= self.epoch:
            raise ValueError(f"the best score {self.best} can't be that of epoch {self.best_epoch}")

    def counted_anew(self, images: int, batch_size: int) -> "Progress":
        """The same place in a run of these sizes; at the start of an epoch its steps are as many as they have made."""
        step = self.step if self.batch else self.epoch * (images // batch_size)
        return replace(self, step=step, images=images, batch_size=batch_size)

    def updates_since(self, first_step: int) -> int:
        """Optimiser steps that moved the weights in the running stage, which began with this step of the run."""
        return self.step - first_step - (self.skipped - self.skipped_before)

    def line(self, stage: str, lr: float, images_per_batch: int) -> dict[str, float | str]:
        """The epoch's entry in `metrics.jsonl`; epochs count from 1 there."""
        means = {name: value / (self.batch - self.missing) for name, value in self.sums.items()}
        speed = {"images_per_second": self.batch * images_per_batch / self.seconds, "lr": lr}
        return {"epoch": self.epoch + 1, "stage": stage, "step": self.step, **means, **speed}

    def next_epoch(self) -> "Progress":
        """The start of the epoch after this one."""
        seconds = self.total_seconds + self.seconds
        begun = {"epoch": self.epoch + 1, "batch": 0, "seconds": 0.0, "total_seconds": seconds}
        return replace(self, **begun, sums={}, missing=0)

    def next_stage(self) -> "Progress":
        """The start of the stage after this one, at the start of an epoch."""
        return replace(self, stage=self.stage + 1, skipped_before=self.skipped)


def _is_a(value: Any, kind: str) -> bool:
    """Whether a value from JSON is of a type; a float may be whole, but must be finite."""
    if kind == "float":
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value).__name__ == kind


def epoch_line(line: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """An entry of `metrics.jsonl` as a line to read while the training goes on.

    Args:
        line: the entry; scores in 0..1 whose names begin with `val/` are shown in %.
        epochs: of the whole run.
        seconds_left: how long the rest will take.
    """
    place = f"epoch {line['epoch']:{len(str(epochs))}}/{epochs}"
    scores = [
        f"{name} {100 * value:.1f} %" for name, value in line.items() if name.startswith("val/") and value is not None
    ]
    left = timedelta(seconds=round(min(seconds_left, 1e12)))  # more than fits would be an error
    speed = f"{line['images_per_second']:.0f} images/s"
    loss = f"loss {line.get('loss', math.nan):.3f}"
    return "  ".join([place, line["stage"], loss, *scores, f"lr {line['lr']:.2g}", speed, f"{left} left"])


class Forecast:
    """How long a run will take, from its first steps in this process.

    Args:
        steps: to time, after two that warm up.
        seconds: after which three steps are enough.
    """

    def __init__(self, steps: int = 20, seconds: float = 20.0) -> None:
        self.steps, self.seconds = steps, seconds
        self.taken = -2
        self.started = 0.0
        self.told = False

    def step(self, now: float, steps_left: int) -> str | None:
        """Count a step; once, when enough were timed, a sentence if more than a minute is left.

        Args:
            now: a clock, in seconds.
            steps_left: of the whole run.
        """
        self.taken += 1
        if self.taken <= 0:
            self.started = now
        spent = now - self.started
        if self.told or self.taken < 3 or (self.taken < self.steps and spent < self.seconds):
            return None
        self.told = True
        left = round(self.left(now, steps_left))
        return f"the training will take about {timedelta(seconds=left)} (h:mm:ss)" if left > 60 else None

    def left(self, now: float, steps_left: int) -> float:
        """Seconds that the rest will take, at the speed of this process: another machine may have begun the run."""
        return (now - self.started) / max(self.taken, 1) * steps_left


class RunFolder:
    """Paths and files of one run.

    Attributes:
        most: bytes that the files of its model, or of a checkpoint, may have in all.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.most = MOST
        self.recipe_file = self.path / "recipe.yaml"
        self.features_file = self.path / "features.safetensors"
        self.metrics_file = self.path / "metrics.jsonl"
        self.results_file = self.path / "results.json"
        self.classes_file = self.path / "classes.csv"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"
        self.lock = FolderLock(self.path)

    def find_model(self) -> Path:
        """Directory of the published model; FileNotFoundError if there is none.

        `from_pretrained` would take the name of a missing directory for that of a repository.
        """
        if not self.model.is_dir():
            raise FileNotFoundError(f"{self.path} holds no model; is it the folder of a finished run?")
        return self.model

    def expect(self, model: ECLForImageClassification) -> None:
        """Let files of this model have the bytes that they can need, and no more.

        Averages, momentum copies and the optimizer's numbers are a few times the model's, queues less than the rest.
        """
        self.most = (1 << 30) + 16 * sum(tensor.nbytes for tensor in model.state_dict().values())

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained and tested, and the model is as it was written.

        Where it is not, the run can go on from its last checkpoint, and tests and writes the model again.
        """
        return self._said_finished and self.find_damage() is None

    @property
    def _said_finished(self) -> bool:
        try:
            return read_object(self.results_file).get("finished") is True
        except (OSError, ValueError):
            return False

    def find_damage(self) -> str | None:
        """What is wrong with the published model; None if all but its card is as it was written."""
        try:
            damaged = find_damaged(self.model, self.most)
        except (OSError, ValueError) as error:
            return str(error)
        return damaged and f"{self.model / damaged} is damaged"

    def check(self, recipe: Recipe, resume: bool, changed: bool = False) -> None:
        """See that the run can begin here, or with `resume` that it can go on.

        Args:
            recipe: of this run.
            resume: whether to continue the run that is there, if one is.
            changed: whether its recipe may be another one.

        Raises:
            FileExistsError: the folder is in use, or is no folder.
            ValueError: the run was begun, or ended, with another recipe; the message names the keys.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output_dir {self.path} is not a directory")
        if self.recipe_file.exists():
            if not resume:
                raise FileExistsError(f"output_dir {self.path} holds a run already; continue it with --resume")
            if not changed or self._said_finished:
                self._compare(recipe)
        elif self.path.exists() and any(
            # What a process leaves that is killed before the recipe is written counts for nothing, and features may
            # be brought along from another run
            path.name not in (self.lock.file.name, self.features_file.name)
            and not (path.name.startswith(".") and path.suffix == ".partial")
            for path in self.path.iterdir()
        ):
            raise FileExistsError(f"output_dir {self.path} is not empty and holds no run; choose another")

    def open(self, recipe: Recipe, resume: bool = False, changed: bool = False) -> None:
        """Make the folder, lock it, clear away what a killed process left half-written, and write the recipe.

        Raises:
            FileExistsError: another training holds the folder, or did since `check`.
            OSError: it can't be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()
        self.check(recipe, resume, changed)
        remove_partial(self.path)
        remove_partial(self.checkpoints)
        write_atomically(self.recipe_file, yaml.safe_dump(asdict(recipe), sort_keys=False))

    def close(self) -> None:
        """Unlock the folder."""
        self.lock.release()

    def _compare(self, recipe: Recipe) -> None:
        old, new = flatten(asdict(Recipe.from_file(self.recipe_file))), flatten(asdict(recipe))
        changed = [
            f"{key}: {old.get(key)} -> {new.get(key)}"
            for key in sorted(old | new)
            if old.get(key) != new.get(key) and key not in FREE_TO_CHANGE
        ]
        if changed and self._said_finished:
            raise ValueError(
                f"{self.path} is finished, with another recipe: {'; '.join(changed)}; train in another output_dir"
            )
        if changed:
            raise ValueError(
                f"{self.path} was begun with another recipe, can't resume: {'; '.join(changed)}; "
                "--allow_changes goes on with the new one"
            )

    def partial_checkpoint(self, step: int) -> Path:
        """Where the checkpoint of an optimiser step is written before it counts."""
        return self.checkpoints / f".step_{step:08d}.partial"

    @contextmanager
    def writing_checkpoint(self, step: int) -> Iterator[Path]:
        """The folder to write the checkpoint of a step into; if that fails, it is deleted and an OSError says why."""
        partial = self.partial_checkpoint(step)
        try:
            with writing(self.checkpoints):
                yield partial
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def publish_checkpoint(self, progress: Progress, keep_last: int) -> None:
        """Make a completely written checkpoint count, and delete old ones."""
        partial = self.partial_checkpoint(progress.step)
        (partial / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
        target = self._checkpoint(progress.step)
        publish(partial, target)
        found = sorted(self.checkpoints.glob("step_*"))
        kept = [path for path in found if path <= target][-keep_last:]
        for old in set(found) - set(kept):  # later ones are damaged: the run would have gone on from them
            discard(old)

    def _checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    @staticmethod
    def read_progress(checkpoint: Path) -> Progress:
        """How far a checkpoint's run had come."""
        return Progress.read(checkpoint / "progress.json")

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the latest step."""
        return max(self.checkpoints.glob("step_*"), default=None)

    def resumable_checkpoint(self, say: Callable[[str], None] | None = None) -> Path | None:
        """The newest undamaged checkpoint; None if there is none at all.

        Args:
            say: gets a sentence about each newer one that is damaged.

        Raises:
            ValueError: all are damaged.
        """
        if say and self._said_finished and (damage := self.find_damage()):
            say(f"the model of the finished run is not whole: {damage}; it is written again from the last checkpoint")
        defects = []
        for checkpoint in sorted(self.checkpoints.glob("step_*"), reverse=True):
            defect = find_defect(checkpoint, self.most)
            if defect is None:
                return checkpoint
            defects.append(f"{checkpoint}: {defect}")
            if say:
                say(f"damaged checkpoint {defects[-1]}; looking for the one before")
        if defects:
            raise ValueError(f"no checkpoint is whole ({'; '.join(defects)}); delete them to start again")
        if self._said_finished:
            raise ValueError(f"{self.path} has results, but no checkpoint to go on from; choose another output_dir")
        return None

    def log(self, line: dict[str, Any]) -> None:
        """Append an epoch to `metrics.jsonl`; lines of the same or later epochs, from before a resume, go."""
        kept = [old for old in self.read_log()[0] if old["epoch"] < line["epoch"]]
        write_atomically(self.metrics_file, "".join(f"{json.dumps(old)}\n" for old in [*kept, line]))

    def read_log(self) -> tuple[list[dict[str, Any]], str | None]:
        """The entries of `metrics.jsonl`, epoch after epoch, and where it is damaged; what follows there is left out.

        A power failure may leave half a line; the run itself is in its checkpoints.
        """
        entries: list[dict[str, Any]] = []
        try:
            if not self.metrics_file.exists():
                return entries, None
            lines = read_bytes(self.metrics_file, MAX_LOG).splitlines()
        except (OSError, ValueError) as error:
            return entries, str(error)
        for number, text in enumerate(lines, 1):
            try:
                entry = json.loads(text)
                epoch = entry["epoch"]
            except (ValueError, TypeError, KeyError, RecursionError):
                epoch = None
            if type(epoch) is not int or epoch <= (entries[-1]["epoch"] if entries else 0):
                return entries, f"{self.metrics_file}, line {number} is damaged"
            entries.append(entry)
        return entries, None

    def mend_log(self, progress: Progress, say: Callable[[str], None]) -> None:
        """Cut `metrics.jsonl` back to the epochs that a checkpoint knows; what is damaged or missing is said."""
        entries, damage = self.read_log()
        kept = [entry for entry in entries if entry["epoch"] <= progress.epoch + (progress.batch > 0)]
        if damage:
            say(f"{damage}: cut back to {len(kept)} epochs; the run goes on from its checkpoint")
            if self.metrics_file.is_dir() and not self.metrics_file.is_symlink():
                raise FileExistsError(f"{self.metrics_file} is a directory; remove it")
            write_atomically(self.metrics_file, "".join(f"{json.dumps(entry)}\n" for entry in kept))
        elif lost := progress.epoch - sum(entry["epoch"] <= progress.epoch for entry in kept):
            say(f"{self.metrics_file} lacks {lost} epochs that the checkpoint knows; the run goes on from it")

    def finish(
        self,
        model: ECLForImageClassification,
        add_card: Callable[[Path], None],
        results: dict[str, Any],
        classes: str = "",
    ) -> None:
        """Write the model with the card that `add_card` puts beside it, the table of the classes, then the results."""
        partial = self.path / ".model.partial"
        discard(partial)
        partial.mkdir()
        add_card(partial)
        with writing(partial):
            model.save_pretrained(partial)
        sealed = [file for file in partial.iterdir() if file.is_file() and file.suffix not in (".md", ".png")]
        write_checksums(partial, sealed)
        synchronise_folder(partial)
        discard(self.model)
        partial.rename(self.model)
        synchronise(self.path)
        if classes:
            write_atomically(self.classes_file, classes)
        write_atomically(self.results_file, json.dumps(results, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    with replacing(path) as new, new.open("x", encoding="utf-8") as file:
        file.write(text)


def read_results(file: Path, entries: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """A run's `results.json`; ValueError names the file if it is none, or lacks one of these entries or the scores."""
    scores = {"test.plain.experts": list, "test.plain.ensemble": dict}
    results = read_entries(file, {**scores, "recipe": dict, **entries}, "results file of a run")
    for way in ("plain", "flip"):
        test = results["test"].get(way, results["test"]["plain"])
        experts = test.get("experts") if isinstance(test, dict) else None
        if not (isinstance(experts, list) and experts and all(map(_are_scores, [test.get("ensemble"), *experts]))):
            raise ValueError(f"{file} is no results file of a run: test.{way} holds no scores of ensemble and experts")
    return results


def _are_scores(entry: Any) -> bool:
    """Whether it holds finite numbers, and None where nothing could be measured; top-1 always can."""
    good = isinstance(entry, dict) and all(value is None or _is_a(value, "float") for value in entry.values())
    return good and entry.get("top1") is not None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def describe_environment(num_processes: int, device: torch.device) -> dict[str, Any]:
    """Versions and machine of a run; `commit` is None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        if not (Path(__file__).parents[2] / "pyproject.toml").exists():
            raise OSError("installed, perhaps within somebody else's repository")
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "cpu_cores": os.cpu_count(),
            "threads_per_process": torch.get_num_threads(),
            "processes": num_processes,
        },
    }


@torch.no_grad()
def describe_model(model: ECLForImageClassification) -> dict[str, int]:
    """Parameters and multiply-accumulate operations per image, of the ensemble and of one expert by itself.

    Raises:
        ValueError: the encoder can't take images of the configured size.
    """
    model.eval()
    image = torch.zeros(1, *model.config.pretrained_cfg["input_size"], device=model.device, dtype=model.dtype)
    try:
        with FlopCounterMode(display=False) as counter:
            model(image)
        with FlopCounterMode(display=False) as shared:
            if model.trunk is not None:
                model.trunk(image)
    except (RuntimeError, AssertionError) as error:
        size = "x".join(str(side) for side in image.shape[1:])
        raise ValueError(
            f"{model.config.architecture} can't take images of {size} (model.image_size): {error}"
        ) from error
    trunk = 0 if model.trunk is None else sum(parameter.numel() for parameter in model.trunk.parameters())
    size = {
        "parameters": (model.num_parameters(), trunk),
        "macs": (counter.get_total_flops() // 2, shared.get_total_flops() // 2),
    }
    described = {}
    for name, (total, common) in size.items():
        described |= {name: total, f"{name}_per_expert": common + (total - common) // len(model.experts)}
    return described
