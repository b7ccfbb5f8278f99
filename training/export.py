"""Publish a trained model: as a Hub repository with its card, a plain timm model, an ONNX file, or a page to try it.

python training/export.py --run runs/c100 --output out                        # the ensemble, ready for the Hub
python training/export.py --run runs/c100 --push --repo_id me/ecl-c100        # the same, uploaded; --examples a.jpg
python training/export.py --run runs/c100 --output out --timm                 # the best expert, for timm alone
python training/export.py --run runs/c100 --output out --onnx --expert 1      # one expert, for ONNX Runtime
python training/export.py --run runs/c100 --space demo --examples a.jpg       # a page to try it: python demo/app.py
python training/export.py --run runs/c100 --space demo --push --repo_id me/demo
"""

import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
from jinja2 import UndefinedError
from jsonargparse import Namespace

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.flags import FlagParser
from ecl_hf.publishing.hub import best_expert, known_to_timm, save_onnx, save_timm, write_card
from ecl_hf.publishing.space import copy_examples, upload_space, write_space
from ecl_hf.repository import upload_directory
from ecl_hf.runs.folder import RunFolder, read_results
from ecl_hf.terminal import speaking

CARDS = Path(str(files("ecl_hf.hub_cards")))


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the flags, and refuse combinations that make no sense."""
    parser = FlagParser(prog="export.py", description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path | None, help="Run folder: its model and its test results")
    parser.add_argument("--model", type=str | None, help="Directory or Hub repository of a model, instead of --run")
    parser.add_argument("--results", type=Path | None, help="results.json for the card; the run's when --run is given")
    parser.add_argument("--output", type=Path | None, help="Directory to write; it must not exist, or be empty")
    parser.add_argument("--timm", action="store_true", help="One expert as a plain timm model")
    parser.add_argument("--onnx", action="store_true", help="An ONNX graph of the ensemble, or of one --expert")
    parser.add_argument(
        "--expert", type=int | None, help="Position of one expert; for --timm the best recorded one when not given"
    )
    parser.add_argument("--space", type=Path | None, help="Directory to write a Space into: a page to try the model")
    parser.add_argument("--examples", type=Path, nargs="*", default=[], help="Pictures that the page shows everybody")
    parser.add_argument("--push", action="store_true", help="Upload to --repo_id")
    parser.add_argument("--repo_id", type=str | None, help="Hub repository, as in me/name; the card names it")
    parser.add_argument("--private", action="store_true", help="Make a new repository private")
    parser.add_argument("--license", type=str | None, help="Hub identifier of the model's licence, such as mit")
    parser.add_argument("--dataset", type=str | None, help="Hub id of the training data, for the card")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.model is None):
        parser.error("give either --run or --model")
    if args.space is not None and (args.output or args.timm or args.onnx):
        parser.error("--space names the directory to write, and goes with none of --output, --timm and --onnx")
    if args.examples and args.onnx:
        parser.error("--examples goes with a model or a Space, which have a page; not with --onnx")
    args.output = args.output or args.space
    if args.output is None and not args.push:
        parser.error("give --output, --push or both")
    if args.push and args.repo_id is None:
        parser.error("--push needs --repo_id")
    if args.onnx and (args.timm or args.push):
        parser.error("--onnx writes files for ONNX Runtime: it goes with neither --timm nor --push")
    if args.expert is not None and not (args.timm or args.onnx):
        parser.error("--expert goes with --timm or --onnx: the ensemble's repository serves single experts anyway")
    return args


def find_results(args: Namespace) -> Path | None:
    """The results file that was named, or the run's; None if there is none."""
    file = args.results or (RunFolder(args.run).results_file if args.run else None)
    return file if file is not None and (args.results or file.exists()) else None


def export(args: Namespace, results: dict[str, Any] | None, directory: Path) -> str:
    """Write what was asked for into an empty directory; returns a sentence about it."""
    source = str(args.model or RunFolder(args.run).model)
    expert = args.expert
    if results:
        config = ECLConfig.from_pretrained(source)
        tested, there = len(results["test"]["plain"]["experts"]), config.num_experts
        if tested != there:
            raise ValueError(f"the results are those of {tested} expert(s), but {source} has {there}")
        if len(results["class_counts"]) != config.num_labels:
            raise ValueError(
                f"the results are those of {len(results['class_counts'])} classes, but {source} has {config.num_labels}"
            )
    if args.timm and expert is None:
        expert = best_expert(results) or 0
    model = ECLForImageClassification.from_pretrained(source, experts=None if expert is None else [expert])
    which = f"{len(model.experts)} expert(s)" if expert is None else f"expert {expert}"
    if args.onnx:
        difference = save_onnx(model, directory / "model.onnx")
        model.config.to_json_file(directory / "config.json")  # class names, size and normalisation of the input
        return f"{which} of {source} as model.onnx; ONNX Runtime's logits differ from PyTorch's by {difference:.1e}"
    if args.space is not None:
        write_space(directory, model, (args.repo_id or args.space.name).split("/")[-1], args.examples)
        return f"{which} of {source} with a page; python {args.space / 'app.py'} shows it (pip install 'ecl-hf[space]')"
    card = {"repo_id": args.repo_id, "dataset": args.dataset, "license": args.license, "expert": expert}
    if args.examples:
        card["examples"] = copy_examples(directory, args.examples)
    template = CARDS / ("timm_card.md" if args.timm else "model_card.md")
    try:
        write_card(directory, template, model.config, results, **card)
    except (AttributeError, KeyError, TypeError, UndefinedError) as error:
        raise ValueError(f"{find_results(args)} lacks something that the card says: {error!r}") from error
    if args.timm:
        save_timm(model, 0, directory)
        before = "" if known_to_timm(model.config.architecture) else "; `import ecl_hf` before loading it"
        return f"{which} of {source} as a timm model{before}"
    model.save_pretrained(directory)
    return f"{which} of {source} with card"


@speaking()
def main(argv: Sequence[str] | None = None) -> Path | None:
    """Write and upload what was asked for; returns the output directory if there is one."""
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        if args.output and args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
            raise FileExistsError(f"output {args.output} exists and is not an empty directory")
        if args.run:
            RunFolder(args.run).find_model()
        file = find_results(args)
        results = None if file is None else read_results(file, {"recipe.data": dict})
        beside = args.output.absolute().parent if args.output else None
        if beside:
            beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=".export-") as temporary:
            directory = Path(temporary) / "model"
            directory.mkdir()
            print(export(args, results, directory))
            if results is None and not (args.onnx or args.space):
                print("no results.json: the card says that nothing was measured")
            if args.push:
                upload = upload_space if args.space else upload_directory
                commit = upload(directory, args.repo_id, private=args.private or None)
                print(f"uploaded to {commit.repo_url}, revision {commit.oid}")
            if args.output:
                if args.output.exists():
                    args.output.rmdir()
                directory.rename(args.output)
                print(f"written to {args.output}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    return args.output


if __name__ == "__main__":
    main()
