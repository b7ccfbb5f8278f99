"""Weigh the experts of a model by unlabelled pictures, as SADE does with those of the test set.

python training/weigh.py --run runs/sade --output weighted                 # the run's own test pictures
python training/weigh.py --model me/sade folder 'b/*.jpg' --output weighted
python training/evaluate.py --model weighted --recipe runs/sade/recipe.yaml

Nothing is trained but one number for each expert: the experts' predictions of two random views of each picture shall be
alike. No label is read. Scores of the written model on these pictures are transductive, and its configuration says so.
Where experts carry different class priors, as SADE's do, `target_prior` goes on to take out that of their plain mean:
with unequal weights it is approximate.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from ecl_hf import ECLForImageClassification
from ecl_hf.data.folders import find_pictures, pictures
from ecl_hf.data.loaders import ViewDataset, fitting, train_loader
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.views import agreement_view
from ecl_hf.evidence.weighing import stable_weights
from ecl_hf.flags import FlagParser
from ecl_hf.names import printable
from ecl_hf.publishing.words import data_name, tested_part
from ecl_hf.runs.folder import RunFolder
from ecl_hf.runs.recipe import Recipe
from ecl_hf.terminal import refusing, speaking


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the flags, and refuse combinations that make no sense."""
    parser = FlagParser(prog="weigh.py", description=__doc__.split("\n")[0])
    parser.add_argument("images", type=str, nargs="*", help="Picture files, folders, or patterns such as 'a/**/*.jpg'")
    parser.add_argument(
        "--run", type=Path | None, help="Run folder: its model, and its test pictures if none are given"
    )
    parser.add_argument("--model", type=str | None, help="Directory or Hub repository of the model, instead of --run")
    parser.add_argument("--output", type=Path, required=True, help="Directory to write; it must not exist, or be empty")
    parser.add_argument("--epochs", type=PositiveInt, default=5, help="Passes over the pictures, at most")
    parser.add_argument("--lr", type=PositiveFloat, default=0.1, help="Learning rate; published: that of the training")
    parser.add_argument("--batch_size", type=PositiveInt, default=128, help="Pictures of a step")
    parser.add_argument("--seed", type=int, default=0, help="Of the order and the random views")
    parser.add_argument("--flip", type=bool | None, help="Whether a view may be mirrored; by itself as in the training")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.model is None):
        parser.error("give either --run or --model")
    if args.run is None and not args.images:
        parser.error("--model needs picture files: which pictures shall the experts be weighed by?")
    return args


def unlabelled(args: Namespace) -> tuple[datasets.Dataset, str]:
    """The pictures, all with the label 0, and what they are."""
    if args.images:
        files = [str(path) for path in find_pictures(args.images)]
        return pictures(files, np.zeros(len(files), np.int64), ["unknown"]), f"{len(files)} pictures"
    data = Recipe.of_run(RunFolder(args.run).recipe_file).data
    test = load_longtailed(data).test
    stored = test.select_columns("image").add_column("label", [0] * len(test))
    told = asdict(data)
    return stored, f"{len(test)} test pictures, {tested_part(told)} of {printable(data_name(told))}"


def check(model: ECLForImageClassification, source: str) -> None:
    """Refuse models whose experts can't be weighed; ValueError."""
    if len(model.experts) < 2:
        raise ValueError(f"{source} has one expert: there is nothing to weigh")
    aggregation = model.config.aggregation
    if isinstance(aggregation, dict) or (isinstance(aggregation, list) and isinstance(aggregation[0], list)):
        kind = "a router" if isinstance(aggregation, dict) else "weights for each class"
        raise ValueError(f"{source} has {kind}, which weights for the whole test set would replace; its experts stay")


class Views:
    """Experts' logits of two random views of all pictures, epoch by epoch.

    Args:
        model: in evaluation mode.
        dataset: of pictures.
        args: flags.
        flip: whether a view may be mirrored.
    """

    def __init__(
        self, model: ECLForImageClassification, dataset: datasets.Dataset, args: Namespace, flip: bool
    ) -> None:
        self.model, self.pictures = model, len(dataset)
        view = agreement_view(model.config.pretrained_cfg, flip)
        self.at_once = fitting(args.batch_size, model.config.pretrained_cfg["input_size"])
        self.dataset = ViewDataset(dataset, {"first": view, "second": view}, args.seed, "test", on_error="mark")
        # Views of more than 448 pixels would take gigabytes in a step of 128
        self.loader = train_loader(self.dataset, min(args.batch_size, len(dataset), 8 * self.at_once))
        self.broken: set[int] = set()

    @torch.no_grad()
    def __call__(self, epoch: int) -> Iterator[Tensor]:
        """Batches of one epoch, [2, B, K, C]; pictures that can't be decoded are left out."""
        self.dataset.epoch = epoch
        for batch in tqdm(self.loader, f"epoch {epoch + 1}", leave=False, disable=None):
            there = batch["labels"] >= 0
            self.broken.update(batch["indices"][~there].tolist())
            if there.any():
                pixels = torch.cat([batch["first"][there], batch["second"][there]])
                parts = pixels.to(self.model.device).split(self.at_once)
                logits = torch.cat([self.model(part).expert_logits.float() for part in parts])
                yield logits.unflatten(0, (2, -1))


@speaking()
def main(argv: Sequence[str] | None = None) -> list[float]:
    """Write the model with the weights that were found, and return these."""
    args = parse(argv)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with refusing():
        if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
            raise FileExistsError(f"output {args.output} exists and is not an empty directory")
        source = args.model or str(RunFolder(args.run).find_model())
        model = ECLForImageClassification.from_pretrained(source).eval()
        check(model, source)
        dataset, what = unlabelled(args)
        if not len(dataset):
            raise ValueError("there is no picture to weigh the experts by")
        flip = args.flip
        if flip is None:
            flip = args.run is None or Recipe.of_run(RunFolder(args.run).recipe_file).data.horizontal_flip
        views = Views(model.to("cuda" if torch.cuda.is_available() else "cpu"), dataset, args, flip)
        weights = stable_weights(views, args.epochs, args.lr).tolist()
        if broken := len(views.broken):
            what += f"; {broken} of them could not be decoded"
        model.config.aggregation, model.config.weighted_on = weights, what
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.output.absolute().parent, prefix=".weigh-") as temporary:
            model.cpu().save_pretrained(Path(temporary) / "model")
            if args.output.exists():
                args.output.rmdir()
            (Path(temporary) / "model").rename(args.output)
    print("weights of the experts: " + ", ".join(f"{weight:.3f}" for weight in weights))
    print(f"found on {what}, without labels: scores on these pictures are transductive, to be reported as that")
    print(f"written to {args.output}")
    return weights


if __name__ == "__main__":
    main()
