"""All pictures of a data set, before a protocol chooses among them: class folders, and what `datasets` reads."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub.constants import HF_HUB_CACHE

from ecl_hf.data.config import DataConfig
from ecl_hf.data.folders import check_tree, read_class_folders, warn_of_unlisted
from ecl_hf.data.longtail import longtail_indices
from ecl_hf.files import check_regular, read_entries, read_object
from ecl_hf.names import listed, printable


@dataclass(frozen=True)
class Source:
    """Pictures with classes, as columns `image` and `label`.

    Attributes:
        name: for messages and records.
        train: pictures to choose from.
        test: pictures of the test split; None where it is to be cut from `train`.
        class_names: in label order, [C].
        published: whether it is a long-tailed benchmark whose list was checked against the published counts.
        folders: where its picture files lie; what a table or a link names elsewhere is none of the data set.
        groups: number of each training picture's group (`data.group_column`), [N].
    """

    name: str
    train: datasets.Dataset
    test: datasets.Dataset | None
    class_names: list[str]
    published: bool = False
    folders: tuple[Path, ...] = ()
    groups: np.ndarray | None = None


def read_source(config: DataConfig) -> Source:
    """Read the splits that a configuration names, find their columns, and number their classes.

    Raises:
        FileNotFoundError: the path does not exist or holds no data set.
        ValueError: a split or column is missing or ambiguous, a label lies outside the classes, or the splits store
            different classes; the message names it.
    """
    name = config.path or config.source
    if config.path is None and name == "digits":
        if config.test_fraction is not None:
            raise ValueError("the digits have a test split of their own: leave data.test_fraction out")
        if config.group_column is not None:
            raise ValueError(f"the digits have no column {config.group_column!r} (data.group_column)")
        splits = _digits()
        choose_columns(splits["train"].features, config, name)
        return Source(name, *splits.values(), class_names=[str(c) for c in range(10)])
    return read_in_place(config) or _source(config, *read_splits(config))


def read_in_place(config: DataConfig) -> Source | None:
    """Class folders and what `save_to_disk` wrote, of which nothing is copied; None for all else."""
    if config.path is None:
        return None
    root = directory(config)
    if any((root / file).is_file() for file in ("dataset_dict.json", "state.json")):
        check_saved(root)
        with reading(config.path):
            saved = datasets.load_from_disk(config.path).with_format(None)
        loaded = _wanted(saved if isinstance(saved, dict) else {config.train_split: saved}, config)
        return _source(config, loaded, {}, (root,))
    if (found := read_class_folders(root, config)) is None:
        return None
    splits, class_names = found
    if config.group_column is not None:
        raise ValueError(
            f"data.group_column: class folders have no columns; write {root / 'metadata.csv'} with the columns "
            f"file_name (such as {printable(class_names[0])}/1.jpg), label and {config.group_column}, a "
            "line for each picture"
        )
    choose_columns(splits["train"].features, config, config.path)
    return Source(config.path, splits["train"], splits.get("test"), class_names, folders=(root,))


def check_saved(root: Path) -> None:
    """Refuse what `save_to_disk` did not write, and its reader would wait for, stumble over or look for elsewhere.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not regular, too large, or not what it should be; the message names it.
    """
    parts, listed = [root], root / "dataset_dict.json"
    if listed.is_file() and not (root / "state.json").is_file():
        names = read_entries(listed, {"splits": list}, "list of splits")["splits"]
        parts = [_inside(root, name, listed) for name in names]
    for part in parts:
        read_object(part / "dataset_info.json")
        state = part / "state.json"
        for entry in read_entries(state, {"_data_files": list}, "description of a split")["_data_files"]:
            check_regular(_inside(part, entry.get("filename") if isinstance(entry, dict) else None, state))


def _inside(folder: Path, name: object, said_by: Path) -> Path:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{said_by} names {repr(name)[:80]}, which is nothing beside it")
    return folder / name


def _source(
    config: DataConfig,
    loaded: dict[str, datasets.Dataset],
    stored: dict[str, list[str]],
    folders: tuple[Path, ...],
) -> Source:
    name = config.path or config.source
    image, label = choose_columns(loaded["train"].features, config, name)
    groups = None
    if (column := config.group_column) is not None:
        groups = group_numbers(loaded["train"], column, f"{name}, split {config.train_split}")
    splits, where = {}, {"train": config.train_split, "test": config.test_split}
    for key, split in loaded.items():
        choose_columns(split.features, config, f"{name}, split {where[key]}")
        splits[key] = split.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    class_names = stored.get("train") or _class_names(splits)
    for key, split in splits.items():
        own = stored.get(key) or getattr(split.features["label"], "names", None)
        labels = numbers(split, class_names, own, f"{name}, split {where[key]}, column {label}")
        splits[key] = with_labels(split, labels, class_names)
    return Source(name, splits["train"], splits.get("test"), class_names, folders=folders, groups=groups)


def directory(config: DataConfig) -> Path:
    """`data.path`, if it is a directory with something in it."""
    root = Path(config.path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.path {config.path} is not a directory")
    if not any(root.iterdir()):
        raise FileNotFoundError(f"data.path {config.path} is empty")
    return root


def with_labels(split: datasets.Dataset, labels: np.ndarray, class_names: Sequence[str]) -> datasets.Dataset:
    """The same pictures with these labels, [N]."""
    feature = datasets.ClassLabel(names=list(class_names))
    if split.features["label"] == feature and np.array_equal(labels_of(split), labels):
        return split
    return split.remove_columns("label").add_column("label", labels, feature=feature)


def labels_of(split: datasets.Dataset) -> np.ndarray:
    """Labels as numbers, [N]; reads no picture."""
    return _label_column(split).to_numpy().astype(np.int64)


def _label_column(split: datasets.Dataset) -> pa.ChunkedArray:
    table = split.select_columns("label").with_format("arrow")[:]
    return table["label"] if isinstance(table["label"], pa.ChunkedArray) else pa.chunked_array([table["label"]])


def read_splits(
    config: DataConfig,
) -> tuple[dict[str, datasets.Dataset], dict[str, list[str]], tuple[Path, ...]]:
    """What `datasets` reads: "train" and, unless `test_fraction` is set, "test"; `stored_names` of each; folders."""
    name = config.path or config.source
    builder = open_builder(config)
    stored = stored_names(builder, config)
    with reading(name):
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    folders = (Path(name),) if config.path else ()
    if isinstance(builder, FolderBasedBuilder):
        if config.path:
            warn_of_unlisted(Path(name), sum(map(len, loaded.values())))
        # archives are unpacked, and the Hub's files kept, in the cache
        cache = datasets.config
        folders += (Path(cache.DOWNLOADED_DATASETS_PATH), Path(cache.EXTRACTED_DATASETS_PATH), Path(HF_HUB_CACHE))
    return _wanted(loaded, config), stored, folders


def open_builder(config: DataConfig) -> datasets.DatasetBuilder:
    """The reader of a Hub repository or local directory; ValueError names a link in which it would go in circles."""
    name = config.path or config.source
    if config.path:
        check_tree(Path(name))
    with reading(name):
        return datasets.load_dataset_builder(str(Path(name).resolve()) if config.path else name, config.subset)


def _wanted(loaded: dict[str, datasets.Dataset], config: DataConfig) -> dict[str, datasets.Dataset]:
    """The splits of a configuration, "train" and, unless `test_fraction` is set, "test"."""
    for key, split in _split_names(config).items():
        if split not in loaded:
            advice = "; data.test_fraction cuts one from the training pictures" if key == "test" else ""
            seen = ", ".join(loaded)
            raise ValueError(
                f"{config.path or config.source} has no split {split!r} (data.{key}_split); it has {seen}{advice}"
            )
    return {key: loaded[split] for key, split in _split_names(config).items()}


def _split_names(config: DataConfig) -> dict[str, str]:
    return {"train": config.train_split} | ({} if config.test_fraction is not None else {"test": config.test_split})


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Say which data set it is that can't be read, and why."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as e:
        raise FileNotFoundError(f"can't load the data set {name}: {e}") from e
    except (datasets.exceptions.DatasetsError, RuntimeError, ValueError) as e:  # scripts, damaged or empty files
        advice = "; set data.subset" if "Config name is missing" in str(e) else ""
        raise ValueError(f"can't read the data set {name}: {e.__cause__ or e}{advice}") from e
    except (AttributeError, KeyError, TypeError) as e:  # of a description that is none
        raise ValueError(f"can't read the data set {name}: {e!r}") from e
    except OSError as e:
        raise OSError(f"can't read the data set {name}: {e}") from e


def stored_names(builder: datasets.DatasetBuilder, config: DataConfig) -> dict[str, list[str]]:
    """Class names of "train" and "test" in the order in which each split's own parquet files number them, if they do.

    `datasets` takes the names of the first file for all. Of remote files the first of each split is asked.
    """
    wanted = _split_names(config)
    if not isinstance(builder, Parquet) or not set(wanted.values()) <= builder.config.data_files.keys():
        return {}
    name, stored = config.path or config.source, {}
    for key, split in wanted.items():
        files = builder.config.data_files[split]
        for file in files if config.path else files[:1]:
            with reading(name), fsspec.open(file, "rb") as opened:
                features = datasets.Features.from_arrow_schema(pq.read_schema(opened))
            _, label = choose_columns(features, config, name)
            if not isinstance(features[label], datasets.ClassLabel):
                return {}
            names = features[label].names
            if stored.setdefault(key, names) != names:
                raise ValueError(f"{name}: the files of split {split} number the classes differently, see {file}")
    return stored


def choose_columns(features: datasets.Features, config: DataConfig, name: str) -> tuple[str, str]:
    """Names of the image and label columns: as configured, else by their types, else `label`."""

    def choose(configured: str | None, kind: type, what: str) -> str:
        if configured is not None:
            if configured not in features:
                raise ValueError(f"{name} has no column {configured!r} ({what}); it has {', '.join(features)}")
            return configured
        found = [column for column, feature in features.items() if isinstance(feature, kind)]
        if not found and kind is datasets.ClassLabel and "label" in features:
            return "label"
        if len(found) != 1:
            seen = ", ".join(found) or "none"
            raise ValueError(f"{name}: set {what}; columns that could be it: {seen}; all: {', '.join(features)}")
        return found[0]

    image = choose(config.image_column, datasets.Image, "data.image_column")
    label = choose(config.label_column, datasets.ClassLabel, "data.label_column")
    if not isinstance(features[image], datasets.Image):
        raise ValueError(f"column {image!r} of {name} (data.image_column) holds {features[image]}, not images")
    feature = features[label]
    plain = isinstance(feature, datasets.Value) and ("int" in feature.dtype or "string" in feature.dtype)
    if not isinstance(feature, datasets.ClassLabel) and not plain:
        raise ValueError(f"column {label!r} of {name} (data.label_column) holds {feature}, not class labels")
    return image, label


def group_numbers(split: datasets.Dataset, column: str, where: str) -> np.ndarray:
    """The values of a column as numbers in the order of their first pictures, [N].

    Raises:
        ValueError: there is no such column, it holds no plain values, or one is missing; the message names the row.
    """
    if column not in split.features:
        raise ValueError(f"{where} has no column {column!r} (data.group_column); it has {', '.join(split.features)}")
    if not isinstance(split.features[column], datasets.Value | datasets.ClassLabel):
        raise ValueError(f"column {column!r} of {where} (data.group_column) holds {split.features[column]}, not values")
    values = pa.chunked_array(split.select_columns(column).with_format("arrow")[:][column])
    missing = np.flatnonzero(values.is_null())
    if len(missing):
        raise ValueError(f"{where}: row {missing[0]} has no {column} (data.group_column; {len(missing)} such rows)")
    return values.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)


def _class_names(splits: dict[str, datasets.Dataset]) -> list[str]:
    """As stored; the sorted distinct values of a column of strings; whole numbers are their own names."""
    feature = splits["train"].features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    columns = [_label_column(split) for split in splits.values()]
    if "string" in feature.dtype:
        return sorted({name for column in columns for name in pc.unique(column).to_pylist() if name})
    largest = pc.max(columns[0]).as_py()
    return [str(c) for c in range(min((-1 if largest is None else largest) + 1, len(columns[0])))]


def numbers(split: datasets.Dataset, class_names: list[str], stored: list[str] | None, where: str) -> np.ndarray:
    """Labels as positions in `class_names`, [N]; `stored` are the names in the order in which the split counts.

    Raises:
        ValueError: a label or a class that is none of `class_names`; the message names the first.
    """
    if only := sorted(set(stored or []) - set(class_names)):
        raise ValueError(f"{where}: {len(only)} classes are none of the training split: {listed(only)}")
    column = _label_column(split)
    if not len(column):
        raise ValueError(f"{where}: no images")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        labels = pc.fill_null(pc.index_in(column, pa.array(class_names, column.type)), -1).to_numpy().astype(np.int64)
        last = "the class names"
    else:
        labels = whole_numbers(column, where)
        last = f"0..{len(class_names if stored is None else stored) - 1}"
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names if stored is None else stored)))
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{where}: row {row} has label {column[row]}, outside {last} ({len(wrong)} such rows)")
    if stored is not None and stored != class_names:
        labels = np.array([class_names.index(name) for name in stored])[labels]
    return labels


def whole_numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """A column of integers of any size, [N]; what is missing becomes -1.

    Raises:
        ValueError: one of them is beyond 64 bits with a sign; the message names its row.
    """
    try:
        return pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    except pa.ArrowInvalid:
        row = int(np.argmax(column.fill_null(0).to_numpy() > np.iinfo(np.int64).max))
        raise ValueError(f"{where}: row {row} has label {column[row]}, which is no class number") from None


@functools.cache
def _digits() -> dict[str, datasets.Dataset]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; 40 of each class, chosen once, are the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ValueError("the digits need scikit-learn: pip install 'ecl-hf[digits]'") from e
    digits = load_digits()
    values = np.round(digits.images * (255 / 16)).astype(np.uint8)
    test = np.sort(longtail_indices(digits.target, [40] * 10))
    train = np.setdiff1d(np.arange(len(values)), test)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(c) for c in range(10)])}
    )
    return {
        name: datasets.Dataset.from_dict({"image": list(values[rows]), "label": digits.target[rows]}, features)
        for name, rows in (("train", train), ("test", test))
    }
