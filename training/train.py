"""Train an ensemble on a long-tailed split; the method is in the recipe.

    python training/train.py --recipe quickstart --output_dir runs/quickstart
    accelerate launch training/train.py --recipe cifar100_lt --output_dir runs/c100 --seed 1
    accelerate launch training/train.py --recipe cifar100_lt --output_dir runs/c100 --resume
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 training/train.py --recipe ... --output_dir ...

Mixed precision and devices are Accelerate's own flags (`accelerate launch --mixed_precision bf16 ...`).
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
import transformers
from accelerate import skip_first_batches
from accelerate.utils import (
    gather_object,
    set_seed,
)
from jsonargparse import Namespace, set_parsing_settings
from timm.utils import distribute_bn
from tqdm import tqdm

from ecl_hf.data.loaders import draw_seed
from ecl_hf.data.longtail import assign_folds
from ecl_hf.data.longtailed import LongTailedData
from ecl_hf.evidence.calibration import fit_temperature
from ecl_hf.evidence.classes import class_rows, classes_csv
from ecl_hf.evidence.evaluation import Predictions, score
from ecl_hf.evidence.results import describe_run, report
from ecl_hf.flags import FlagParser
from ecl_hf.heads import log_prior_shift
from ecl_hf.learning.batchnorm import save_statistics
from ecl_hf.learning.finite import check_weights
from ecl_hf.learning.initialise import pretrained_tag
from ecl_hf.learning.low_rank import merge_low_rank
from ecl_hf.learning.memory import peak_memory
from ecl_hf.learning.optimiser import set_learning_rate
from ecl_hf.learning.stages import fold_heads, published_copy
from ecl_hf.methods import PAPERS
from ecl_hf.methods.base import EpochContext, FinishContext, MixingContext, Part, Time
from ecl_hf.modeling_ecl import ECLForImageClassification
from ecl_hf.publishing.config import HubConfig
from ecl_hf.repository import upload_directory
from ecl_hf.runs.folder import RunFolder, describe_model, epoch_line
from ecl_hf.runs.interruption import STOPPED, StopRequest, plain_errors
from ecl_hf.runs.recipe import Recipe, prepare_flags
from ecl_hf.runs.recipe_files import RecipeFile
from ecl_hf.session import Session, or_exit, refusing
from ecl_hf.terminal import speaking

FEW_HELD_OUT = 4
"""Held-out pictures of a class, below which they say little about how sure the model may be of it."""


def parse(argv: Sequence[str] | None) -> tuple[Recipe, Namespace]:
    """Read recipe file and flags; an unknown key or a wrong type ends the program with its name."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = FlagParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", action=RecipeFile, help="YAML file, or a name; flags override it")
    try:
        argv, method, left_out = prepare_flags(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    Recipe.add_arguments(parser, method)
    parser.add_argument("--output_dir", type=Path, required=True, help="Run folder to write")
    parser.add_argument("--resume", action="store_true", help="Continue the run in output_dir, if there is one")
    parser.add_argument("--allow_changes", action="store_true", help="Continue it although the recipe has changed")
    parser.add_argument("--report_to", nargs="+", default=[], help="Trackers: tensorboard, trackio, ...")
    args = parser.parse_args(argv)
    args.left_out = left_out
    try:
        return Recipe.from_arguments(parser, args), args
    except ValueError as error:
        parser.error(str(error))


def in_order(name: str) -> tuple[int, str]:
    """Key that sorts "train row 9, ..." before "train row 12, ..."."""
    return len(name.partition(",")[0]), name


def in_steps(batches: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """The micro-batches of one optimiser step at a time."""
    batches = iter(batches)
    while step := list(islice(batches, size)):
        yield step


@speaking()
def main(argv: Sequence[str] | None = None) -> Path:
    """Train a method's stages, test the model and write the run folder, whose path is returned."""
    recipe, args = parse(argv)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # of uploads, too, which would mix with those of the training
    transformers.utils.logging.set_verbosity_error()
    return run_recipe(recipe, args)


def run_recipe(recipe: Recipe, args: Namespace) -> Path:
    """Train a recipe in `args.output_dir`; SystemExit says in one sentence why that is not possible."""
    with plain_errors(), StopRequest() as stop, closing(RunFolder(args.output_dir)) as run:
        with refusing(recipe):
            training = Training(recipe, args, run)
        if args.resume and run.finished:
            with refusing(recipe):
                training.say(f"{run.path} is finished already\n{report(run)}")
            return run.path
        training.restore()
        training.run_stages(stop)
        training.test()
        training.accelerator.end_training()
    return run.path


class Training(Session):
    """The loop over a method's stages, epochs and steps."""

    with_bar = True
    calibration_seconds = 0.0

    @property
    def lr(self) -> float:
        """The learning rate of the next optimiser step."""
        updates = self.progress.updates_since(self.first_epoch * self.steps_per_epoch)
        stage = self.progress.stage
        factor = self.lr_factors[stage](updates, self.stage_epochs[stage] * self.steps_per_epoch)
        return self.recipe.optim.lr * self.plain.stage.lr * factor

    @property
    def averaged(self) -> ECLForImageClassification:
        """The model that counts while a stage runs: the average of the weights, where the recipe asks for one."""
        return self.model if self.plain.average is None else self.plain.average.module

    def run_stages(self, stop: StopRequest) -> None:
        """Train all that is left, and take the method's last steps."""
        while True:
            self.fit(stop)
            if not self.next_stage():
                break
        self.finish()

    def next_stage(self) -> bool:
        """End the running stage and begin the next one, if there is one and the run has not come to its last step."""
        if self.processes > 1:  # else the model would know the running statistics of the main process alone
            distribute_bn(self.plain, self.processes, reduce=True)
        if self.recipe.optim.ema:
            self.model.load_state_dict(self.plain.average.module.state_dict())
        if self.plain.best is not None and self.complete and self.progress.best_epoch is not None:
            self.model.load_state_dict(self.plain.best.state_dict())
            score = f"{100 * self.progress.best:.1f} %"
            self.say(f"epoch {self.progress.best_epoch} is the best on the validation pictures: balanced {score}")
        fold_heads(self.model)
        if self.progress.step == self.last_step or self.progress.ended:
            return False
        self.progress = self.progress.next_stage()
        stage = self.progress.stage
        self.accelerator.free_memory()
        set_seed(self._seed(stage))
        self._build(stage)
        self._prepare(stage)
        if self.plain.stage.heads == "new":
            self._start_heads()
        return True

    def fit(self, stop: StopRequest) -> None:
        """Train until the stage's last step; a request to stop ends the program after a step, with a checkpoint."""
        recipe = self.recipe
        self.task.train()
        stop.deferred, stopping = True, False
        with tqdm(
            desc=self.plain.stage.name if len(self.stage_epochs) > 1 else None,
            total=self.end_of_stage,
            initial=self.progress.step,
            unit="step",
            disable=not (self.with_bar and self.accelerator.is_main_process and sys.stderr.isatty()),
        ) as bar:
            while self.progress.step < self.end_of_stage and not stopping and not self.progress.ended:
                stopping = self._train_epoch(stop, bar)
                ended = self.progress.batch == len(self.loader)
                if ended:
                    self._call_parts("after_epoch")  # may change the model, which is validated then
                self._log(bar, self._validate() if ended and self.data.val is not None else {})
                if ended:
                    self.progress = self.progress.next_epoch()
                epoch, last = self.progress.epoch, self.progress.step == self.end_of_stage or self.progress.ended
                if stopping or last or (ended and epoch % recipe.train.checkpoint_every == 0):
                    self._write_checkpoint()
                if self.upload and ended and epoch % recipe.hub.every == 0 and self.progress.step < self.total_steps:
                    model = published_copy(self.averaged)
                    check_weights(model)
                    if self.encoder:
                        self.encoder.put_into(model)
                    self.upload.offer(model, partial(self.add_card, results=None), f"Epoch {epoch}")
        stop.deferred = False
        if stopping:
            self.accelerator.wait_for_everyone()
            self.say(f"stopped after step {self.progress.step}, with a checkpoint; continue with --resume")
            sys.exit(STOPPED)

    def _train_epoch(self, stop: StopRequest, bar: tqdm) -> bool:
        """Train the rest of an epoch, or until the last step, or until a stop is asked for, which it returns."""
        progress, stopping = self.progress, False
        self.plain.time = Time(progress.epoch - self.first_epoch, self.stage_epochs[progress.stage])
        if progress.batch == 0:
            self._call_parts("before_epoch")
        self.train_set.epoch, self.train_set.progress = progress.epoch, self.plain.time.progress
        self.train_set.weights = self._picture_weights()
        self.sums = {name: torch.tensor(value, device=self.accelerator.device) for name, value in progress.sums.items()}
        broken = set(progress.broken)
        started = time.perf_counter()
        batches = or_exit(skip_first_batches(self.loader, progress.batch), self.recipe)
        for batches_of_step in in_steps(batches, self.accumulation):
            for batch in batches_of_step:
                broken.update(batch.pop("broken", ()))
            for batch in self._complete(batches_of_step):
                self._choose_precision(batch)
                with self.accelerator.accumulate(self.task):
                    with self._in_precision():
                        out = self.task(**batch)
                    with self.around_backward():
                        self.accelerator.backward(out["loss"])
                keys = None if out["keys"] is None else self.accelerator.gather((out["keys"], batch["labels"]))
                self.check.add(out, keys, batch["indices"])
                progress.batch += 1
            stopping = self._update(stop.asked)
            bar.update()
            if forecast := self.forecast.step(time.perf_counter(), self.last_step - progress.step):
                self.say(forecast)
            if stopping or progress.step == self.end_of_stage:
                break
        progress.seconds += time.perf_counter() - started
        progress.broken = sorted(set(gather_object(list(broken))), key=in_order)
        progress.sums = {name: self.accelerator.reduce(value, "mean").item() for name, value in self.sums.items()}
        return stopping

    def _complete(self, batches: list[dict]) -> list[dict]:
        """Micro-batches of a step with mixed pictures, and with the class counts of the whole step in each of them."""
        stage, progress = self.plain.stage, self.progress
        if stage.mixing:
            for position, batch in enumerate(batches, start=progress.batch):
                entropy = [self.recipe.seed, progress.epoch, position, self.accelerator.process_index]
                generator = torch.Generator().manual_seed(draw_seed(*entropy))
                counts = torch.tensor(self.data.class_counts)
                context = MixingContext(self.recipe.loss, self.plain.time, generator, self.plain, counts)
                batches[position - progress.batch] = stage.mixing(batch, context)
        if self.pieces > 1:
            classes = len(self.data.class_counts)
            labels = [(batch["labels"], batch.get("mixed_labels", batch["labels"])) for batch in batches]
            columns = (torch.cat(column) for column in zip(*labels, strict=True))
            counts = torch.stack([torch.bincount(column, minlength=classes) for column in columns]).float()
            counts = self.accelerator.reduce(counts) / self.pieces
            batches = [batch | {"label_counts": counts} for batch in batches]
        return batches

    def _update(self, asked: bool) -> bool:
        """Take an optimiser step if its numbers are finite; whether any process was asked to stop."""
        finite, stopping = self.check.judge(asked)
        if finite:
            set_learning_rate(self.optimizer, self.lr)
            if self.recipe.optim.clip_grad:
                self.accelerator.clip_grad_norm_(self.plain.parameters(), self.recipe.optim.clip_grad)
            self.optimizer.step()
            for name, value in self.check.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            if self.check.keys:
                self.plain.enqueue(torch.cat(self.check.keys), torch.cat(self.check.labels))
        elif self.undo:
            self.check.leave_out()
            self.progress.missing += self.accumulation
        else:
            raise FloatingPointError(self.check.message(self.progress.step + 1, gather_object))
        self.optimizer.zero_grad()
        if finite and not self.accelerator.optimizer_step_was_skipped:  # as half precision does at an overflow
            self.plain.follow()
        else:
            self.progress.skipped += 1
        self.check.begin()
        self.progress.step += 1
        return stopping

    def _call_parts(self, hook: str) -> None:
        """Let the terms' parts do what they do between epochs."""
        parts = [part for part in self.plain.parts.values() if getattr(type(part), hook) is not getattr(Part, hook)]
        for part in parts:
            getattr(part, hook)(EpochContext(**self._context(), time=self.plain.time, teacher=self._teacher_predicts))

    def _validate(self) -> dict[str, float]:
        """Scores on the validation pictures; remembers the model of the best epoch of the last stage."""
        progress, best = self.progress, self.plain.best
        model = self.averaged
        found = self._predict("val", model)
        self.task.train()
        scores = score(found.ensemble_logits, found.labels, self.data.class_counts)
        if best is not None:
            if progress.best is None or scores["balanced"] > progress.best:
                progress.best, progress.best_epoch = scores["balanced"], progress.epoch + 1
                best.load_state_dict(model.state_dict())
            patience = self.recipe.train.patience
            progress.ended = patience is not None and progress.epoch + 1 - progress.best_epoch >= patience
        return {f"val/{name}": scores[name] for name in ("top1", "balanced", "macro_f1", "ece")}

    def _calibrate(self) -> None:
        """Find the temperature on pictures that a model was not trained on."""
        started = time.perf_counter()
        if self.data.val is not None:
            parts = [self._predict("val", self.model)]
        elif self.encoder and self.recipe.train.calibration_folds and self.complete:
            parts = list(self._predict_folds())
        else:
            return
        if not parts:
            self.say("no temperature was found: there is no second picture of any class")
            return
        logits, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("ensemble_logits", "labels"))
        counts = labels.bincount(minlength=logits.shape[1]).clamp_min(1).tolist()
        shift = log_prior_shift(counts, self.model.carried_prior())
        self.model.config.temperature *= fit_temperature(logits, labels, shift)
        self.calibration_seconds = time.perf_counter() - started
        self.say(f"temperature {self.model.config.temperature:.2f}, found on {len(labels)} pictures")
        thin = (labels.bincount(minlength=logits.shape[1]) < FEW_HELD_OUT).sum().item()
        if thin > logits.shape[1] / 2:
            self.say(
                f"probabilities may be far from true: {thin} classes of {logits.shape[1]} have fewer than "
                f"{FEW_HELD_OUT} pictures that the model did not learn from"
            )

    def _predict_folds(self) -> Iterator[Predictions]:
        """The training pictures in turn, fold by fold, by models that were trained on the others."""
        folds, there, groups = self.recipe.train.calibration_folds, self.kept["train.there"].numpy(), self.data.groups
        fold_of = np.full(len(there), -1)
        labels, groups = self.train_set.labels[there], None if groups is None else groups[there]
        fold_of[there] = assign_folds(labels, groups, folds, self.recipe.seed)
        for fold in tqdm(sorted({*fold_of} - {-1}), "calibration", disable=self.without_bar, leave=False):
            with TemporaryDirectory() as folder, closing(RunFolder(Path(folder) / "run")) as run:
                yield Fold(self, torch.from_numpy(fold_of == fold), run).predict_held_out()

    def _log(self, bar: tqdm, validation: dict[str, float]) -> None:
        images = self.recipe.batch_size // self.accumulation
        line = self.progress.line(self.plain.stage.name, self.lr, images_per_batch=images) | validation
        speed = f"{line['images_per_second']:.0f}"
        bar.set_postfix(epoch=line["epoch"], loss=f"{line.get('loss', math.nan):.3f}", images_per_second=speed)
        numbers = {name: value for name, value in line.items() if name not in ("epoch", "stage")}
        self.accelerator.log(numbers, step=self.progress.step)
        if self.accelerator.is_main_process:
            self.run.log(line)
        if bar.disable:
            left = self.forecast.left(time.perf_counter(), self.last_step - self.progress.step)
            self.say(epoch_line(line, self.recipe.epochs, left))

    def _note_memory(self) -> None:
        self.progress.peak_memory = max(
            self.progress.peak_memory, *gather_object([peak_memory(self.accelerator.device)])
        )

    def _write_checkpoint(self) -> None:
        check_weights(self.plain)
        self._note_memory()
        with self.run.writing_checkpoint(self.progress.step) as folder:
            self.accelerator.save_state(folder)
            save_statistics(self.plain, folder, self.accelerator.process_index)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.run.publish_checkpoint(self.progress, self.recipe.train.keep_last)

    def finish(self) -> None:
        """Take the method's steps after its last stage, which rewrite the heads."""
        if self.upload:
            self.upload.wait()
        merge_low_rank(self.model)
        if self.complete:
            for rewrite in self.method.finish:
                rewrite(FinishContext(**self._context()))
            fold_heads(self.model)
        check_weights(self.model)
        self._calibrate()

    def test(self) -> None:
        """Test the model, write it with its results, and upload it if the recipe says so.

        The reported numbers are the last epoch's, or where there are validation pictures, those of the epoch that they
        choose.
        """
        predictions = self._predict("test", self.model, with_features=False, with_flip=True)
        if self.encoder:
            self.encoder.put_into(self.model)
        self._note_memory()
        if not self.accelerator.is_main_process:
            return
        counts, names = self.data.class_counts, self.data.class_names
        defects = self._evaluation_loader("test").dataset.defects(predictions.left_out[:10])
        finished = self.complete
        carried = torch.as_tensor(self.model.carried_prior())
        results = describe_run(self.recipe, self.progress, predictions, counts, names, carried, defects, finished)
        commits = {"commit": self.progress.commit, "commit_of_test": self.environment["commit"]}
        results |= {
            "paper": PAPERS.get(self.recipe.method),
            **describe_model(self.model),
            "calibration_seconds": self.calibration_seconds,
            "classifier": self.model.config.classifier,  # the method's own, if it has one, and not the recipe's
            "mixed_precision": self.mixed_precision,
            "pretrained_weights": pretrained_tag(self.recipe.model),
            **self.environment,
            **commits,
        }
        ensemble = {
            f"test/{name}": value for name, value in results["test"]["plain"]["ensemble"].items() if value is not None
        }
        self.accelerator.log(ensemble, step=self.progress.step)
        rows = class_rows(predictions.ensemble_logits, predictions.labels, counts, carried)
        self.run.finish(self.model, partial(self.add_card, results=results), results, classes_csv(rows, names))
        self.say(report(self.run))
        if broken := results["broken_pictures"]["first"]:
            found = results["broken_pictures"]["train"] + results["broken_pictures"]["test"]
            self.say("\n".join([f"{found} pictures could not be decoded and were skipped:", *broken]))
        if self.recipe.hub.push and finished:
            self._upload()

    def _upload(self) -> None:
        repo_id = self.recipe.hub.repo_id
        try:
            commit = upload_directory(self.run.model, repo_id, commit_message=f"{self.recipe.epochs} epochs")
            self.say(f"uploaded to {commit.repo_url}, revision {commit.oid}")
        except (OSError, ValueError) as error:
            again = f"python training/export.py --run {self.run.path} --push --repo_id {repo_id}"
            self.say(f"the upload failed, the run is complete; repeat it with\n    {again}\n{error}")


class Fold(Training):
    """A training on kept features that leaves some pictures out, to be asked about them; it says and keeps nothing.

    Args:
        whole: the training on all pictures.
        held_out: which of them to leave out, [N].
        run: a folder for the time being.
    """

    with_bar = False

    def __init__(self, whole: Training, held_out: torch.Tensor, run: RunFolder) -> None:
        self.whole, self.held_out = whole, held_out
        options = replace(whole.recipe.train, calibration_folds=None)
        args = Namespace(output_dir=run.path, resume=False, allow_changes=False, report_to=[], left_out=[])
        super().__init__(replace(whole.recipe, train=options, hub=HubConfig()), args, run)

    def predict_held_out(self) -> Predictions:
        """Train, and say what the pictures are that were left out."""
        self.restore()
        self.run_stages(StopRequest())
        self.kept |= {"train.there": self.held_out}
        return self._predict("train", self.model)

    def say(self, _: str) -> None:
        """Leave it to the training on all pictures."""

    def _load_data(self) -> LongTailedData:
        return self.whole.data

    def _describe_data(self) -> None:
        """Was said of all pictures."""

    def _keep_features(self) -> None:
        kept = self.whole.kept
        self._learn_from(kept | {"train.there": kept["train.there"] & ~self.held_out})

    def _log(self, *_: object) -> None:
        """No epoch of a fold is worth a line."""

    def _write_checkpoint(self) -> None:
        """A fold that is interrupted begins again."""


if __name__ == "__main__":
    main()
