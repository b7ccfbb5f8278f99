"""Training pictures that are streamed: the same in every run, each once, and by one process alone."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file

from ecl_hf.data import streaming
from ecl_hf.data.config import DataConfig
from ecl_hf.data.loaders import ViewDataset, train_loader
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.pictures import BrokenPictureError
from ecl_hf.data.streaming import StreamedViews, StreamSampler, stream_loader
from tests.children import begin, connections

NAMES = ["ant", "bee", "cow"]
COUNTS = [24, 14, 8]
PAUSE = 0.05
FLAGS = [
    *("--method=bc", "--data.profile=as_is", "--data.streaming=true", "--data.shuffle_buffer=10"),
    *("--model.architecture=resnet20_cifar", "--model.image_size=8", "--batch_size=8", "--epochs=2"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", PAUSE, raising=False)  # each epoch
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def write(folder, files=3, counts=COUNTS, broken=(), label=None):
    """Parquet files of plain pictures, training picture i 5 i grey; the labels are mixed."""
    folder.mkdir()
    columns = datasets.Features({"img": datasets.Image(), "label": label or datasets.ClassLabel(names=NAMES)})
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
    for split, many in (("train", labels), ("test", [0, 1, 2, 1])):
        grey = [Image.new("RGB", (8, 8), (5 * i,) * 3) for i in range(len(many))]
        rows = [{"img": image, "label": c} for image, c in zip(grey, many, strict=True)]
        for i in broken if split == "train" else ():
            rows[i]["img"] = {"bytes": b"nothing", "path": f"{i}.png"}
        parts = files if split == "train" else 1
        for part in range(parts):
            mine = datasets.Dataset.from_list(rows[part::parts], columns)
            mine.to_parquet(folder / f"{split}-{part:05d}-of-{parts:05d}.parquet")
    return folder


def config(folder, **options):
    return DataConfig(path=str(folder), profile="as_is", streaming=True, **options)


def number(image):
    """Which picture it is, with a random part behind the point."""
    return torch.full((3, 1, 1), np.asarray(image)[0, 0, 0] / 5) + torch.rand(()) / 2


def loader(data, epoch=0, workers=0, process=0, processes=1, on_error="raise", seed=3):
    dataset = StreamedViews({"number": number}, seed, on_error)
    dataset.epoch = epoch
    sampler = StreamSampler(dataset, data.train, sum(data.class_counts), 8, process, processes, shuffle_buffer=10)
    return stream_loader(sampler, 8, processes, workers)


def seen(batches):
    return torch.cat([batch["number"][:, 0, 0, 0] for batch in batches])


def test_split_is_what_the_stored_one_is(tmp_path):
    folder = write(tmp_path / "data")
    ours, stored = load_longtailed(config(folder)), load_longtailed(DataConfig(path=str(folder), profile="as_is"))
    assert isinstance(ours.train, datasets.IterableDataset)
    assert (ours.class_counts, ours.class_names) == (stored.class_counts, stored.class_names) == (COUNTS, NAMES)
    assert list(ours.train)[7]["image"] == stored.train.cast_column("image", datasets.Image(decode=False))[7]["image"]
    assert ours.test["label"][:] == stored.test["label"][:]
    for a, b in zip(ours.test.cast_column("image", datasets.Image())["image"], stored.test["image"], strict=True):
        assert a.tobytes() == b.tobytes()


def test_local_pictures_that_are_no_parquet_files(tmp_path):
    """Nested class folders, which `datasets` alone would number by the innermost folder, and what was saved to disk."""
    stored = load_longtailed(DataConfig(path=str(write(tmp_path / "data")), profile="as_is"))
    datasets.DatasetDict({"train": stored.train, "test": stored.test}).save_to_disk(tmp_path / "saved")
    for split, part in (("train", stored.train), ("test", stored.test)):
        for i, row in enumerate(part):
            folder = tmp_path / "nested" / split / NAMES[row["label"]] / f"year {i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.png")
    by_number = {
        image.getpixel((0, 0))[0] // 5: c for image, c in zip(stored.train["image"], stored.train["label"], strict=True)
    }
    for kind in ("saved", "nested"):
        ours = load_longtailed(config(tmp_path / kind))
        assert (ours.class_counts, ours.class_names) == (COUNTS, NAMES)
        assert sorted(ours.test["label"]) == [0, 1, 1, 2]
        for epoch in (0, 1):
            parts = [list(loader(ours, epoch, process=p, processes=2)) for p in (0, 1)]
            pictures = [seen(part).int().tolist() for part in parts]
            assert [len(set(part)) for part in pictures] == [20, 20]
            assert not {*pictures[0]} & {*pictures[1]}
            labels = [torch.cat([batch["labels"] for batch in part]).tolist() for part in parts]
            assert labels == [[by_number[i] for i in part] for part in pictures]
        with pytest.raises(ValueError, match="class_counts are not those of"):
            load_longtailed(config(tmp_path / kind, class_counts=[24, 13, 8]))
    (tmp_path / "nested" / "train" / "dodo").mkdir()
    with pytest.raises(ValueError, match="no training image of 1 classes: dodo"):
        load_longtailed(config(tmp_path / "nested"))


def test_files_that_number_the_classes_differently(tmp_path):
    folder = write(tmp_path / "data", files=2)
    labels = load_longtailed(config(folder)).test["label"][:]
    for split, wrong in (("test-00000-of-00001", None), ("train-00001-of-00002", "files of split train number")):
        file = folder / f"{split}.parquet"
        there = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "other"))
        other = datasets.Features(there.features | {"label": datasets.ClassLabel(names=NAMES[::-1])})
        datasets.Dataset.from_list([row | {"label": 2 - row["label"]} for row in there], other).to_parquet(file)
        if wrong is None:
            assert load_longtailed(config(folder)).test["label"][:] == labels
        else:
            with pytest.raises(ValueError, match=wrong):
                load_longtailed(config(folder))


@pytest.mark.parametrize("label", [3, -1, None])
def test_label_of_the_test_split_outside_the_classes(label, tmp_path):
    folder = write(tmp_path / "data", label=datasets.Value("int64"))
    columns = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = [{"img": Image.new("L", (8, 8)), "label": c} for c in (0, label)]
    datasets.Dataset.from_list(rows, columns).to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=rf"split test, column label: row 1 has label {label}, outside 0..2"):
        load_longtailed(config(folder))


def test_counting_decodes_and_reads_no_picture(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", label=datasets.Value("int64"))
    asked, read = [], streaming.pq.read_table
    monkeypatch.setattr(
        streaming.pq, "read_table", lambda file, columns: asked.append(columns) or read(file, columns=columns)
    )
    data = load_longtailed(config(folder, label_column="label"))
    assert asked == [["label"]] * 3
    assert (data.class_counts, data.class_names) == (COUNTS, ["0", "1", "2"])
    data = load_longtailed(config(folder, label_column="label", class_counts=[24, 13, 8]))
    assert len(asked) == 3
    assert data.class_counts == [24, 13, 8]


def test_epoch_has_each_picture_at_most_once_in_another_order(tmp_path):
    data = load_longtailed(config(write(tmp_path / "data")))
    labels = [row["label"] for row in data.train]
    order = [int(row["image"]["bytes"] is not None) for row in data.train]
    assert sum(order) == 46
    epochs = []
    for epoch in (0, 1):
        batches = list(loader(data, epoch))
        assert len(loader(data, epoch)) == len(batches) == 5
        assert [len(batch["labels"]) for batch in batches] == [8] * 5
        epochs.append(seen(batches))
        pictures = epochs[-1].int().tolist()
        assert len(set(pictures)) == 40
        stored = load_longtailed(DataConfig(path=data_path(tmp_path), profile="as_is"))
        by_number = {image.getpixel((0, 0))[0] // 5: c for image, c in zip(stored.train["image"], labels, strict=True)}
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [by_number[i] for i in pictures]
    assert epochs[0].int().tolist() != epochs[1].int().tolist()
    assert torch.equal(seen(loader(data, 1, workers=2)), epochs[1])  # order and augmentation
    assert not torch.equal(seen(loader(data, 1, seed=4)), epochs[1])


def data_path(tmp_path):
    return str(tmp_path / "data")


@pytest.mark.parametrize("files", [2, 3])
def test_two_processes_share_the_pictures(files, tmp_path):
    """Whole files for each, or every second picture where their number is odd."""
    data = load_longtailed(config(write(tmp_path / "data", files)))
    for epoch in (0, 1):
        parts = [seen(loader(data, epoch, process=p, processes=2)).int().tolist() for p in (0, 1)]
        assert [len(part) for part in parts] == [20, 20]
        assert len({*parts[0], *parts[1]}) == 40


def test_process_with_too_few_pictures_reads_its_own_again(tmp_path):
    folder = write(tmp_path / "data", files=2)
    first = folder / "train-00000-of-00002.parquet"
    short = datasets.Dataset.from_parquet(str(first), cache_dir=str(tmp_path / "other")).select(range(15))
    short.to_parquet(first)
    data = load_longtailed(config(folder))
    assert sum(data.class_counts) == 38
    parts = [seen(loader(data, process=p, processes=2)).int().tolist() for p in (0, 1)]
    assert sorted(len(set(part)) for part in parts) == [15, 16]
    assert [len(part) for part in parts] == [16, 16]
    assert not {*parts[0]} & {*parts[1]}


def test_counts_that_promise_more_than_there_is(tmp_path):
    data = load_longtailed(config(write(tmp_path / "data"), class_counts=[100, 14, 8]))
    with pytest.raises(ValueError, match="ended after 46 pictures, but the class counts are 122 in all"):
        list(loader(data))


def test_broken_picture_is_named_or_replaced_within_its_batch(tmp_path):
    data = load_longtailed(config(write(tmp_path / "data", broken=(4, 5))))
    for workers in (0, 1):
        with pytest.raises(
            BrokenPictureError, match=r"^train picture, [45]\.png: no picture, or of an unknown format$"
        ):
            list(loader(data, workers=workers))
    found = {}
    for epoch in range(4):
        batches = list(loader(data, epoch, on_error="replace"))
        assert [len(batch["labels"]) for batch in batches] == [8] * 5
        assert not {4, 5} & set(seen(batches).int().tolist())
        again = list(loader(data, epoch, on_error="replace", workers=2))
        assert torch.equal(seen(batches), seen(again))
        found |= {message: 1 for batch in batches for message in batch["broken"]}
    assert sorted(found) == [f"train picture, {i}.png: no picture, or of an unknown format" for i in (4, 5)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"profile": "exponential"}, r"build --pictures.*profile as_is"),
        ({"test_fraction": 0.2}, "takes a split as it is"),
        ({"class_counts": [3, 0]}, "must be positive"),
        ({"class_counts": [3, 4], "streaming": False}, "belongs to data.streaming"),
        ({"shuffle_buffer": 0}, "at least 1"),
        ({"class_counts": [3, 4]}, "has 2 numbers, but .* has 3 classes"),
        ({"train_split": "val"}, r"no split 'val' .* it has train, test"),
        ({"source": "imagenet_lt"}, "list of imagenet_lt"),
        ({"label_column": "species"}, "no column 'species'"),
    ],
)
def test_what_the_user_is_told(options, said, tmp_path):
    folder = write(tmp_path / "data")
    with pytest.raises(ValueError, match=said):
        load_longtailed(DataConfig(**{"path": str(folder), "profile": "as_is", "streaming": True} | options))


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_strings_and_classes_without_pictures(kind, tmp_path):
    with pytest.raises(ValueError, match=r"no training image of 1 classes: cow$"):
        load_longtailed(config(write(tmp_path / "empty", counts=[9, 5])))
    folder = tmp_path / "words"
    folder.mkdir()
    rows = [{"img": Image.new("L", (8, 8)), "label": "ant"}]
    columns = datasets.Features({"img": datasets.Image(), "label": datasets.Value(kind)})
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, columns).to_parquet(folder / f"{split}-0.parquet")
    with pytest.raises(ValueError, match="column 'label' holds strings"):
        load_longtailed(config(folder))


def run(folder, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return train.main([*FLAGS, f"--output_dir={folder}", *flags])


@pytest.mark.slow
def test_training_resumes_within_an_epoch_bit_by_bit(tmp_path):
    data = f"--data.path={write(tmp_path / 'data')}"
    whole = run(tmp_path / "whole", data)
    run(tmp_path / "parts", data, "--train.max_steps=7")
    parts = run(tmp_path / "parts", data, "--resume", "--data.num_workers=2")
    ours, theirs = (load_file(next((folder / "model").rglob("*.safetensors"))) for folder in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, parts)]
    assert results[0]["steps"] == results[1]["steps"] == 10
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["class_counts"] == COUNTS


def main(arguments):
    """What each of two processes sees of stored and streamed pictures, then a training; `children.begin` calls it."""
    folder, output = arguments
    datasets.config.HF_DATASETS_CACHE = f"{output}/cache"
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = PAUSE
    accelerator = Accelerator()
    rank = accelerator.process_index
    stored = ViewDataset(load_longtailed(DataConfig(path=folder, profile="as_is")).train, {"number": number}, 3)
    data = load_longtailed(config(folder))
    seen = {"stored": [], "streamed": []}
    for epoch in (0, 1):
        stored.epoch = epoch
        streamed = prepare_data_loader(loader(data, epoch, 0, rank, 2), accelerator.device, 1, 0, put_on_device=True)
        for name, batches in (("stored", accelerator.prepare(train_loader(stored, 8, 2))), ("streamed", streamed)):
            seen[name].append([int(n) for batch in batches for n in batch["number"][:, 0, 0, 0]])
    Path(output, f"{rank}.json").write_text(json.dumps(seen))
    train.main([*FLAGS, f"--data.path={folder}", f"--output_dir={output}/run"])


@pytest.mark.slow
def test_two_processes_never_see_the_same_picture_in_an_epoch(tmp_path):
    arguments = [str(write(tmp_path / "data")), str(tmp_path)]
    children = [
        begin(__name__, arguments, tmp_path / f"{rank}.log", environment)
        for rank, environment in enumerate(connections(2))
    ]
    assert [child.wait() for child in children] == [0, 0], [child.said for child in children]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name in ("stored", "streamed"):
        for parts in zip(*(part[name] for part in seen), strict=True):
            assert [len(part) for part in parts] == [20, 20]
            assert len({*parts[0], *parts[1]}) == 40
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["steps"], results["machine"]["processes"], results["test_images"]) == (10, 2, 4)
