"""Classify pictures with an exported model, through the image-classification pipeline.

python training/predict.py --model runs/quickstart/model picture.png ...
python training/predict.py --model runs/photos/model folder 'site_*/*.jpg' --output answers.csv --estimate_prior
python training/predict.py --run runs/quickstart          # some pictures of the run's own test split
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from jsonargparse.typing import PositiveInt
from PIL import Image
from tqdm import tqdm

from ecl_hf import ECLForImageClassification
from ecl_hf.data.folders import find_pictures
from ecl_hf.data.loaders import fitting
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.pictures import BrokenPictureError, decode
from ecl_hf.evidence.calibration import estimate_prior
from ecl_hf.evidence.tables import as_csv
from ecl_hf.flags import FlagParser
from ecl_hf.names import printable
from ecl_hf.pipeline import ECLImageClassificationPipeline
from ecl_hf.runs.folder import RunFolder, write_atomically
from ecl_hf.runs.recipe import Recipe
from ecl_hf.terminal import refusing, speaking

BATCH = 32
Answer = list[dict[str, str | float]]
Picture = tuple[str, Image.Image]


def readable(paths: Sequence[Path], broken: list[str]) -> Iterator[Picture]:
    """Decoded pictures with their paths, one after the other; what is wrong with the others goes into `broken`."""
    for path in paths:
        try:
            # A name may be no UTF-8 on the disk
            yield os.fsencode(path).decode(errors="backslashreplace"), decode({"bytes": None, "path": str(path)})
        except BrokenPictureError as error:
            broken.append(str(error).replace("picture, ", "", 1))


@torch.no_grad()
def frequencies(classify: ECLImageClassificationPipeline, pictures: Iterable[Picture]) -> list[float]:
    """Class frequencies of unlabelled pictures, [C] (`estimate_prior`); ValueError without the model's class counts."""
    model = classify.model
    if (counts := model.config.class_counts) is None:
        raise ValueError("--estimate_prior needs a model that knows the class counts of its training pictures")
    pixels = (classify.image_processor(image, return_tensors="pt")["pixel_values"] for _, image in pictures)
    size, parts = fitting(BATCH, model.config.pretrained_cfg["input_size"]), []
    while batch := list(islice(pixels, size)):
        batch = torch.cat(batch).to(model.device, model.dtype)
        parts.append(model(batch, target_prior=counts).logits.double().softmax(-1).cpu())
    return estimate_prior(torch.cat(parts or [torch.zeros(0, len(counts))]), torch.tensor(counts)).tolist()


def write_answers(file: Path, names: Sequence[str], answers: Sequence[Answer]) -> None:
    """Write a row (CSV) or an entry (JSON) for each picture: path, classes with confidences, disagreement."""
    if file.suffix == ".json":
        entries: list[dict[str, Any]] = [
            {
                "path": name,
                "classes": [{key: answer[key] for key in ("label", "score")} for answer in best],
                **{key: best[0][key] for key in ("disagreement",) if key in best[0]},
            }
            for name, best in zip(names, answers, strict=True)
        ]
        write_atomically(file, json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
        return
    rows = []
    for name, best in zip(names, answers, strict=True):
        row = {"path": name}
        for place, answer in enumerate(best, 1):
            row |= {f"class_{place}": str(answer["label"]), f"confidence_{place}": f"{answer['score']:.6f}"}
        rows.append(row | {"disagreement": f"{best[0]['disagreement']:.6f}"})
    write_atomically(file, as_csv(rows))


def test_pictures(run: RunFolder, how_many: int, broken: list[str]) -> Iterator[Picture]:
    """Pictures of a run's test split with their class names, spread evenly over it; those without picture as above."""
    config = Recipe.of_run(run.recipe_file).data
    data = load_longtailed(config)
    stored = data.test.cast_column("image", datasets.Image(decode=False))
    for i in np.linspace(0, len(stored) - 1, min(how_many, len(stored))).astype(int).tolist():
        record = stored[i]
        try:
            yield data.class_names[record["label"]], decode(record["image"], f"test row {i}", config.max_pixels)
        except BrokenPictureError as error:
            broken.append(str(error))


@speaking()
def main(argv: Sequence[str] | None = None) -> list[list[dict[str, str | float]]]:
    """Print and return the best classes of each picture with their probabilities."""
    parser = FlagParser(prog="predict.py", description=__doc__.split("\n")[0])
    parser.add_argument("images", type=str, nargs="*", help="Picture files, folders, or patterns such as 'a/**/*.jpg'")
    parser.add_argument("--model", type=str | None, help="Directory or Hub repository of the model")
    parser.add_argument(
        "--run", type=Path | None, help="Run folder: its model, and its test pictures if none are given"
    )
    parser.add_argument("--top_k", type=PositiveInt, default=2, help="Classes to print for each picture")
    parser.add_argument("--flip", action="store_true", help="Average the logits of each picture and its mirror image")
    parser.add_argument("--disagreement", action="store_true", help="Also print how much the experts differ, in nats")
    parser.add_argument("--how_many", type=PositiveInt, default=8, help="Test pictures to classify, at most")
    parser.add_argument("--output", type=Path | None, help="Write all answers to this .csv or .json file")
    parser.add_argument(
        "--estimate_prior", action="store_true", help="Find the class frequencies of the pictures, and answer with them"
    )
    args = parser.parse_args(argv)
    if args.output and args.output.suffix not in (".csv", ".json"):
        parser.error(f"output {args.output} must end in .csv or .json")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"output: there is no directory {args.output.parent}")
    if args.run is None and (args.model is None or not args.images):
        parser.error("give --run, or --model with picture files")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    broken: list[str] = []
    with refusing():
        source = args.model or RunFolder(args.run).find_model()
        if args.images:
            paths = find_pictures(args.images)
            pictures = partial(readable, paths, broken)
        else:
            pictures = partial(test_pictures, RunFolder(args.run), args.how_many, broken)
        model = ECLForImageClassification.from_pretrained(source).eval()
        # By the configuration, which was checked; a repository's file for the processor could say anything
        processor = transformers.TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
        classify = ECLImageClassificationPipeline(model=model, image_processor=processor)
        wanted = {"top_k": args.top_k, "flip": args.flip, "disagreement": args.disagreement or args.output is not None}
        if args.estimate_prior:
            prior = frequencies(classify, pictures())
            broken.clear()  # they come again
            wanted["target_prior"] = prior
            order = np.argsort(prior)[::-1].tolist()
            found = (f"{printable(model.config.id2label[c])} {100 * prior[c]:.1f} %" for c in order[:20])
            print("estimated class frequencies: " + ", ".join(found) + (", ..." if len(prior) > 20 else ""))
        names: list[str] = []
        answers: list[Answer] = []

        def images() -> Iterator[Image.Image]:
            for name, image in pictures():
                names.append(name)
                yield image

        size = fitting(BATCH, model.config.pretrained_cfg["input_size"])
        with tqdm(total=len(paths) if args.images else None, unit="picture", leave=False, disable=None) as bar:
            for best in classify(images(), batch_size=size, **wanted):
                answers.append(best)
                bar.update(len(answers) + len(broken) - bar.n)
        if not answers:
            raise ValueError("none of the pictures can be decoded: " + "; ".join(broken[:10]))
        if args.output:
            write_answers(args.output, names, answers)
            print(f"{args.output}: {len(answers)} pictures")
    if not args.output:
        shown_names = [printable(name, 300) for name in names]
        width = 2 + max(map(len, ["picture", *shown_names]))
        print(f"\n{'picture':{width}}prediction of {source}")
        for name, best in zip(shown_names, answers, strict=True):
            differ = f"  disagreement {best[0]['disagreement']:.3f}" if args.disagreement else ""
            classes = "  ".join(f"{printable(answer['label'])} {answer['score']:.2f}" for answer in best)
            print(f"{name:{width}}" + classes + differ)
    if broken:
        print("\n".join([f"{len(broken)} pictures could not be decoded:", *(printable(b, 300) for b in broken)]))
    return answers


if __name__ == "__main__":
    main()
