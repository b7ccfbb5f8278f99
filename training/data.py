"""Make a long-tailed split that can be cited, compare one with its source, publish one on the Hub.

    python training/data.py build --recipe cifar100_lt --output splits/c100
    python training/data.py build --data.path DIR --data.profile as_is --data.test_fraction 0.2 --pictures --output own
    python training/data.py verify splits/c100 --data.path DIR
    python training/data.py push own --repo_id me/own --license cc-by-4.0

A split is a directory with split.json (protocol, class order and counts, SHA-256 of the lists), the lists themselves as
positions in the source, and with --pictures the pictures as parquet files. Train on it with
`train.py --data.split splits/c100` and the flags that it was built with, or, if it has pictures, with
`train.py --data.path own --data.profile as_is`.
"""

import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from itertools import repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi
from huggingface_hub.utils import disable_progress_bars
from jsonargparse import Namespace, set_parsing_settings
from tqdm import tqdm

from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtailed import choose_rows, load_source
from ecl_hf.data.pictures import content, defect
from ecl_hf.data.sources import labels_of, read_source
from ecl_hf.data.splits import PARTS, Split, check_output, compare_rows, pictures_of, records
from ecl_hf.evidence.metrics import shot_groups
from ecl_hf.flags import FlagParser
from ecl_hf.publishing.cards import fill
from ecl_hf.repository import explain_hub_errors
from ecl_hf.runs.recipe import Recipe, prepare_flags
from ecl_hf.runs.recipe_files import RecipeFile
from ecl_hf.terminal import speaking

CARD = Path(str(files("ecl_hf.hub_cards") / "dataset_card.md"))


def parse(argv: Sequence[str] | None) -> tuple[Namespace, DataConfig | None]:
    """Read the flags; `build` has those of `train.py`, of which the data section counts."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = FlagParser(prog="data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subcommands(required=True)
    argv, method = list(sys.argv[1:] if argv is None else argv), "ecl"
    if argv[:1] == ["build"]:
        try:
            flags, method, _ = prepare_flags(argv[1:])
        except (ValueError, OSError) as error:
            parser.error(str(error))
        argv = ["build", *flags]

    build = FlagParser(description="Choose pictures by the data section of a recipe, and write the split.")
    build.add_argument("--recipe", action=RecipeFile, help="Recipe: file or name; flags override it")
    Recipe.add_arguments(build, method)
    build.add_argument("--output", type=Path, required=True, help="Directory to write; it must not exist, or be empty")
    build.add_argument("--pictures", action="store_true", help="Copy the pictures too, as parquet files")
    commands.add_subcommand("build", build)

    verify = FlagParser(description="Choose the pictures again, compare, and decode every picture of the split.")
    verify.add_argument("split", type=Path, help="Directory that `build` wrote")
    verify.add_argument("--data.path", type=str | None, help="Local directory of the source")
    verify.add_argument("--data.source", type=str | None, help="Hub repository of the source, if it was renamed")
    verify.add_argument("--data.train_list", type=str | None, help="Published training list, as for `build`")
    verify.add_argument("--data.test_list", type=str | None, help="Published test list, as for `build`")
    commands.add_subcommand("verify", verify)

    push = FlagParser(description="Publish a split that has its pictures as a data set on the Hub, with a card.")
    push.add_argument("split", type=Path, help="Directory that `build --pictures` wrote")
    push.add_argument(
        "--repo_id", type=str, required=True, help="Hub repository, as in me/name; made if it is not there"
    )
    push.add_argument("--private", action="store_true", help="Make a new repository private")
    push.add_argument("--license", type=str | None, help="Hub identifier of the pictures' licence, such as cc-by-4.0")
    push.add_argument("--citation", type=str | None, help="What to cite for the pictures, as text or BibTeX")
    commands.add_subcommand("push", push)

    args = parser.parse_args(argv)
    if args.subcommand != "build":
        return args, None
    try:
        return args, Recipe.from_arguments(build, args.build).data
    except ValueError as error:
        parser.error(str(error))


def build(args: Namespace, config: DataConfig) -> Split:
    """Choose the pictures and write the split."""
    if config.split is not None:
        raise ValueError("data.split names a split that is built already")
    check_output(args.output)
    source = load_source(config)
    split = Split.write(args.output, config, source, choose_rows(config, source), args.pictures)
    for part in PARTS:
        found = split.record["parts"][part]
        counts = found["class_counts"]
        print(f"{part:6}{found['images']} images, {len(counts)} classes of {max(counts)} to {min(counts)}")
        print(f"      SHA-256 {found['sha256']}")
    print(f"{args.output}: {split.record['protocol']} of {split.record['source']['name']}")
    return split


def verify(args: Namespace) -> None:
    """Print what differs and what is broken; SystemExit with code 1 if there is anything."""
    split = Split.read(args.split)
    rows = split.rows()
    config = split.config(**args.data)
    source = load_source(config)
    different = split.differences(source)
    if not different:
        computed = choose_rows(config, source)
        different = [
            f"{part}_rows.txt: {difference}"
            for part in PARTS
            if (difference := compare_rows(rows[part], computed[part]))
        ]
    if different:
        print(*(f"differs: {difference}" for difference in different), sep="\n")
        sys.exit(f"error: {len(different)} differences; the pictures were not looked at")

    stored = read_source(DataConfig(path=str(split.path), profile="as_is")) if split.has_pictures else None
    differing = broken = 0
    for part in PARTS:
        originals = pictures_of(source, part).select(rows[part])
        pictures = pictures_of(stored, part) if stored else originals
        if not np.array_equal(labels_of(pictures), labels_of(originals)):
            sys.exit(f"error: the {part} pictures in {split.path}/data are not those of {part}_rows.txt: other labels")
        pairs = zip(records(pictures), records(originals) if stored else repeat(None), strict=False)
        for row, (record, original) in enumerate(tqdm(pairs, part, len(pictures), leave=False, disable=None)):
            file = (original or record or {}).get("path")
            where = f"{part} row {row} (source row {rows[part][row]})" + (f", {file}" if file else "")
            if reason := defect(record):
                broken += 1
                tqdm.write(f"broken: {where}: {reason}")
            if stored and not same_picture(original, record):
                differing += 1
                tqdm.write(f"differs: {where}: not the source's picture")
    if differing or broken:
        sys.exit(f"error: {differing} differences, {broken} broken pictures")
    images = sum(len(part) for part in rows.values())
    print(f"{split.path}: {split.record['protocol']} of {source.name}; same lists, {images} pictures can be decoded")


def same_picture(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two records hold the same file; True also where neither holds any."""
    try:
        return content(one) == content(other)
    except (OSError, ValueError):
        return one == other


def push(args: Namespace) -> str:
    """Publish the split; returns the address of the repository."""
    split = Split.read(args.split)
    split.rows()
    if not split.has_pictures:
        raise ValueError(f"{args.split} holds no pictures: build it with --pictures")
    stored = read_source(DataConfig(path=str(args.split), profile="as_is"))
    pictures = datasets.DatasetDict({part: pictures_of(stored, part) for part in PARTS})
    for part in PARTS:
        for row, record in enumerate(records(pictures[part])):
            if record is None or record["bytes"] is None:  # else the library would upload what its path names
                raise ValueError(f"{args.split}: {part} row {row} holds no picture; build the split again")
    with explain_hub_errors(args.repo_id):
        commit = pictures.push_to_hub(args.repo_id, private=args.private or None, commit_message="Upload pictures")
        card = dataset_card(split, args, DatasetCard.load(args.repo_id).data)
        files = [split.path / name for name in ("split.json", "train_rows.txt", "test_rows.txt")]
        HfApi().create_commit(
            args.repo_id,
            [
                CommitOperationAdd("README.md", str(card).encode()),
                *(CommitOperationAdd(file.name, file) for file in files),
            ],
            commit_message="Add card and lists",
            repo_type="dataset",
        )
    print(f"uploaded to {commit.repo_url}")
    return str(commit.repo_url)


def dataset_card(split: Split, args: Namespace, metadata: datasets.DatasetInfo) -> DatasetCard:
    """Fill the template with the record; `metadata` is the part that describes the files."""
    record = split.record
    counts = record["parts"]["train"]["class_counts"]
    metadata.license = args.license
    metadata.task_categories = ["image-classification"]
    metadata.tags = ["long-tailed", "class-imbalance", "ecl"]
    metadata.pretty_name = args.repo_id.split("/")[-1]
    if not record["source"]["local"] and "/" in record["source"]["name"]:
        metadata.source_datasets = [record["source"]["name"]]
    text = fill(
        CARD,
        card_data=metadata.to_yaml(),
        repo_id=args.repo_id,
        record=record,
        counts=counts,
        classes=list(zip(record["class_names"], counts, record["parts"]["test"]["class_counts"], strict=True)),
        groups={name: int(mask.sum()) for name, mask in shot_groups(counts).items()},
        license_name=args.license,
        citation=args.citation,
        record_json=json.dumps({"protocol": record["protocol"], **record["data"]}, indent=1),
    )
    return DatasetCard(text)


@speaking()
def main(argv: Sequence[str] | None = None) -> Split | str | None:
    """Do what the subcommand says; returns the split that was built, or the address of what was published."""
    args, config = parse(argv)
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        if args.subcommand == "build":
            return build(args.build, config)
        if args.subcommand == "verify":
            return verify(args.verify)
        return push(args.push)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
