"""Test a trained model on the test split of a recipe's data: a run, a directory or a Hub repository; on any processes.

    python training/evaluate.py --run runs/c100 --landscape_images 1000
    python training/evaluate.py --model runs/c100/model --recipe runs/c100/recipe.yaml --output test.json
    accelerate launch training/evaluate.py --model me/ecl --recipe cifar100_lt --data.path DIR
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -- training/evaluate.py --run runs/c100    # mind the --

Scores, small tables and small pictures of mistakes go to a JSON file; beside it larger arrays go to an .npz file, and
the scores of each class to a .csv file. `figures.py` draws from the first two.
"""

import json
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from ecl_hf import ECLForImageClassification
from ecl_hf.data.config import DataConfig
from ecl_hf.data.loaders import evaluation_loader, fitting
from ecl_hf.data.longtailed import LongTailedData, load_longtailed
from ecl_hf.data.pictures import BrokenPictureError, decode, lies_outside
from ecl_hf.data.views import evaluation_view
from ecl_hf.evidence.analysis import (
    collect_transfer,
    pairwise_feature_distance,
    posthoc_accuracy,
    sample_features,
    shifted_accuracy,
)
from ecl_hf.evidence.classes import class_rows, classes_csv, mistakes, thumbnail
from ecl_hf.evidence.evaluation import Predictions, format_table, measure_speed, predict, summarise
from ecl_hf.evidence.head_norms import diagnose
from ecl_hf.evidence.landscape import landscape
from ecl_hf.evidence.metrics import class_accuracy, confusion_matrix, reliability_table
from ecl_hf.files import read_object, replacing
from ecl_hf.flags import FlagParser
from ecl_hf.heads import create_head
from ecl_hf.methods import METHODS
from ecl_hf.methods.ecl import BALANCED, BALANCED_DETACHED, INVERTED, SHUFFLED
from ecl_hf.names import printable
from ecl_hf.runs.checkpoints import find_defect
from ecl_hf.runs.folder import RunFolder, describe_environment, describe_model, write_atomically
from ecl_hf.runs.recipe import Recipe
from ecl_hf.terminal import refusing, speaking

TAUS = tuple(round(-1 + 0.1 * step, 1) for step in range(31))
MAGNITUDES = tuple(round(-1 + 0.1 * step, 1) for step in range(21))
DIRECTIONS = 5
SPEED_BATCH = 32
REPLACE = {"raise": "raise", "skip": "replace"}
MARK = {"raise": "raise", "skip": "mark"}
"""By `data.on_error`: what becomes of a broken picture in a figure, and in the test, where it is left out."""


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the flags; a run stands for its model, its recipe and an output in its folder."""
    parser = FlagParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path | None, help="Run folder: tests its model, writes evaluation.json into it")
    parser.add_argument("--model", type=str | None, help="Directory or Hub repository of the model")
    parser.add_argument(
        "--recipe", type=str | None, help="Recipe whose data section names the test split: file or name"
    )
    parser.add_argument("--data.path", type=str | None, help="Local directory instead of the recipe's source")
    parser.add_argument(
        "--batch_size", type=PositiveInt | None, help="Images of one forward in each process; by itself 256 small ones"
    )
    parser.add_argument("--output", type=Path | None, help="JSON file to write; arrays and classes go beside it")
    parser.add_argument(
        "--landscape_images",
        type=NonNegativeInt,
        default=0,
        help="Test images of the loss landscape (Fig. 8); 0 leaves it out",
    )
    args = parser.parse_args(argv)
    if args.run is not None:
        if args.recipe or args.model:
            parser.error("--run stands for the run's own model and recipe: give either --run, or --model with --recipe")
        run = RunFolder(args.run)
        args.model, args.recipe = str(run.model), run.recipe_file
        args.output = args.output or run.path / "evaluation.json"
    if args.model is None or args.recipe is None:
        parser.error("give --run, or --model with --recipe")
    return args


def reference_heads(run: RunFolder, model: ECLForImageClassification) -> nn.ModuleList:
    """The reference heads in a run's newest checkpoint.

    Raises:
        OSError: it has none.
        ValueError: it is damaged, or of another model; the message names it.
    """
    if (checkpoint := run.newest_checkpoint()) is None:
        raise FileNotFoundError(f"no weights of the reference heads in {run.checkpoints}")
    run.expect(model)
    if defect := find_defect(checkpoint, run.most):
        raise ValueError(f"{checkpoint}: {defect}")
    file = checkpoint / "model.safetensors"
    heads = nn.ModuleList(create_head(model.config, expert.head.in_features) for expert in model.experts)
    try:
        with safe_open(file, "pt") as weights:
            heads.load_state_dict({name: weights.get_tensor(f"references.{name}") for name in heads.state_dict()})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} does not hold this model's reference heads: {error}") from error
    return heads.to(model.device).eval()


def transfer_arrays(
    accelerator: Accelerator, model: ECLForImageClassification, run: RunFolder, data: LongTailedData, batch_size: int
) -> dict[str, np.ndarray]:
    """Fig. 2 of a run, over its training split; each process takes a part of the images."""
    recipe = Recipe.of_run(run.recipe_file)
    if recipe.data.streaming:
        accelerator.print("Fig. 2 is left out: the training pictures are streamed")
        return {}
    terms = {term for stage in METHODS[recipe.method].stages for term in stage.terms}
    if len(model.experts) == 1 or {SHUFFLED, INVERTED} & terms:
        accelerator.print(
            f"Fig. 2 is left out: {recipe.method} transfers nothing between experts, or not as Eq. 6 has it"
        )
        return {}
    references = None
    if any("reference" in term.needs for term in terms):
        try:
            references = reference_heads(run, model)
        except (OSError, ValueError) as error:
            accelerator.print(f"Fig. 2 is left out: {error}")
            return {}
    rows = range(accelerator.process_index, len(data.train), accelerator.num_processes)
    view = evaluation_view(model.config.pretrained_cfg)
    on_error = REPLACE[recipe.data.on_error]
    settings = (batch_size, recipe.data.num_workers, "train", on_error, recipe.data.max_pixels)
    loader = evaluation_loader(data.train.select(rows), view, *settings)
    arrays = collect_transfer(
        model,
        references,
        ({name: batch[name].to(accelerator.device) for name in ("pixel_values", "labels")} for batch in loader),
        weighted=bool({BALANCED, BALANCED_DETACHED} & terms),
        temperature=getattr(recipe.loss, "temperature", 1.0),
        reduce=lambda tensor: accelerator.reduce(tensor, "sum"),
    )
    return {f"transfer_{name}": values for name, values in arrays.items()}


def landscape_arrays(
    accelerator: Accelerator,
    model: ECLForImageClassification,
    data: LongTailedData,
    how_many: int,
    batch_size: int,
    config: DataConfig,
) -> dict[str, np.ndarray]:
    """Fig. 8 on some test images; each process takes some of the directions."""
    rows = np.random.default_rng(0).permutation(len(data.test))[:how_many]
    loader = evaluation_loader(
        data.test.select(np.sort(rows)),
        evaluation_view(model.config.pretrained_cfg),
        batch_size,
        on_error=REPLACE[config.on_error],
        max_pixels=config.max_pixels,
    )
    batches = [{name: batch[name].to(accelerator.device) for name in ("pixel_values", "labels")} for batch in loader]
    mine = list(range(DIRECTIONS))[accelerator.process_index :: accelerator.num_processes]
    points = landscape(model, batches, MAGNITUDES, mine)
    curves = {seed: (points["loss"][s], points["accuracy"][s]) for s, seed in enumerate(mine)}
    curves = {seed: curve for part in gather_object([curves]) for seed, curve in part.items()}
    loss, accuracy = (torch.stack([curves[seed][i] for seed in range(DIRECTIONS)]).numpy() for i in (0, 1))
    return {"landscape_loss": loss, "landscape_accuracy": accuracy, "landscape_magnitudes": np.array(MAGNITUDES)}


def score_tables(predictions: Predictions, counts: list[int], carried: torch.Tensor) -> dict[str, Any]:
    """Reliability of the ensemble and each expert, top-1 over tau, and top-1 under shifted test distributions."""
    ensemble = predictions.ensemble_logits

    def reliability(logits: torch.Tensor) -> dict[str, list]:
        return reliability_table(logits.double().softmax(-1), predictions.labels)

    return {
        "reliability": {
            way: {"ensemble": reliability(combined), "experts": [reliability(z) for z in logits.unbind(1)]}
            for way, (combined, logits) in predictions.ways.items()
        },
        "posthoc": posthoc_accuracy(predictions.expert_logits, ensemble, predictions.labels, counts, TAUS),
        "shifted": shifted_accuracy(ensemble, predictions.labels, counts, carried),
    }


def class_tables(
    predictions: Predictions, data: LongTailedData, counts: list[int], carried: torch.Tensor, max_pixels: int
) -> dict[str, Any]:
    """Scores of each class, the worst classes and the most confused pairs, with small pictures of the mistakes.

    Reports are published: of files outside of the data set there are no pictures.
    """
    logits, labels = predictions.ensemble_logits, predictions.labels
    stored = data.test.cast_column("image", datasets.Image(decode=False))
    places = np.delete(np.arange(len(stored)), predictions.left_out)

    hidden = set()

    def picture(position: int) -> str | None:
        record = stored[int(places[position])]["image"]
        if lies_outside(record, data.folders):
            hidden.add(position)
            return None
        try:
            return thumbnail(decode(record, max_pixels=max_pixels))
        except BrokenPictureError:
            return None

    rows = class_rows(logits, labels, counts, carried)
    tables = {"classes": rows, **mistakes(logits, labels, rows, picture)}
    if hidden:
        print(f"{len(hidden)} pictures of mistakes are not shown: they lie outside of the data set's folder")
    return tables


def class_arrays(predictions: Predictions, counts: list[int]) -> dict[str, np.ndarray]:
    """Class accuracies (ensemble first), the ensemble's confusion, feature distances, features of the first expert."""
    labels, classes = predictions.labels, len(counts)
    arrays = {}
    for way, (combined, logits) in predictions.ways.items():
        rows = torch.cat([combined[:, None], logits], dim=1).argmax(-1).unbind(1)
        arrays[f"class_accuracy_{way}"] = torch.stack([class_accuracy(row, labels, classes) for row in rows]).numpy()
    ensemble = predictions.ensemble_logits.argmax(-1)
    arrays["confusion"] = confusion_matrix(ensemble, labels, classes).to(torch.int32).numpy()
    arrays["feature_distance"] = pairwise_feature_distance(predictions.features, labels, classes).numpy()
    sample = sample_features(predictions.features[:, 0], labels, counts)
    return arrays | {f"sampled_{name}": values for name, values in sample.items()}


def check_output(output: Path) -> None:
    """See that the files can be written: beside nothing, or over those of an earlier call."""
    if output.suffix != ".json":
        raise ValueError(f"output {output} must be a .json file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: there is no directory {output.parent}")
    try:
        old = read_object(output) if output.exists() else {}
    except ValueError as error:
        raise ValueError(f"output {output} is there, and is no JSON file of this script: {error}") from error
    if "recipe" in old:
        raise ValueError(f"output {output} holds the results of a training; choose another file")


def write(output: Path, results: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write the three files."""
    with replacing(output.with_suffix(".npz")) as new, new.open("xb") as file:
        np.savez_compressed(file, **arrays)
    write_atomically(output.with_suffix(".csv"), classes_csv(results["classes"], results["class_names"]))
    write_atomically(output, json.dumps(results, indent=1) + "\n")


@speaking()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print, write and return the scores of the ensemble and of each expert, without and with flip."""
    args = parse(argv)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    accelerator = Accelerator()
    try:
        if args.run is not None:
            RunFolder(args.run).find_model()
        if args.output:
            check_output(args.output)
        config = (Recipe.from_file if args.run is None else Recipe.of_run)(args.recipe).data
        config.path = args.data.path or config.path
        with accelerator.main_process_first():
            data = load_longtailed(config)
        model = ECLForImageClassification.from_pretrained(args.model)
        names = [model.config.id2label[c] for c in range(model.config.num_labels)]
        if wrong := next((pair for pair in zip_longest(names, data.class_names) if pair[0] != pair[1]), None):
            raise ValueError(f"{args.model} and the data set have different classes: {wrong[0]!r} against {wrong[1]!r}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    size = model.config.pretrained_cfg["input_size"]
    args.batch_size = args.batch_size or fitting(256, size)
    loader = evaluation_loader(
        data.test,
        evaluation_view(model.config.pretrained_cfg),
        args.batch_size,
        config.num_workers,
        on_error=MARK[config.on_error],
        max_pixels=config.max_pixels,
    )
    pictures = loader.dataset
    model, loader = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(loader)
    plain = accelerator.unwrap_model(model)
    bar = tqdm(loader, "testing", disable=None if accelerator.is_main_process else True, leave=False)
    counts = plain.config.class_counts or data.class_counts
    arrays = {}
    try:
        predictions = predict(plain, bar, accelerator.gather_for_metrics, with_features=args.output is not None)
        if not len(predictions.labels):
            sys.exit(f"error: none of {len(data.test)} test pictures can be decoded")
        if args.run is not None:
            arrays |= transfer_arrays(accelerator, plain, RunFolder(args.run), data, args.batch_size)
        if args.landscape_images:
            arrays |= landscape_arrays(accelerator, plain, data, args.landscape_images, args.batch_size, config)
    except BrokenPictureError as error:
        sys.exit(f"error: {error}; data.on_error skip in the recipe leaves it out")
    results = {
        "model": args.model,
        "weighted_on": plain.config.weighted_on,
        "test": summarise(predictions, counts),
        "test_images": len(predictions.labels),
        "broken_pictures": {"test": len(predictions.left_out), "first": pictures.defects(predictions.left_out[:10])},
        "class_counts": counts,
        "class_names": data.class_names,
        **describe_model(plain),
        **describe_environment(accelerator.num_processes, accelerator.device),
    }
    if accelerator.is_main_process:
        for name in ("plain", "flip"):
            table = format_table(results["test"][name])
            print(f"{args.model} on {len(predictions.labels)} test images, {name}, in %\n{table}")
        if plain.config.weighted_on:
            print(f"the experts' weights were found on {printable(plain.config.weighted_on)}, without labels")
        if advice := diagnose(plain):
            print(advice)
        if predictions.left_out:
            print(f"{len(predictions.left_out)} test images could not be decoded and are left out:")
            print(*results["broken_pictures"]["first"], sep="\n")
        if args.output:
            batch = torch.zeros(fitting(SPEED_BATCH, size), *size, device=plain.device)
            results |= {"images_per_second": measure_speed(plain, batch), "landscape_images": args.landscape_images}
            carried = torch.as_tensor(plain.carried_prior())
            results |= {"logit_prior": plain.config.logit_prior} | score_tables(predictions, counts, carried)
            results |= class_tables(predictions, data, counts, carried, config.max_pixels)
            arrays |= class_arrays(predictions, counts)
            with refusing():
                write(args.output, results, arrays)
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
