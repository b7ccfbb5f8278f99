"""Test a trained model on the test split of a recipe's data: a directory or a Hub repository, on one or many processes.

python training/evaluate.py --model runs/c100/model --recipe runs/c100/recipe.yaml --output test.json
accelerate launch training/evaluate.py --model me/ecl-c100 --recipe training/recipes/cifar100_lt.yaml --data.path DIR
"""

import json
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import Accelerator
from jsonargparse import ArgumentParser
from tqdm import tqdm

from ecl_hf import ECLForImageClassification
from ecl_hf.data import load_longtailed
from ecl_hf.evaluation import format_table, predict, summarise
from ecl_hf.loaders import evaluation_loader
from ecl_hf.recipe import Recipe
from ecl_hf.runs import describe_environment, describe_model, write_atomically
from ecl_hf.views import evaluation_view


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print, write and return the scores of the ensemble and of each expert, without and with flip."""
    parser = ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=str, required=True, help="Directory or Hub repository of the model")
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file whose data section names the test split")
    parser.add_argument("--data.path", type=str | None, help="Local directory instead of the recipe's source")
    parser.add_argument("--batch_size", type=int, default=256, help="Images of one forward in each process")
    parser.add_argument("--output", type=Path | None, help="JSON file to write")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    accelerator = Accelerator()
    try:
        config = Recipe.from_file(args.recipe).data
        config.path = args.data.path or config.path
        with accelerator.main_process_first():
            data = load_longtailed(config)
        model = ECLForImageClassification.from_pretrained(args.model)
        names = [model.config.id2label[c] for c in range(model.config.num_labels)]
        if wrong := next((pair for pair in zip_longest(names, data.class_names) if pair[0] != pair[1]), None):
            raise ValueError(f"{args.model} and the data set have different classes: {wrong[0]!r} against {wrong[1]!r}")
        if args.output and not args.output.parent.is_dir():
            raise FileNotFoundError(f"output: there is no directory {args.output.parent}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    loader = evaluation_loader(
        data.test, evaluation_view(model.config.pretrained_cfg), args.batch_size, config.num_workers
    )
    model, loader = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(loader)
    plain = accelerator.unwrap_model(model)
    bar = tqdm(loader, "testing", disable=not accelerator.is_main_process, leave=False)
    counts = plain.config.class_counts or data.class_counts
    predictions = predict(plain, bar, accelerator.gather_for_metrics)
    results = {
        "model": args.model,
        "test": summarise(predictions, counts),
        "test_images": len(predictions.labels),
        "class_counts": counts,
        "class_names": data.class_names,
        **describe_model(plain),
        **describe_environment(accelerator.num_processes, accelerator.device),
    }
    if accelerator.is_main_process:
        for name in ("plain", "flip"):
            print(f"{args.model} on {len(data.test)} test images, {name}, in %\n{format_table(results['test'][name])}")
        if args.output:
            # Into a run's own results go the scores alone: what they say of the training stays.
            run = json.loads(args.output.read_text()) if args.output.exists() else {}
            new = {key: results[key] for key in ("test", "test_images")} if "recipe" in run else results
            write_atomically(args.output, json.dumps(run | new, indent=1) + "\n")
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
