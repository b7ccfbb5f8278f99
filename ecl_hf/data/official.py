"""Published long-tailed benchmarks: their lists over the user's pictures, and the counts that they must have.

`official_counts.json` holds the training pictures of each class in label order. They were counted in lists on GitHub:
ImageNet-LT (Liu et al. 2019) in dialogueeeeee/LTGC, Places-LT (the same) in facebookresearch/classifier-balancing,
iNaturalist 2018 in richardaecn/tpu. The test lists have equally many pictures of every class.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from timm.data import ImageNetInfo

from ecl_hf.data.config import DataConfig
from ecl_hf.data.folders import holds, pictures
from ecl_hf.data.picture_lists import PictureList, distinct, find_list, locate, read_list
from ecl_hf.data.sources import Source, directory, labels_of, read_splits
from ecl_hf.names import listed, printable

CIFAR = {
    "bb3914949cecedee6d1257f7f5fdb8f43fa3b2c8095fd1763161caf1b873fe59": ("CIFAR-10", 5000, 1000),
    "fbe8ad23bbaf24969898a386833b49c3aaf6ad1119d43f7b41cdea1b3416d578": ("CIFAR-100", 500, 100),
}
"""SHA-256 of the class names, a line each: the data set, its training and its test images of every class."""


@dataclass(frozen=True)
class Benchmark:
    """A published long-tailed list.

    Attributes:
        name: as in `data.source`.
        train_counts: training pictures of each class in label order, [C].
        test_count: test pictures of every class.
        train_lists: file names under which the training list is published, text or JSON.
        test_lists: the same for the list that papers test on.
        class_name: from a picture's path in a text list; JSON lists name their classes.
        hub: Hub repository whose stored file names are those of the lists.
        flat: whether a picture may lie one folder higher than listed, since its name alone tells it from all others.
    """

    name: str
    train_counts: Sequence[int]
    test_count: int
    train_lists: Sequence[str]
    test_lists: Sequence[str]
    class_name: Callable[[str], str]
    hub: str | None = None
    flat: bool = False


def load_official(benchmark: Benchmark, config: DataConfig) -> Source:
    """Join a benchmark's lists with the pictures; opens none of them.

    Raises:
        FileNotFoundError: a list or pictures are missing; the message counts them and names the first.
        ValueError: a list is damaged or has other counts than the published one, or the pictures are known by other
            names; the message names the class and the file, and says what to do.
    """
    if config.profile != "as_is" or config.test_fraction is not None:
        raise ValueError(
            f"{benchmark.name} is long-tailed and has a test list: set data.profile as_is, and no data.test_fraction"
        )
    if config.group_column is not None:
        raise ValueError(f"the lists of {benchmark.name} have no column {config.group_column!r} (data.group_column)")
    root = directory(config) if config.path else None
    if root is None and benchmark.hub is None:
        raise ValueError(f"data.source {benchmark.name} needs data.path, the directory with its pictures")
    train = read_list(find_list(root, config.train_list, benchmark.train_lists, "data.train_list"))
    test = read_list(find_list(root, config.test_list, benchmark.test_lists, "data.test_list"))
    names = train.class_names or distinct(_names_by_path(train, benchmark))
    check_counts(train, benchmark.train_counts, names)
    check_counts(test, [benchmark.test_count] * len(benchmark.train_counts), names)
    if test.class_names not in (None, train.class_names):
        raise ValueError(f"{test.file} has other categories than {train.file}")
    if root and not holds(root, (".parquet",)):
        splits = [pictures(locate(root, part, benchmark.flat), part.labels, names) for part in (train, test)]
    else:
        stored, *_ = read_splits(config if root else replace(config, source=benchmark.hub))
        splits = [_match(stored[key], part, names, config) for key, part in (("train", train), ("test", test))]
    folders = (root,) if root else ()
    return Source(benchmark.name, *splits, class_names=names, published=True, folders=folders)


def check_counts(part: PictureList, expected: Sequence[int], names: Sequence[str]) -> None:
    """Compare a list with the published numbers; ValueError names the file and the first class that differs."""
    found = np.bincount(part.labels)
    wrong = [c for c, (n, m) in enumerate(zip_longest(found, expected, fillvalue=0)) if n != m]
    if wrong:
        c = wrong[0]
        has, should = (int(counts[c]) if c < len(counts) else 0 for counts in (found, expected))
        name = f" ({printable(names[c])})" if c < len(names) else ""
        raise ValueError(
            f"{part.file}: class {c}{name} has {has} pictures, but {should} in the published list; {len(wrong)} such "
            f"classes, and {len(part.labels)} of {sum(expected)} pictures. Fetch the published list again, or make "
            "class folders for a selection of your own"
        )


def check_cifar(source: Source) -> None:
    """See that a data set with the classes of CIFAR has all its images, since the published splits start from them."""
    if source.test is None:
        return
    digest = hashlib.sha256("\n".join(source.class_names).encode()).hexdigest()
    if digest not in CIFAR:
        return
    name, *expected = CIFAR[digest]
    for what, split, should in zip(("training", "test"), (source.train, source.test), expected, strict=True):
        counts = np.bincount(labels_of(split), minlength=len(source.class_names))
        if len(wrong := np.flatnonzero(counts != should)):
            c = wrong[0]
            which = printable(source.class_names[c])
            raise ValueError(
                f"{source.name}: class {which} has {counts[c]} {what} images, but {should} in {name} "
                f"({len(wrong)} such classes): this would not be {name}-LT; set data.max_count to cut it all the same"
            )


def _match(split: datasets.Dataset, part: PictureList, names: list[str], config: DataConfig) -> datasets.Dataset:
    """The rows of a stored split whose file names are those of a list, in its order, with its labels."""
    image = config.image_column or "image"
    stored = pc.struct_field(split.data.column(image), "path").combine_chunks()
    rows = pc.index_in(_base_names(pa.array(part.paths)), _base_names(stored))
    if rows.null_count:
        missing = [part.paths[row] for row in np.flatnonzero(rows.is_null().to_numpy(zero_copy_only=False))]
        raise ValueError(
            f"{len(missing)} of {len(part.paths)} pictures in {part.file} are not among the file names stored in "
            f"{config.path or config.source}: {listed(missing, 5)}. Where file names did not survive, use "
            "data.source ILSVRC/imagenet-1k with data.profile pareto, which has similar counts"
        )
    labels = np.zeros(len(split), np.int64)
    labels[rows.to_numpy()] = part.labels
    named = split.select_columns([image]).rename_columns({image: "image"})
    return named.add_column("label", labels, feature=datasets.ClassLabel(names=names)).select(rows.to_numpy())


def _base_names(paths: pa.Array) -> pa.Array:
    """File names without folders, and without the class that ILSVRC/imagenet-1k puts behind them."""
    return pc.replace_substring_regex(pc.replace_substring_regex(paths, r"^.*/", ""), r"(_\d+)_n\d{8}\.", r"\1.")


def _names_by_path(part: PictureList, benchmark: Benchmark) -> list[str]:
    first = dict(zip(reversed(part.labels.tolist()), reversed(part.paths), strict=True))
    return [benchmark.class_name(first[c]) if c in first else str(c) for c in range(len(benchmark.train_counts))]


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo("imagenet-1k")


def _synset(path: str) -> str:
    """What an ImageNet folder is called: "tench" for n01440764."""
    folder = _last_folder(path)
    try:
        return _imagenet().label_name_to_description(folder).split(",")[0]
    except KeyError:
        return folder


def _scene(path: str) -> str:
    """Place category: folders below the first, without the letter that some lists sort them by."""
    folders = path.split("/")[1:-1]
    return "/".join(folders[1:] if len(folders) > 1 and len(folders[0]) == 1 else folders)


def _last_folder(path: str) -> str:
    return path.split("/")[-2]


COUNTS = json.loads(Path(__file__).with_name("official_counts.json").read_text(encoding="utf-8"))
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "imagenet_lt",
            COUNTS["imagenet_lt"],
            50,
            ("ImageNet_LT_train.txt",),
            ("ImageNet_LT_test.txt",),
            _synset,
            hub="ILSVRC/imagenet-1k",
            flat=True,
        ),
        Benchmark("places_lt", COUNTS["places_lt"], 100, ("Places_LT_train.txt",), ("Places_LT_test.txt",), _scene),
        Benchmark(
            "inaturalist2018",
            COUNTS["inaturalist2018"],
            3,
            ("train2018.json", "iNaturalist18_train.txt"),
            ("val2018.json", "iNaturalist18_val.txt"),
            _last_folder,
        ),
    )
}
