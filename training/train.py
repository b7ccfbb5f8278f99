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
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from huggingface_hub.utils import disable_progress_bars
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from timm.utils import distribute_bn
from tqdm import tqdm

from ecl_hf.batchnorm import synchronise_batchnorm
from ecl_hf.checkpoints import load_statistics, save_statistics
from ecl_hf.collaborative import CollaborativeTask
from ecl_hf.data import load_longtailed
from ecl_hf.evaluation import format_table, predict, summarise
from ecl_hf.finite import StepCheck, check_weights
from ecl_hf.hub import BackgroundUpload, check_upload, write_card
from ecl_hf.initialise import initialise_model
from ecl_hf.interruption import STOPPED, StopRequest, plain_errors
from ecl_hf.launch import check_launch
from ecl_hf.loaders import ViewDataset, evaluation_loader, train_loader
from ecl_hf.methods import METHODS
from ecl_hf.metrics import shot_groups
from ecl_hf.modeling_ecl import upload_directory
from ecl_hf.pictures import BrokenPictureError
from ecl_hf.recipe import Recipe
from ecl_hf.runs import Progress, RunFolder, cosine, describe_environment, describe_model, flatten
from ecl_hf.streaming import StreamedViews, StreamSampler, stream_loader
from ecl_hf.views import contrastive_view, evaluation_view, supervised_view

CARD = Path(__file__).resolve().parents[1] / "hub_cards" / "model_card.md"
SKIP = "data.on_error skip goes on without it"


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


def or_exit(batches: Iterable) -> Iterator:
    """The same batches; a picture that can't be decoded ends the program with its name."""
    try:
        yield from batches
    except BrokenPictureError as error:
        sys.exit(f"error: {error}; {SKIP}")


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, evaluate the last epoch and write the run folder, whose path is returned."""
    recipe, args = parse(argv)
    with plain_errors(), StopRequest() as stop, closing(RunFolder(args.output_dir)) as run:
        return train(recipe, args, run, stop)


def train(recipe: Recipe, args: Namespace, run: RunFolder, stop: StopRequest) -> Path:
    """What `main` says, until `stop` is asked for."""
    datasets.disable_progress_bars()
    disable_progress_bars()  # of uploads, which would mix with those of the training
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    accumulation = recipe.train.gradient_accumulation_steps

    # Everything that the user may have got wrong is found here, before anything is trained.
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=accumulation,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.train.timeout)),
            ],
            log_with=args.report_to or None,
            project_dir=args.output_dir,
        )
        if absent := set(args.report_to) - {tracker.value for tracker in accelerator.log_with}:
            raise ValueError(f"report_to: {', '.join(absent)} is not installed")
        processes = accelerator.num_processes
        say = tqdm.write if accelerator.is_main_process else (lambda _: None)
        check_launch(os.environ, processes)
        if recipe.method not in METHODS:
            raise ValueError(f"unknown method {recipe.method!r}; choose from {', '.join(METHODS)}")
        method = METHODS[recipe.method]
        recipe.model.num_experts = method.experts(recipe.model.num_experts)
        if recipe.batch_size % (processes * accumulation):
            raise ValueError(
                f"batch_size {recipe.batch_size} is no multiple of {processes} processes x {accumulation} micro-batches"
            )
        run.check(recipe, args.resume, args.allow_changes)
        with accelerator.main_process_first():
            data = load_longtailed(recipe.data)
        images = sum(data.class_counts)
        if recipe.batch_size > images:
            raise ValueError(f"batch_size {recipe.batch_size} exceeds the training split of {images} images")
        set_seed(recipe.seed)
        model = initialise_model(recipe.model, method, data.class_counts, data.class_names)
        view_config, skip = model.config.pretrained_cfg, recipe.data.on_error == "skip"
        views = {"pixel_values": supervised_view(view_config, recipe.data.augmentation, recipe.data.horizontal_flip)}
        if "momentum" in method.needs:
            views["contrast_pixel_values"] = contrastive_view(view_config, recipe.data.horizontal_flip)
        on_error = "replace" if skip else "raise"
        if recipe.data.streaming:
            train_set = StreamedViews(views, recipe.seed, on_error)
        else:
            train_set = ViewDataset(data.train, views, recipe.seed, on_error=on_error, keep=recipe.epochs > 1)
        size = describe_model(model)
        environment = describe_environment(processes, accelerator.device)
        if recipe.hub.push and accelerator.is_main_process:
            check_upload(recipe.hub.repo_id, recipe.hub.private or None)
        accelerator.wait_for_everyone()
        checkpoint = None
        if accelerator.is_main_process:
            run.open(recipe, args.resume, args.allow_changes)
            checkpoint = None if run.finished else run.resumable_checkpoint(say)
    except BrokenPictureError as error:
        sys.exit(f"error: {error}; {SKIP}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.resume and run.finished:
        say(f"{run.path} is finished already\n{report(run)}")
        return run.path

    sizes = (recipe.batch_size, processes * accumulation, recipe.data.num_workers)
    if recipe.data.streaming:
        share = (recipe.batch_size, accelerator.process_index, processes, recipe.data.shuffle_buffer)
        loader = stream_loader(StreamSampler(train_set, data.train, images, *share), *sizes)
        # Each process has its part already: Accelerate moves the batches and divides nothing.
        loader = prepare_data_loader(loader, accelerator.device, 1, 0, put_on_device=True)
    else:
        loader = accelerator.prepare(train_loader(train_set, *sizes))
    test = evaluation_loader(
        data.test, evaluation_view(view_config), 256, recipe.data.num_workers, on_error="mark" if skip else "raise"
    )
    task = CollaborativeTask(model, method, recipe.loss).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD((p for p in task.parameters() if p.requires_grad), foreach=True, **asdict(recipe.optim))
    if recipe.train.sync_batchnorm and processes > 1:
        task = synchronise_batchnorm(task, accelerator.device)
    set_seed(recipe.seed, device_specific=True)
    if recipe.train.compile:
        task.compile()
    task, optimizer, test = accelerator.prepare(task, optimizer, test)
    plain = accelerator.unwrap_model(task)

    total_steps = recipe.epochs * (len(loader) // accumulation)
    last_step = min(total_steps, recipe.train.max_steps or total_steps)
    accelerator.init_trackers("ecl_hf", {key: str(value) for key, value in flatten(asdict(recipe)).items()})
    progress = Progress(commit=environment["commit"])
    [checkpoint] = broadcast_object_list([checkpoint])
    if checkpoint:
        try:
            accelerator.load_state(checkpoint)
            load_statistics(plain, checkpoint, accelerator.process_index)
            progress = run.read_progress(checkpoint)
        except Exception as error:  # of whatever wrote or reads it
            sys.exit(f"error: {checkpoint} does not fit this recipe and version: {error}")
        optimizer.param_groups[0].update(asdict(recipe.optim))
        say(f"continuing after step {progress.step}")
    counts = data.class_counts
    say(
        f"{recipe.method}: {len(plain.model.experts)} x {recipe.model.architecture}, {sum(counts)} training images, "
        f"{len(counts)} classes of {max(counts)} to {min(counts)}, {processes} process(es) on {accelerator.device.type}"
    )

    labels = {"repo_id": recipe.hub.repo_id, "license": recipe.hub.license}
    add_card = partial(write_card, template=CARD, config=plain.model.config, **labels)
    upload = None
    if recipe.hub.every and accelerator.is_main_process:
        upload = BackgroundUpload(recipe.hub.repo_id, tqdm.write)
    bar = tqdm(total=last_step, initial=progress.step, unit="step", disable=not accelerator.is_main_process)
    undo = recipe.train.on_nonfinite == "skip"
    check = StepCheck(plain, accelerator.reduce, gradients=accelerator.scaler is None, undo=undo)
    task.train()
    stop.deferred, stopping = True, False
    while progress.step < last_step and not stopping:
        train_set.epoch = progress.epoch
        batches = skip_first_batches(loader, progress.batch)
        sums = {name: torch.tensor(value, device=accelerator.device) for name, value in progress.sums.items()}
        broken = set(progress.broken)
        started = time.perf_counter()
        for batch in or_exit(batches):
            pictures = batch.pop("indices")
            if skip:
                broken.update(batch.pop("broken"))
            with accelerator.accumulate(task):
                out = task(**batch)
                accelerator.backward(out["loss"])
                check.add(out, None if out["keys"] is None else accelerator.gather(out["keys"]), pictures)
                progress.batch += 1
                if not accelerator.sync_gradients:
                    continue
                finite, stopping = check.judge(stop.asked)
                if finite:
                    optimizer.param_groups[0]["lr"] = recipe.optim.lr * cosine(progress.updates, total_steps)
                    optimizer.step()
                    for name, value in check.sums.items():
                        sums[name] = sums.get(name, 0.0) + value
                    if check.keys:
                        plain.enqueue(torch.cat(check.keys))
                elif undo:
                    check.leave_out()
                    progress.missing += accumulation
                else:
                    raise FloatingPointError(check.message(progress.step + 1, gather_object))
                optimizer.zero_grad()
            if finite and not accelerator.optimizer_step_was_skipped:  # as half precision does when gradients overflow
                plain.follow()
            else:
                progress.skipped += 1
            check.begin()
            progress.step += 1
            bar.update()
            if stopping or progress.step == last_step:
                break
        progress.seconds += time.perf_counter() - started
        progress.broken = sorted(set(gather_object(list(broken))), key=in_order)
        progress.sums = {name: accelerator.reduce(value, "mean").item() for name, value in sums.items()}
        lr = recipe.optim.lr * cosine(progress.updates, total_steps)
        line = progress.line(lr, images_per_batch=recipe.batch_size // accumulation)
        bar.set_postfix(epoch=line["epoch"], loss=f"{line.get('loss', math.nan):.3f}")
        accelerator.log({name: value for name, value in line.items() if name != "epoch"}, step=progress.step)
        if accelerator.is_main_process:
            run.log(line)
        ended = progress.batch == len(loader)
        if ended:
            progress = progress.next_epoch()
        if stopping or progress.step == last_step or (ended and progress.epoch % recipe.train.checkpoint_every == 0):
            check_weights(plain)
            with run.writing_checkpoint(progress.step) as folder:
                accelerator.save_state(folder)
                save_statistics(plain, folder, accelerator.process_index)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    run.publish_checkpoint(progress, recipe.train.keep_last)
        if upload and ended and progress.epoch % recipe.hub.every == 0 and progress.step < total_steps:
            upload.offer(plain.model, partial(add_card, results=None), f"Epoch {progress.epoch}")
    bar.close()
    stop.deferred = False
    if stopping:
        accelerator.wait_for_everyone()
        say(f"stopped after step {progress.step}, with a checkpoint; continue with --resume")
        sys.exit(STOPPED)
    if upload:
        upload.wait()
    if processes > 1:  # else the model would know the running statistics of the main process alone
        distribute_bn(plain, processes, reduce=True)

    # The reported numbers are the last epoch's: there is no validation split to choose another by.
    predictions = predict(
        plain.model,
        or_exit(tqdm(test, "testing", disable=not accelerator.is_main_process, leave=False)),
        accelerator.gather_for_metrics,
    )
    if accelerator.is_main_process:
        recorded = asdict(recipe)
        for key in ("path", "train_list", "test_list", "split"):
            if recorded["data"][key]:
                recorded["data"][key] = (
                    Path(recorded["data"][key]).resolve().name
                )  # where it lies is this machine's affair
        results = {
            "method": recipe.method,
            "seed": recipe.seed,
            "finished": progress.step == total_steps,
            "epochs": progress.epoch,
            "steps": progress.step,
            "test": summarise(predictions, counts),
            "test_images": len(predictions.labels),
            "broken_pictures": {
                "train": len(progress.broken),
                "test": len(predictions.left_out),
                "first": progress.broken[:10] + test.dataset.defects(predictions.left_out[:10]),
            },
            "skipped_steps": progress.skipped,
            "class_counts": counts,
            "class_names": data.class_names,
            "shot_groups": {name: int(mask.sum()) for name, mask in shot_groups(counts).items()},
            **size,
            "training_seconds": progress.total_seconds + progress.seconds,
            "mixed_precision": accelerator.mixed_precision,
            **environment,
            "commit": progress.commit,
            "commit_of_test": environment["commit"],
            "recipe": recorded,
        }
        ensemble = results["test"]["plain"]["ensemble"].items()
        accelerator.log({f"test/{name}": value for name, value in ensemble if value is not None}, step=progress.step)
        run.finish(plain.model, partial(add_card, results=results), results)
        say(report(run))
        if broken := results["broken_pictures"]["first"]:
            found = len(progress.broken) + len(predictions.left_out)
            say("\n".join([f"{found} pictures could not be decoded and were skipped:", *broken]))
        if recipe.hub.push and results["finished"]:
            try:
                commit = upload_directory(run.model, recipe.hub.repo_id, commit_message=f"{recipe.epochs} epochs")
                say(f"uploaded to {commit.repo_url}, revision {commit.oid}")
            except (OSError, ValueError) as error:
                again = f"python training/export.py --run {run.path} --push --repo_id {recipe.hub.repo_id}"
                say(f"the upload failed, the run is complete; repeat it with\n    {again}\n{error}")
    accelerator.end_training()
    return run.path


if __name__ == "__main__":
    main()
