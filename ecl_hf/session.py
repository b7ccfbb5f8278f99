"""What a training is set up from: data, model, stages, loaders and checkpoints, on this process's device.

The loop over epochs and steps is in `training/train.py`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import (
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    set_seed,
)
from jsonargparse import Namespace
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from ecl_hf.data.features import FeatureDataset, digest_pictures, feature_loader, in_batches
from ecl_hf.data.loaders import ViewDataset, draw_seed, evaluation_loader, fitting, train_loader
from ecl_hf.data.longtailed import LongTailedData, load_longtailed
from ecl_hf.data.official import BENCHMARKS
from ecl_hf.data.overview import describe_classes, describe_pictures
from ecl_hf.data.pictures import BrokenPictureError
from ecl_hf.data.sources import labels_of
from ecl_hf.data.streaming import StreamedViews, StreamSampler, stream_loader
from ecl_hf.data.views import View, contrastive_view, evaluation_view, supervised_view
from ecl_hf.evidence.evaluation import Predictions, predict
from ecl_hf.evidence.metrics import shot_groups
from ecl_hf.learning.batchnorm import load_statistics, synchronise_batchnorm
from ecl_hf.learning.finite import StepCheck, check_saved, check_weights
from ecl_hf.learning.initialise import initialise_model, label_leak, shared_parts
from ecl_hf.learning.memory import checkpoint_blocks, checkpoint_experts, counted_once, keep_freed_memory
from ecl_hf.learning.optimiser import build_optimizer, learning_rate
from ecl_hf.learning.precision import bfloat16_fault
from ecl_hf.learning.stages import begin_heads, check_stages, fold_heads, idle_keys
from ecl_hf.learning.task import CollaborativeTask
from ecl_hf.learning.teachers import load_teacher
from ecl_hf.learning.tuning import (
    FrozenEncoder,
    begin_tuning,
    bootstrap,
    check_kept_features,
    encode,
    read_features,
    start_at_class_means,
    takes_class_means,
    write_features,
)
from ecl_hf.methods import METHODS
from ecl_hf.publishing.hub import BackgroundUpload, check_upload, write_card
from ecl_hf.runs.folder import Forecast, Progress, RunFolder, describe_environment, describe_model, flatten
from ecl_hf.runs.launch import check_launch
from ecl_hf.runs.recipe import Recipe

CARD = Path(str(files("ecl_hf.hub_cards") / "model_card.md"))


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


def keep_own_buffers(task: DistributedDataParallel) -> None:
    """Let each process have running statistics of its own, where every forward would copy those of the main process.

    torch has a new name for this since 2.14, which Accelerate does not know, and warns of the old one.
    """
    name = "forward_sync_buffers" if hasattr(task, "forward_sync_buffers") else "broadcast_buffers"
    setattr(task, name, False)


def or_exit(batches: Iterable, recipe: Recipe) -> Iterator:
    """The same batches; one that can't be read ends the program with the name of the picture."""
    with refusing(recipe):
        yield from batches


def say(text: str) -> None:
    """Print above a progress bar, and at once where the output goes to a file."""
    tqdm.write(text)
    sys.stdout.flush()


def set_process_timeout(timeout: timedelta) -> None:
    """Let processes wait so long for each other from now on."""
    if hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout(timeout)
    else:  # its name in older versions
        torch.distributed.distributed_c10d._set_pg_timeout(timeout)


def with_gaps(tensor: torch.Tensor, left_out: Sequence[int]) -> torch.Tensor:
    """Rows of what was left out put back, [M, ...] -> [N, ...]: -1 for whole numbers, else 0."""
    whole = tensor.new_full((len(tensor) + len(left_out), *tensor.shape[1:]), 0 if tensor.is_floating_point() else -1)
    there = torch.ones(len(whole), dtype=torch.bool)
    there[list(left_out)] = False
    whole[there] = tensor
    return whole


class Session:
    """A run, set up and restored: what the recipe asks for, on this process's device.

    Args:
        recipe: of the run.
        args: the other flags.
        run: the folder to write.

    Raises:
        ValueError: recipe, data, launch or run folder don't fit; nothing is trained or written before that is known.
        OSError: something can't be read or written.
    """

    def __init__(self, recipe: Recipe, args: Namespace, run: RunFolder) -> None:
        self.recipe, self.run = recipe, run
        self.accelerator = accelerator = self._accelerator(args)
        if args.left_out:
            self.say(f"the recipe is another method's: {recipe.method} does without its {', '.join(args.left_out)}")
        self.processes = accelerator.num_processes
        check_launch(os.environ, self.processes)
        self.method = METHODS[recipe.method]
        experts = self.method.num_experts(recipe.model.num_experts)
        if experts == 1 < self.method.experts.default:
            self.say(
                f"one expert is trained, as the recipe says; {recipe.method} is made for several: "
                f"--model.num_experts {self.method.experts.default}"
            )
        stages, blocks = shared_parts(recipe.model, self.method)
        model = replace(recipe.model, num_experts=experts, share_stages=stages, share_blocks=blocks)
        self.recipe = recipe = replace(recipe, model=model)  # the caller's stays as it is
        self.accumulation = recipe.train.gradient_accumulation_steps
        self.pieces = self.processes * self.accumulation
        if recipe.batch_size % self.pieces:
            raise ValueError(
                f"batch_size {recipe.batch_size} is no multiple of {self.processes} processes x "
                f"{self.accumulation} micro-batches"
            )
        check_stages(
            self.method,
            streaming=recipe.data.streaming,
            pieces=self.pieces,
            processes=self.processes,
            teacher=recipe.model.teacher,
            name=recipe.method,
        )
        self.stage_epochs = recipe.epochs_of_stages
        run.check(recipe, args.resume, args.allow_changes)
        with accelerator.main_process_first():
            self.data = self._load_data()
        images = sum(self.data.class_counts)
        if recipe.batch_size > images:
            raise ValueError(
                f"batch_size {recipe.batch_size} exceeds the training split of {images} images: take "
                f"--batch_size {min(images, 16)}, or up to {images}"
            )
        self.steps_per_epoch = images // recipe.batch_size
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, recipe.train.max_steps or self.total_steps)
        schedules = [stage.schedule for stage in self.method.stages]
        self.lr_factors = [learning_rate(recipe.optim, self.steps_per_epoch, schedule) for schedule in schedules]
        for factor, epochs in zip(self.lr_factors, self.stage_epochs, strict=True):
            factor(0, epochs * self.steps_per_epoch)
        self.teacher = None
        if self.method.teacher:
            teacher = load_teacher(recipe.model.teacher, self.data.class_names, self.method.teacher)
            self.teacher = teacher.to(accelerator.device, memory_format=torch.channels_last)
        set_seed(recipe.seed)
        counts, names = self.data.class_counts, self.data.class_names
        self.model = initialise_model(recipe.model, self.method, counts, names, recipe.loss)
        run.expect(self.model)
        if leak := label_leak(recipe.model, recipe.data.source):
            self.say(f"warning: {leak}")
        compiled = recipe.train.compile
        for idle in idle_keys(self.method, recipe.method, recipe.model, self.model, compiled=compiled):
            self.say(f"warning: {idle}")
        if recipe.train.calibration_folds and recipe.model.tune != "head" and not recipe.data.val_fraction:
            self.say(
                "warning: train.calibration_folds does nothing here: it takes model.tune head; data.val_fraction finds "
                "a temperature too"
            )
        self.encoder = None
        if recipe.model.tune != "head":
            self._save_memory()
        describe_model(self.model)
        begin_tuning(self.model, recipe.model)
        if recipe.model.tune == "head":
            where = {"pretrained": recipe.model.pretrained, "streaming": recipe.data.streaming}
            check_kept_features(self.method, recipe.method, **where)
            self.encoder = FrozenEncoder(self.model)
            self._save_memory()
        self.train_set = self._train_set()
        self._build(0)
        self.environment = describe_environment(self.processes, accelerator.device)
        if recipe.hub.push and accelerator.is_main_process:
            check_upload(recipe.hub.repo_id, recipe.hub.private or None)
        accelerator.wait_for_everyone()
        self.checkpoint, self.forecast = None, Forecast()
        if accelerator.is_main_process:
            run.open(recipe, args.resume, args.allow_changes)
            self.checkpoint = None if run.finished else run.resumable_checkpoint(self.say)

    def say(self, text: str) -> None:
        """Print, in the main process, above a progress bar."""
        if self.accelerator.is_main_process:
            say(text)

    @property
    def without_bar(self) -> bool | None:
        """For `tqdm`: no bar but in the main process, and there only on a terminal (None)."""
        return None if self.accelerator.is_main_process else True

    def _load_data(self) -> LongTailedData:
        return load_longtailed(self.recipe.data)

    def _accelerator(self, args: Namespace) -> Accelerator:
        accelerator = Accelerator(
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=self.recipe.train.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=self.recipe.train.connect_timeout))],
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
        if torch.distributed.is_initialized():
            accelerator.wait_for_everyone()
            set_process_timeout(timedelta(minutes=self.recipe.train.timeout))
        if absent := set(args.report_to) - {tracker.value for tracker in accelerator.log_with}:
            raise ValueError(f"report_to: {', '.join(absent)} is not installed")
        if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
            accelerator.native_amp = False  # whether it pays is found out before the first step
        return accelerator

    def _save_memory(self) -> None:
        if self.recipe.train.gradient_checkpointing and self.encoder is None:
            checkpoint_blocks(self.model)
        if self.recipe.train.experts_one_by_one:
            checkpoint_experts(self.model)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()

    def _train_set(self) -> ViewDataset | StreamedViews:
        recipe = self.recipe
        views = {"pixel_values": self._view("supervised")}
        on_error = "replace" if recipe.data.on_error == "skip" else "raise"
        if recipe.data.streaming:
            return StreamedViews(views, recipe.seed, on_error, recipe.data.max_pixels)
        keep, most = recipe.epochs > 1 and self.encoder is None, recipe.data.max_pixels
        return ViewDataset(self.data.train, views, recipe.seed, on_error=on_error, keep=keep, max_pixels=most)

    def _view(self, name: str) -> View:
        config, data = self.model.config.pretrained_cfg, self.recipe.data
        if name == "contrastive":
            return contrastive_view(config, data.horizontal_flip)
        return supervised_view(config, data.augmentation if name == "supervised" else name, data.horizontal_flip)

    def _build(self, stage: int) -> None:
        """Make the task of a stage; the modules that train it, but for those of the stage before, are new."""
        recipe = self.recipe
        begin_heads(self.model, self.method.stages[stage], recipe.loss)
        labels = None if recipe.data.streaming else torch.from_numpy(self.train_set.labels)
        earlier = getattr(self, "plain", None)
        tune = recipe.model.tune
        self.plain = CollaborativeTask(self.model, self.method, recipe.loss, stage, labels, self.teacher, tune)
        if earlier:
            self.plain.adopt(earlier)
        if recipe.optim.ema:
            self.plain.keep_average(recipe.optim.ema)
        if self.data.val is not None and self.plain.stage is self.method.stages[-1]:
            self.plain.keep_best()
        self.plain = self.plain.to(memory_format=torch.channels_last)
        if recipe.train.sync_batchnorm and self.processes > 1:
            self.plain = synchronise_batchnorm(self.plain, self.accelerator.device)
        # Accelerate does not notice that a fused optimizer has left a step out for the loss scaler.
        fused = self.accelerator.scaler is None
        self.fresh_optimizer = build_optimizer(self.plain, recipe.optim, self.plain.stage, recipe.loss, fused)
        views = {"pixel_values": self._view("supervised")}
        if "momentum" in self.plain.stage.needs:
            views["contrast_pixel_values"] = self._view("contrastive")
        self.train_set.views = views | {f"view_{n}": self._view(v) for n, v in enumerate(self.plain.stage.views)}

    def _prepare(self, stage: int) -> None:
        """Bring task, optimizer and loader of a stage to the device."""
        recipe, accelerator = self.recipe, self.accelerator
        self.loader = self._train_loader()
        set_seed(self._seed(stage), device_specific=True)
        self.task, self.optimizer = accelerator.prepare(self.plain, self.fresh_optimizer)
        if isinstance(self.task, DistributedDataParallel):
            keep_own_buffers(self.task)
        if recipe.train.compile:
            self.plain.compile_encoders()
        repeating = recipe.train.gradient_checkpointing or recipe.train.experts_one_by_one
        self.around_backward = partial(counted_once, self.plain) if repeating else nullcontext
        self.undo = recipe.train.on_nonfinite == "skip"
        self.check = StepCheck(self.plain, accelerator.reduce, gradients=accelerator.scaler is None, undo=self.undo)

    @property
    def mixed_precision(self) -> str:
        """Of the forward: Accelerate's, but for bfloat16 on a CPU, which is tried first."""
        return self.progress.mixed_precision or self.accelerator.mixed_precision

    def _choose_precision(self, batch: dict[str, torch.Tensor]) -> None:
        """Take bfloat16 on a CPU only if it gives a batch's numbers, and faster; a resumed run does as before."""
        accelerator = self.accelerator
        if self.progress.mixed_precision or accelerator.native_amp or accelerator.mixed_precision != "bf16":
            return
        started = time.perf_counter()
        [fault] = broadcast_object_list([bfloat16_fault(self.plain, batch)])
        self.progress.seconds -= time.perf_counter() - started  # no training: it would spoil the epoch's images/s
        self.progress.mixed_precision = "no" if fault else "bf16"
        if fault:
            self.say(f"bfloat16 is left off: {fault}")

    def _in_precision(self) -> torch.autocast | nullcontext:
        """What the forward runs in where Accelerate does not see to it."""
        half = self.progress.mixed_precision == "bf16" and not self.accelerator.native_amp
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    def _seed(self, stage: int) -> int:
        """The recipe's seed, and another one for each later stage."""
        return draw_seed(self.recipe.seed, stage) if stage else self.recipe.seed

    def _train_loader(self) -> DataLoader:
        recipe, stage = self.recipe, self.plain.stage
        sizes = (recipe.batch_size, self.pieces, recipe.data.num_workers)
        if not recipe.data.streaming:
            samplers = (stage.sampler, stage.partners, recipe.loss)
            if self.encoder:
                return self.accelerator.prepare(feature_loader(self.train_set, *sizes[:2], *samplers))
            return self.accelerator.prepare(train_loader(self.train_set, *sizes, *samplers))
        images = sum(self.data.class_counts)
        share = (recipe.batch_size, self.accelerator.process_index, self.processes, recipe.data.shuffle_buffer)
        loader = stream_loader(StreamSampler(self.train_set, self.data.train, images, *share), *sizes)
        # Each process has its part already: Accelerate moves the batches and divides nothing.
        return prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True)

    def _evaluation_loader(self, part: str) -> DataLoader:
        config, data = self.model.config.pretrained_cfg, self.recipe.data
        on_error = "mark" if data.on_error == "skip" else "raise"
        loader = evaluation_loader(
            getattr(self.data, part),
            evaluation_view(config),
            fitting(256, config["input_size"]),
            data.num_workers,
            split=part,
            on_error=on_error,
            max_pixels=data.max_pixels,
        )
        return self.accelerator.prepare(loader)

    def _keep_features(self) -> None:
        """Let the frozen encoder look at all pictures once, or read what it saw, and train on that from here on."""
        accelerator = self.accelerator
        parts = {"train": self.data.train, "val": self.data.val, "test": self.data.test}
        parts = {part: pictures for part, pictures in parts.items() if pictures is not None}
        fingerprint = kept = None
        if accelerator.is_main_process:
            fingerprint = self._fingerprint(parts)
            kept = read_features(self.run.features_file, fingerprint)
        [there, fingerprint] = broadcast_object_list([kept is not None, fingerprint])
        if not there:
            started, kept = time.perf_counter(), {}
            for part in parts:
                loader = self._evaluation_loader(part)
                batches = tqdm(loader, f"features, {part}", disable=self.without_bar, leave=False)
                mirrored = part == "test" or (part == "train" and self.recipe.data.horizontal_flip)
                with refusing(self.recipe):
                    found = encode(self.encoder, batches, mirrored, accelerator.gather_for_metrics)
                kept |= {f"{part}.{name}": tensor for name, tensor in found.items()}
            if accelerator.is_main_process:
                write_features(self.run.features_file, kept, fingerprint)
            images = sum(map(len, parts.values()))
            self.progress.feature_seconds += time.perf_counter() - started
            self.say(f"features of {images} pictures: {self.progress.feature_seconds:.1f} s; kept in the run folder")
        elif not accelerator.is_main_process:
            kept = read_features(self.run.features_file, fingerprint)
        broken = torch.nonzero(~kept["train.there"])[:, 0].tolist()
        self.progress.broken = self.train_set.defects(broken)
        self._learn_from(kept)

    def _learn_from(self, kept: dict[str, torch.Tensor]) -> None:
        """Train on kept features (`train.features`, `train.there` and those of the other parts)."""
        labels, views = self.train_set.labels, self.train_set.views
        with refusing(self.recipe):
            self.train_set = FeatureDataset(kept["train.features"], labels, kept["train.there"], self.recipe.seed)
        self.train_set.views = views
        self.kept = kept

    def _fingerprint(self, parts: dict[str, datasets.Dataset]) -> str:
        """Of all that the features of pictures depend on."""
        data, model = self.recipe.data, self.model.config
        pictures = [[part, digest_pictures(rows), labels_of(rows).tolist()] for part, rows in parts.items()]
        views = [data.horizontal_flip, data.max_pixels, model.architecture, model.model_args, model.pretrained_cfg]
        return hashlib.sha256(json.dumps([pictures, views]).encode() + self.encoder.digest()).hexdigest()

    def _start_heads(self) -> None:
        """Give the heads of a new stage the class means to start from, if the recipe asks for them."""
        if self.recipe.model.head_init == "class_means" and not self.recipe.data.streaming:
            labels, _, features = self._predict_training_set(self.model)
            labels, features = labels[labels >= 0], features[labels >= 0]
            for k, expert in enumerate(self.model.experts):
                rows = torch.arange(len(labels))
                if k and torch.equal(features[:, k], features[:, 0]):
                    rows = bootstrap(labels, draw_seed(self.recipe.seed, self.progress.stage, k))
                for head in (expert.head, *(self.plain.references or [])[k : k + 1]):
                    if takes_class_means(head, self.plain.stage):
                        start_at_class_means(head, features[rows, k], labels[rows], self.recipe.model.classifier_scale)
            if self.plain.average is not None:
                self.plain.average.set(self.model)

    def _describe_data(self) -> None:
        """Say what was found in pictures of one's own; of a protocol, the line before the first step says enough."""
        config, data = self.recipe.data, self.data
        if config.profile != "as_is" or config.source in BENCHMARKS:
            return
        groups = {name: int(mask.sum()) for name, mask in shot_groups(data.class_counts).items()}
        parts = {"train": data.train, "val": data.val, "test": data.test}
        others = {"validation": data.val, "testing": data.test}
        numbers = {name: len(part) for name, part in others.items() if part is not None}
        lines = describe_classes(data.class_counts, data.class_names, groups, numbers)
        if not config.streaming:
            stored = {name: part for name, part in parts.items() if part is not None}
            lines += describe_pictures(stored, config.max_pixels)
        self.say("\n".join(lines))

    def restore(self) -> None:
        """Begin the first stage, or the one of the checkpoint if there is one, as it stood there."""
        recipe, accelerator = self.recipe, self.accelerator
        self.add_card = partial(
            write_card,
            template=CARD,
            config=self.model.config,
            repo_id=recipe.hub.repo_id,
            license=recipe.hub.license,
        )
        self.upload = None
        if recipe.hub.every and accelerator.is_main_process:
            self.upload = BackgroundUpload(recipe.hub.repo_id, say)
        accelerator.init_trackers("ecl_hf", {key: str(value) for key, value in flatten(asdict(recipe)).items()})
        [checkpoint] = broadcast_object_list([self.checkpoint])
        if accelerator.is_main_process and not checkpoint:
            self._describe_data()
        sizes = (sum(self.data.class_counts), recipe.batch_size)
        self.progress = Progress(commit=self.environment["commit"]).counted_anew(*sizes)
        try:
            if checkpoint:
                self.progress = self.run.read_progress(checkpoint)
                self.progress.check(self.stage_epochs, *sizes, self.accumulation)
                self.progress = self.progress.counted_anew(*sizes)
                self.last_step = max(self.last_step, self.progress.step)  # train.max_steps may lie behind by now
                for stage in range(1, self.progress.stage + 1):
                    fold_heads(self.model)
                    self._build(stage)
            if self.encoder:
                self._keep_features()
            self._prepare(self.progress.stage)
            if not checkpoint:
                self._start_heads()
            else:
                groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
                if (weights := Path(checkpoint) / "model.safetensors").exists():
                    check_saved(weights, self.plain)
                accelerator.load_state(checkpoint)
                load_statistics(self.plain, checkpoint, accelerator.process_index)
                check_weights(self.plain)
                for group, own in zip(self.optimizer.param_groups, groups, strict=True):
                    group.update(own)
        except Exception as error:  # of whatever wrote or reads it
            if not checkpoint:
                raise
            sys.exit(f"error: {checkpoint} does not fit this recipe and version: {error}")
        counts = self.data.class_counts
        self.say(
            f"{recipe.method}: {len(self.model.experts)} x {recipe.model.architecture}, {sum(counts)} training "
            f"images, {len(counts)} classes of {max(counts)} to {min(counts)}, {self.processes} process(es) on "
            f"{accelerator.device.type}"
        )
        if checkpoint:
            self.say(f"continuing after step {self.progress.step}")
            if accelerator.is_main_process:
                self.run.mend_log(self.progress, self.say)

    @property
    def complete(self) -> bool:
        """Whether all epochs are trained, or as many as made the model better."""
        return self.progress.step == self.total_steps or self.progress.ended

    @property
    def first_epoch(self) -> int:
        """Of the running stage, in the run."""
        return sum(self.stage_epochs[: self.progress.stage])

    @property
    def end_of_stage(self) -> int:
        """Step of the run at which the running stage, or the whole run, ends."""
        return min(self.last_step, sum(self.stage_epochs[: self.progress.stage + 1]) * self.steps_per_epoch)

    def _context(self) -> dict[str, Any]:
        counts = torch.tensor(self.data.class_counts)
        predicts = partial(self._predict_training_set, self.model)
        return {"model": self.model, "settings": self.recipe.loss, "class_counts": counts, "predict": predicts}

    def _teacher_predicts(self) -> tuple[torch.Tensor, ...]:
        return self._predict_training_set(self.teacher)

    def _predict_training_set(self, model: torch.nn.Module) -> tuple[torch.Tensor, ...]:
        """Labels [N], logits [N, K, C] and features [N, K, D] in the evaluation view, the same in every process.

        Pictures that can't be decoded have the label -1.
        """
        found = self._predict("train", model)
        self.task.train()
        tensors = (found.labels, found.expert_logits, found.features)
        return tensors if not found.left_out else tuple(with_gaps(tensor, found.left_out) for tensor in tensors)

    def _predict(self, part: str, model: torch.nn.Module, **options: bool) -> Predictions:
        """What a model makes of the training, validation or test pictures in the evaluation view.

        Args:
            part: `train`, `val` or `test`.
            model: the ensemble or another one.
            options: of `predict`; features and no mirrored pictures unless they say otherwise.
        """
        options = {"with_features": True, "with_flip": False} | options
        if self.encoder:
            labels = torch.from_numpy(labels_of(getattr(self.data, part)))
            labels = torch.where(self.kept[f"{part}.there"], labels, -1)
            batches = in_batches(self.kept[f"{part}.features"], labels)
            batches = ({name: value.to(self.accelerator.device) for name, value in batch.items()} for batch in batches)
            return predict(model, batches, **options)
        loader = self._evaluation_loader(part)
        if part == "test":
            loader = tqdm(loader, "testing", disable=self.without_bar, leave=False)
        # Compiling for batches of another size takes longer, and what a GPU recorded belongs to training steps
        with torch.compiler.set_stance("force_eager"):
            return predict(model, or_exit(loader, self.recipe), self.accelerator.gather_for_metrics, **options)

    def _picture_weights(self) -> np.ndarray | None:
        weights = [part.picture_weights for part in self.plain.parts.values() if part.picture_weights is not None]
        return weights[0].double().cpu().numpy() if weights else None
