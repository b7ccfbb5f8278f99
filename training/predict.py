"""Classify pictures with an exported model, through the image-classification pipeline.

python training/predict.py --model runs/quickstart/model picture.png ...
python training/predict.py --run runs/quickstart          # some pictures of the run's own test split
"""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import transformers
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from PIL import Image

from ecl_hf import ECLForImageClassification
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.pictures import decode
from ecl_hf.names import printable
from ecl_hf.pipeline import ECLImageClassificationPipeline
from ecl_hf.runs.folder import RunFolder
from ecl_hf.runs.recipe import Recipe
from ecl_hf.terminal import refusing


def test_pictures(run: RunFolder, how_many: int) -> list[tuple[str, Image.Image]]:
    """Pictures of a run's test split with their class names, spread evenly over it."""
    config = Recipe.from_file(run.recipe_file).data
    data = load_longtailed(config)
    stored = data.test.cast_column("image", datasets.Image(decode=False))
    rows = np.linspace(0, len(stored) - 1, how_many).astype(int).tolist()
    return [
        (data.class_names[stored[i]["label"]], decode(stored[i]["image"], f"test row {i}", config.max_pixels))
        for i in rows
    ]


def main(argv: Sequence[str] | None = None) -> list[list[dict[str, str | float]]]:
    """Print and return the best classes of each picture with their probabilities."""
    parser = ArgumentParser(prog="predict.py", description=__doc__.split("\n")[0])
    parser.add_argument("images", type=Path, nargs="*", help="Picture files")
    parser.add_argument("--model", type=str | None, help="Directory or Hub repository of the model")
    parser.add_argument(
        "--run", type=Path | None, help="Run folder: its model, and its test pictures if none are given"
    )
    parser.add_argument("--top_k", type=PositiveInt, default=2, help="Classes to print for each picture")
    parser.add_argument("--flip", action="store_true", help="Average the logits of each picture and its mirror image")
    parser.add_argument("--disagreement", action="store_true", help="Also print how much the experts differ, in nats")
    parser.add_argument("--how_many", type=PositiveInt, default=8, help="Test pictures to classify")
    args = parser.parse_args(argv)
    if args.run is None and (args.model is None or not args.images):
        parser.error("give --run, or --model with picture files")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    with refusing():
        if args.images:
            pictures = [(str(path), decode({"bytes": None, "path": str(path)})) for path in args.images]
        else:
            pictures = test_pictures(RunFolder(args.run), args.how_many)
        source = args.model or RunFolder(args.run).model
        model = ECLForImageClassification.from_pretrained(source).eval()
        # By the configuration, which was checked; a repository's file for the processor could say anything
        processor = transformers.TimmWrapperImageProcessor(model.config.pretrained_cfg, model.config.architecture)
        classify = ECLImageClassificationPipeline(model=model, image_processor=processor)
    wanted = {"top_k": args.top_k, "flip": args.flip, "disagreement": args.disagreement}
    answers = classify([picture for _, picture in pictures], batch_size=32, **wanted)
    print(f"\n{'picture':24}prediction of {source}")
    for (name, _), best in zip(pictures, answers, strict=True):
        differ = f"  disagreement {best[0]['disagreement']:.3f}" if args.disagreement else ""
        classes = "  ".join(f"{printable(answer['label'])} {answer['score']:.2f}" for answer in best)
        print(f"{printable(name, 300):24}" + classes + differ)
    return answers


if __name__ == "__main__":
    main()
