"""Train an ensemble on a long-tailed split; the method is in the recipe.

    python training/train.py --recipe training/recipes/quickstart.yaml --output_dir runs/quickstart
    accelerate launch training/train.py --recipe training/recipes/cifar100_lt.yaml --output_dir runs/c100 --seed 1
    accelerate launch training/train.py --recipe training/recipes/cifar100_lt.yaml --output_dir runs/c100 --resume
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 training/train.py --recipe ... --output_dir ...

Mixed precision and devices are Accelerate's own flags (`accelerate launch --mixed_precision bf16 ...`).
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from huggingface_hub.utils import disable_progress_bars
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from timm.utils import distribute_bn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ecl_hf.data.loaders import ViewDataset, evaluation_loader, train_loader
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.pictures import BrokenPictureError
from ecl_hf.data.streaming import StreamedViews, StreamSampler, stream_loader
from ecl_hf.data.views import contrastive_view, evaluation_view, supervised_view
from ecl_hf.evidence.evaluation import Predictions, format_table, predict, summarise
from ecl_hf.evidence.metrics import shot_groups
from ecl_hf.learning.batchnorm import load_statistics, save_statistics, synchronise_batchnorm
from ecl_hf.learning.finite import StepCheck, check_weights
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.learning.memory import checkpoint_blocks, checkpoint_experts, counted_once, keep_freed_memory
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.methods import METHODS
from ecl_hf.publishing.hub import BackgroundUpload, check_upload, write_card
from ecl_hf.repository import upload_directory
from ecl_hf.runs.folder import Progress, RunFolder, cosine, describe_environment, describe_model, flatten
from ecl_hf.runs.interruption import STOPPED, StopRequest, plain_errors
from ecl_hf.runs.launch import check_launch
from ecl_hf.runs.recipe import Recipe

CARD = Path(__file__).resolve().parents[1] / "hub_cards" / "model_card.md"


def parse(argv: Sequence[str] | None) -> tuple[Recipe, Namespace]:
    """Read recipe file and flags; an unknown key or a wrong type ends the program with its name."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", action="config", help="YAML file; flags after it override it")
    Recipe.add_arguments(parser)
    parser.add_argument("--output_dir", type=Path, required=True, help="Run folder to write")
    parser.add_argument("--resume", action="store_true", help="Continue the run in output_dir, if there is one")
    parser.add_argument("--allow_changes", action="store_true", help="Continue it although the recipe has changed")
    parser.add_argument("--report_to", nargs="+", default=[], help="Trackers: tensorboard, trackio, ...")
    args = parser.parse_args(argv)
    try:
        return Recipe.from_arguments(parser, args), args
    except ValueError as error:
        parser.error(str(error))


def report(run: RunFolder) -> str:
    """The short table of a finished run, and where things are."""
    results = json.loads(run.results_file.read_text())
    groups = ", ".join(f"{name} {count}" for name, count in results["shot_groups"].items())
    lines = [f"top-1 of the shot groups and calibration error on the test split, in % (classes: {groups})"]
    lines.append(format_table(results["test"]["plain"]))
    if results["recipe"]["data"]["horizontal_flip"]:
        lines += ["with test-time horizontal flip", format_table(results["test"]["flip"])]
    lines += [f"{run.results_file}: all numbers", f"{run.model}: the model, for from_pretrained and pipeline"]
    return "\n".join(lines)


def in_order(name: str) -> tuple[int, str]:
    """Key that sorts "train row 9, ..." before "train row 12, ..."."""
    return len(name.partition(",")[0]), name


@contextmanager
def refusing(recipe: Recipe) -> Iterator[None]:
    """End the program with one sentence about input that does not fit."""
    try:
        yield
    except BrokenPictureError as error:
        sys.exit(
            f"error: {error}" + ("; data.on_error skip goes on without it" if recipe.data.on_error == "raise" else "")
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def or_exit(batches: Iterable, recipe: Recipe) -> Iterator:
    """The same batches; one that can't be read ends the program with the name of the picture."""
    with refusing(recipe):
        yield from batches


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, evaluate the last epoch and write the run folder, whose path is returned."""
    recipe, args = parse(argv)
    with plain_errors(), StopRequest() as stop, closing(RunFolder(args.output_dir)) as run:
        with refusing(recipe):
            training = Training(recipe, args, run)
        if args.resume and run.finished:
            training.say(f"{run.path} is finished already\n{report(run)}")
            return run.path
        training.prepare()
        training.fit(stop)
        training.test()
        training.accelerator.end_training()
    return run.path


class Training:
    """A run: what the recipe asks for, on this process's device.

    Args:
        recipe: of the run.
        args: the other flags.
        run: the folder to write.

    Raises:
        ValueError: recipe, data, launch or run folder don't fit; nothing is trained or written before that is known.
        OSError: something can't be read or written.
    """

    def __init__(self, recipe: Recipe, args: Namespace, run: RunFolder) -> None:
        datasets.disable_progress_bars()
        disable_progress_bars()  # of uploads, which would mix with those of the training
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.recipe, self.run = recipe, run
        self.accelerator = accelerator = self._accelerator(args)
        self.say = tqdm.write if accelerator.is_main_process else (lambda _: None)
        self.processes = accelerator.num_processes
        check_launch(os.environ, self.processes)
        if recipe.method not in METHODS:
            raise ValueError(f"unknown method {recipe.method!r}; choose from {', '.join(METHODS)}")
        self.method = METHODS[recipe.method]
        recipe.model.num_experts = self.method.experts(recipe.model.num_experts)
        self.accumulation = recipe.train.gradient_accumulation_steps
        if recipe.batch_size % (self.processes * self.accumulation):
            raise ValueError(
                f"batch_size {recipe.batch_size} is no multiple of {self.processes} processes x "
                f"{self.accumulation} micro-batches"
            )
        run.check(recipe, args.resume, args.allow_changes)
        with accelerator.main_process_first():
            self.data = load_longtailed(recipe.data)
        images = sum(self.data.class_counts)
        if recipe.batch_size > images:
            raise ValueError(f"batch_size {recipe.batch_size} exceeds the training split of {images} images")
        set_seed(recipe.seed)
        self.model = initialise_model(recipe.model, self.method, self.data.class_counts, self.data.class_names)
        self.plain = CollaborativeTask(self.model, self.method, recipe.loss).to(memory_format=torch.channels_last)
        if recipe.train.sync_batchnorm and self.processes > 1:
            self.plain = synchronise_batchnorm(self.plain, accelerator.device)
        self._save_memory()
        self.train_set = self._train_set()
        self.size = describe_model(self.model)
        self.environment = describe_environment(self.processes, accelerator.device)
        if recipe.hub.push and accelerator.is_main_process:
            check_upload(recipe.hub.repo_id, recipe.hub.private or None)
        accelerator.wait_for_everyone()
        self.checkpoint = None
        if accelerator.is_main_process:
            run.open(recipe, args.resume, args.allow_changes)
            self.checkpoint = None if run.finished else run.resumable_checkpoint(self.say)

    def _accelerator(self, args: Namespace) -> Accelerator:
        accelerator = Accelerator(
            gradient_accumulation_steps=self.recipe.train.gradient_accumulation_steps,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(minutes=self.recipe.train.timeout)),
            ],
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
        if absent := set(args.report_to) - {tracker.value for tracker in accelerator.log_with}:
            raise ValueError(f"report_to: {', '.join(absent)} is not installed")
        return accelerator

    def _save_memory(self) -> None:
        if self.recipe.train.gradient_checkpointing:
            checkpoint_blocks(self.model)
        if self.recipe.train.experts_one_by_one:
            checkpoint_experts(self.model)
        repeating = self.recipe.train.gradient_checkpointing or self.recipe.train.experts_one_by_one
        self.around_backward = partial(counted_once, self.plain) if repeating else nullcontext
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()

    def _train_set(self) -> ViewDataset | StreamedViews:
        config, recipe = self.model.config.pretrained_cfg, self.recipe
        views = {"pixel_values": supervised_view(config, recipe.data.augmentation, recipe.data.horizontal_flip)}
        if "momentum" in self.method.needs:
            views["contrast_pixel_values"] = contrastive_view(config, recipe.data.horizontal_flip)
        on_error = "replace" if recipe.data.on_error == "skip" else "raise"
        if recipe.data.streaming:
            return StreamedViews(views, recipe.seed, on_error)
        return ViewDataset(self.data.train, views, recipe.seed, on_error=on_error, keep=recipe.epochs > 1)

    def prepare(self) -> None:
        """Bring task, optimizer and loaders to the device, and restore the checkpoint if there is one."""
        recipe, accelerator = self.recipe, self.accelerator
        self.loader = self._train_loader()
        test = evaluation_loader(
            self.data.test,
            evaluation_view(self.model.config.pretrained_cfg),
            256,
            recipe.data.num_workers,
            on_error="mark" if recipe.data.on_error == "skip" else "raise",
        )
        parameters = [parameter for parameter in self.plain.parameters() if parameter.requires_grad]
        # Accelerate does not notice that a fused optimizer has left a step out for the loss scaler.
        optimizer = torch.optim.SGD(parameters, fused=accelerator.scaler is None, **asdict(recipe.optim))
        set_seed(recipe.seed, device_specific=True)
        self.task, self.optimizer, self.test_loader = accelerator.prepare(self.plain, optimizer, test)
        if recipe.train.compile:
            self.plain.compile_encoders()
        self.undo = recipe.train.on_nonfinite == "skip"
        self.check = StepCheck(self.plain, accelerator.reduce, gradients=accelerator.scaler is None, undo=self.undo)
        self.total_steps = recipe.epochs * (len(self.loader) // self.accumulation)
        self.last_step = min(self.total_steps, recipe.train.max_steps or self.total_steps)
        self.add_card = partial(
            write_card,
            template=CARD,
            config=self.model.config,
            repo_id=recipe.hub.repo_id,
            license=recipe.hub.license,
        )
        accelerator.init_trackers("ecl_hf", {key: str(value) for key, value in flatten(asdict(recipe)).items()})
        self.progress = self._restore()

    def _train_loader(self) -> DataLoader:
        recipe = self.recipe
        sizes = (recipe.batch_size, self.processes * self.accumulation, recipe.data.num_workers)
        if not recipe.data.streaming:
            return self.accelerator.prepare(train_loader(self.train_set, *sizes))
        images = sum(self.data.class_counts)
        share = (recipe.batch_size, self.accelerator.process_index, self.processes, recipe.data.shuffle_buffer)
        loader = stream_loader(StreamSampler(self.train_set, self.data.train, images, *share), *sizes)
        # Each process has its part already: Accelerate moves the batches and divides nothing.
        return prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True)

    def _restore(self) -> Progress:
        [checkpoint] = broadcast_object_list([self.checkpoint])
        if not checkpoint:
            return Progress(commit=self.environment["commit"])
        try:
            self.accelerator.load_state(checkpoint)
            load_statistics(self.plain, checkpoint, self.accelerator.process_index)
            progress = self.run.read_progress(checkpoint)
        except Exception as error:  # of whatever wrote or reads it
            sys.exit(f"error: {checkpoint} does not fit this recipe and version: {error}")
        self.optimizer.param_groups[0].update(asdict(self.recipe.optim))
        self.say(f"continuing after step {progress.step}")
        return progress

    @property
    def lr(self) -> float:
        """The learning rate of the next optimiser step."""
        return self.recipe.optim.lr * cosine(self.progress.updates, self.total_steps)

    def fit(self, stop: StopRequest) -> None:
        """Train until the last step; a request to stop ends the program after a step, with a checkpoint."""
        recipe, counts = self.recipe, self.data.class_counts
        self.say(
            f"{recipe.method}: {len(self.plain.model.experts)} x {recipe.model.architecture}, {sum(counts)} training "
            f"images, {len(counts)} classes of {max(counts)} to {min(counts)}, {self.processes} process(es) on "
            f"{self.accelerator.device.type}"
        )
        upload = None
        if recipe.hub.every and self.accelerator.is_main_process:
            upload = BackgroundUpload(recipe.hub.repo_id, tqdm.write)
        self.task.train()
        stop.deferred, stopping = True, False
        with tqdm(
            total=self.last_step,
            initial=self.progress.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
        ) as bar:
            while self.progress.step < self.last_step and not stopping:
                stopping = self._train_epoch(stop, bar)
                self._log(bar)
                ended = self.progress.batch == len(self.loader)
                if ended:
                    self.progress = self.progress.next_epoch()
                epoch, last = self.progress.epoch, self.progress.step == self.last_step
                if stopping or last or (ended and epoch % recipe.train.checkpoint_every == 0):
                    self._write_checkpoint()
                if upload and ended and epoch % recipe.hub.every == 0 and self.progress.step < self.total_steps:
                    upload.offer(self.plain.model, partial(self.add_card, results=None), f"Epoch {epoch}")
        stop.deferred = False
        if stopping:
            self.accelerator.wait_for_everyone()
            self.say(f"stopped after step {self.progress.step}, with a checkpoint; continue with --resume")
            sys.exit(STOPPED)
        if upload:
            upload.wait()
        if self.processes > 1:  # else the model would know the running statistics of the main process alone
            distribute_bn(self.plain, self.processes, reduce=True)

    def _train_epoch(self, stop: StopRequest, bar: tqdm) -> bool:
        """Train the rest of an epoch, or until the last step, or until a stop is asked for, which it returns."""
        progress, stopping = self.progress, False
        self.train_set.epoch = progress.epoch
        self.sums = {name: torch.tensor(value, device=self.accelerator.device) for name, value in progress.sums.items()}
        broken = set(progress.broken)
        started = time.perf_counter()
        for batch in or_exit(skip_first_batches(self.loader, progress.batch), self.recipe):
            pictures = batch.pop("indices")
            broken.update(batch.pop("broken", ()))
            with self.accelerator.accumulate(self.task):
                out = self.task(**batch)
                with self.around_backward():
                    self.accelerator.backward(out["loss"])
                self.check.add(out, None if out["keys"] is None else self.accelerator.gather(out["keys"]), pictures)
                progress.batch += 1
                if not self.accelerator.sync_gradients:
                    continue
                stopping = self._update(stop.asked)
            bar.update()
            if stopping or progress.step == self.last_step:
                break
        progress.seconds += time.perf_counter() - started
        progress.broken = sorted(set(gather_object(list(broken))), key=in_order)
        progress.sums = {name: self.accelerator.reduce(value, "mean").item() for name, value in self.sums.items()}
        return stopping

    def _update(self, asked: bool) -> bool:
        """Take an optimiser step if its numbers are finite; whether any process was asked to stop."""
        finite, stopping = self.check.judge(asked)
        if finite:
            self.optimizer.param_groups[0]["lr"] = self.lr
            self.optimizer.step()
            for name, value in self.check.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            if self.check.keys:
                self.plain.enqueue(torch.cat(self.check.keys))
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

    def _log(self, bar: tqdm) -> None:
        line = self.progress.line(self.lr, images_per_batch=self.recipe.batch_size // self.accumulation)
        bar.set_postfix(epoch=line["epoch"], loss=f"{line.get('loss', math.nan):.3f}")
        self.accelerator.log({name: value for name, value in line.items() if name != "epoch"}, step=self.progress.step)
        if self.accelerator.is_main_process:
            self.run.log(line)

    def _write_checkpoint(self) -> None:
        check_weights(self.plain)
        with self.run.writing_checkpoint(self.progress.step) as folder:
            self.accelerator.save_state(folder)
            save_statistics(self.plain, folder, self.accelerator.process_index)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self.run.publish_checkpoint(self.progress, self.recipe.train.keep_last)

    def test(self) -> None:
        """Test the model, write it with its results, and upload it if the recipe says so.

        The reported numbers are the last epoch's: there is no validation split to choose another by.
        """
        main = self.accelerator.is_main_process
        with torch.compiler.set_stance("force_eager"):  # compiling for batches of another size would take longer
            predictions = predict(
                self.plain.model,
                or_exit(tqdm(self.test_loader, "testing", disable=not main, leave=False), self.recipe),
                self.accelerator.gather_for_metrics,
            )
        if not main:
            return
        results = self._results(predictions)
        ensemble = {
            f"test/{name}": value for name, value in results["test"]["plain"]["ensemble"].items() if value is not None
        }
        self.accelerator.log(ensemble, step=self.progress.step)
        self.run.finish(self.plain.model, partial(self.add_card, results=results), results)
        self.say(report(self.run))
        if broken := results["broken_pictures"]["first"]:
            found = results["broken_pictures"]["train"] + results["broken_pictures"]["test"]
            self.say("\n".join([f"{found} pictures could not be decoded and were skipped:", *broken]))
        if self.recipe.hub.push and results["finished"]:
            self._upload()

    def _results(self, predictions: Predictions) -> dict[str, Any]:
        progress, counts = self.progress, self.data.class_counts
        recorded = asdict(self.recipe)
        for key in ("path", "train_list", "test_list", "split"):
            if recorded["data"][key]:  # where it lies is this machine's affair
                recorded["data"][key] = Path(recorded["data"][key]).resolve().name
        return {
            "method": self.recipe.method,
            "seed": self.recipe.seed,
            "finished": progress.step == self.total_steps,
            "epochs": progress.epoch,
            "steps": progress.step,
            "test": summarise(predictions, counts),
            "test_images": len(predictions.labels),
            "broken_pictures": {
                "train": len(progress.broken),
                "test": len(predictions.left_out),
                "first": progress.broken[:10] + self.test_loader.dataset.defects(predictions.left_out[:10]),
            },
            "skipped_steps": progress.skipped,
            "class_counts": counts,
            "class_names": self.data.class_names,
            "shot_groups": {name: int(mask.sum()) for name, mask in shot_groups(counts).items()},
            **self.size,
            "training_seconds": progress.total_seconds + progress.seconds,
            "mixed_precision": self.accelerator.mixed_precision,
            **self.environment,
            "commit": progress.commit,
            "commit_of_test": self.environment["commit"],
            "recipe": recorded,
        }

    def _upload(self) -> None:
        repo_id = self.recipe.hub.repo_id
        try:
            commit = upload_directory(self.run.model, repo_id, commit_message=f"{self.recipe.epochs} epochs")
            self.say(f"uploaded to {commit.repo_url}, revision {commit.oid}")
        except (OSError, ValueError) as error:
            again = f"python training/export.py --run {self.run.path} --push --repo_id {repo_id}"
            self.say(f"the upload failed, the run is complete; repeat it with\n    {again}\n{error}")


if __name__ == "__main__":
    main()
