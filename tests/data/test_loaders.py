"""What the loaders do with broken pictures, and that they decode small sets once."""

import json
import multiprocessing
import re
import weakref

import datasets
import evaluate
import numpy as np
import pytest
import torch
import train
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from ecl_hf.data import loaders, pictures
from ecl_hf.data.folders import pictures as picture_files
from ecl_hf.data.loaders import EpochSampler, Pick, ViewDataset, evaluation_loader, train_loader
from ecl_hf.data.pictures import BrokenPictureError
from ecl_hf.data.streaming import StreamedViews
from ecl_hf.data.views import evaluation_view, supervised_view

PIXELS = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "crop_pct": 1.0}
BROKEN = (2, 3, 9)


def write(folder, count=10):
    """Plain pictures, each of its own grey, 10 times its number."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (16, 16), (10 * i,) * 3).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def source(tmp_path):
    """Ten files with three labels."""
    folder = write(tmp_path / "ant")
    files = [str(folder / f"{i}.png") for i in range(10)]
    return picture_files(files, np.arange(10) % 3, ["a", "b", "c"])


@pytest.fixture
def damaged(source, tmp_path):
    (tmp_path / "ant" / "2.png").write_bytes(b"")
    (tmp_path / "ant" / "3.png").unlink()
    (tmp_path / "ant" / "9.png").write_text("no picture")
    return source


def grey(image):
    """The picture's number."""
    return torch.full((3, 1, 1), np.asarray(image)[0, 0, 0] / 10)


def test_broken_picture_is_named_by_split_row_and_file(damaged):
    dataset = ViewDataset(damaged, {"number": grey})
    assert dataset[4]["number"][0, 0, 0] == 4
    with pytest.raises(BrokenPictureError, match=r"^train row 2, ant/2\.png: empty file$"):
        dataset[2]
    with pytest.raises(BrokenPictureError, match=r"^train row 3, ant/3\.png: the file is not there$"):
        dataset[3]
    with pytest.raises(BrokenPictureError, match=r"^train row 2, "):
        ViewDataset(damaged, {"number": grey}, keep=True)


def test_broken_picture_within_a_worker_is_named_in_the_main_process(damaged):
    with pytest.raises(BrokenPictureError, match=r"^test row 2, ant/2\.png: empty file$"):
        list(evaluation_loader(damaged, grey, 4, num_workers=2))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_picture_is_replaced_by_the_next_with_its_label(damaged, keep, workers):
    dataset = ViewDataset(damaged, {"number": grey}, seed=1, on_error="replace", keep=keep)
    shown = {i: i for i in range(10)} | {2: 4, 3: 4, 9: 0}
    for epoch in (0, 3):
        dataset.epoch = epoch
        rows = list(EpochSampler(dataset, 5))
        batches = list(train_loader(dataset, 5, num_workers=workers))
        assert [len(batch["labels"]) for batch in batches] == [5, 5]
        whole = {
            name: torch.cat([batch[name] for batch in batches]).flatten(1 - (name != "number"))
            for name in ("number", "labels")
        }
        assert whole["number"][:, 0].tolist() == [shown[row] for row in rows]
        assert whole["labels"].tolist() == [shown[row] % 3 for row in rows]
        found = [message for batch in batches for message in batch["broken"]]
        assert found == [dataset.defects([row])[0] for row in rows if row in BROKEN]
    assert dataset.defects(BROKEN) == [
        "train row 2, ant/2.png: empty file",
        "train row 3, ant/3.png: the file is not there",
        "train row 9, ant/9.png: no picture, or of an unknown format",
    ]


def test_replaced_picture_is_augmented_by_the_position_that_it_fills(damaged):
    view = {"pixel_values": lambda _: torch.rand(3, 1, 1)}
    dataset = ViewDataset(damaged, view, on_error="replace")
    draws = [dataset[row]["pixel_values"][0].item() for row in range(10)]
    assert len(set(draws)) == 10


def test_nothing_but_broken_pictures(damaged):
    dataset = ViewDataset(damaged.select([2, 3, 9]), {"number": grey}, on_error="replace")
    with pytest.raises(ValueError, match="none of the 3 train pictures can be decoded"):
        dataset[1]


def test_broken_test_picture_keeps_its_place_and_has_no_class(damaged):
    batches = list(evaluation_loader(damaged, evaluation_view(PIXELS), 4, on_error="mark"))
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.tolist() == [-1 if row in BROKEN else row % 3 for row in range(10)]
    assert torch.cat([batch["pixel_values"] for batch in batches]).shape == (10, 3, 16, 16)


@pytest.fixture
def decoded(monkeypatch):
    """How many pictures were decoded, also in other processes."""
    counter, original = multiprocessing.Value("i", 0), pictures.decode

    def count(record, *more):
        with counter.get_lock():
            counter.value += 1
        return original(record, *more)

    monkeypatch.setattr(loaders, "decode", count)
    return counter


def labels_of_epochs(dataset, workers, epochs=3):
    seen = []
    for dataset.epoch in range(epochs):
        seen.append([batch["pixel_values"] for batch in train_loader(dataset, 5, num_workers=workers)])
    return torch.cat([torch.cat(batches) for batches in seen])


@pytest.mark.parametrize("workers", [0, 2])
def test_small_set_is_decoded_once(source, workers, decoded, monkeypatch):
    views = {"pixel_values": supervised_view(PIXELS)}
    kept = labels_of_epochs(ViewDataset(source, views, keep=True), workers)
    assert decoded.value == 10
    assert torch.equal(labels_of_epochs(ViewDataset(source, views), workers), kept)
    assert decoded.value == 10 + 30
    monkeypatch.setattr(loaders, "DECODED_LIMIT", 10 * 3 * 16 * 16 - 1)  # one byte less than the set
    assert torch.equal(labels_of_epochs(ViewDataset(source, views, keep=True), workers), kept)
    assert decoded.value == 10 + 30 + 30
    monkeypatch.setattr(loaders, "DECODED_LIMIT", 10**9)
    monkeypatch.setattr(pictures, "DECODED_LIMIT", 4 * 3 * 16 * 16)  # larger than the sample had it: four are kept
    assert torch.equal(labels_of_epochs(ViewDataset(source, views, keep=True), workers), kept)
    assert decoded.value == 10 + 30 + 30 + 10 + 3 * 6


def test_one_picture_at_a_time_is_in_memory(damaged, monkeypatch):
    """A batch of 256 photographs of 12 million pixels would take ten gigabytes."""
    decoded, seen, original = [], [], pictures.decode

    def watched(record, *more):
        image = original(record, *more)
        decoded.append(weakref.ref(image))
        return image

    def view(_):
        seen.append(sum(image() is not None for image in decoded))
        return torch.rand(1)

    for module in ("loaders", "streaming"):
        monkeypatch.setattr(f"ecl_hf.data.{module}.decode", watched)
    monkeypatch.setattr(loaders, "READ", 4)
    monkeypatch.setattr(loaders, "AHEAD", 256)  # pixels of one picture here
    ViewDataset(damaged, {"pixel_values": view}, on_error="mark").__getitems__([Pick(i, 0, 9 - i) for i in range(10)])
    assert len(seen) == 20
    records = [damaged.cast_column("image", datasets.Image(decode=False))[i] | {"place": i} for i in range(10)]
    items = StreamedViews({"pixel_values": view}, on_error="replace").__getitems__(records)
    assert [item["labels"] for item in items] == [0, 1, 1, 1, 1, 2, 0, 1, 2, 0]
    assert [item["indices"] for item in items if item["broken"]] == list(BROKEN)
    assert len(seen) == 30
    assert max(seen) == 2  # one goes while the next one comes


def test_batches_of_large_inputs_are_small():
    sides = (8, 224, 225, 448, 2048)
    assert [loaders.fitting(256, (3, side, side)) for side in sides] == [256, 64, 63, 16, 1]
    assert loaders.fitting(32, (3, 224, 224)) == 32


def test_pictures_in_tables_are_read_as_they_are_stored(tmp_path):
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": b"nothing", "path": "a.png"}], "label": [0]}
    with pytest.raises(BrokenPictureError, match=r"^val row 0, a\.png: no picture"):
        ViewDataset(datasets.Dataset.from_dict(rows, columns), {"number": grey}, split="val")[0]


TINY = [
    *("--method=bc", "--data.profile=as_is", "--batch_size=8", "--epochs=2"),
    *("--model.architecture=resnet20_cifar", "--model.image_size=8"),
]


@pytest.fixture
def tree(tmp_path):
    """Class folders; three broken pictures to train on, one to test on."""
    for split, count in (("train", 10), ("test", 6)):
        for name in ("ant", "bee"):
            write(tmp_path / "data" / split / name, count)
    damaged = [tmp_path / "data" / "train" / "bee" / f"{i}.png" for i in BROKEN]
    for file in (*damaged, tmp_path / "data" / "test" / "ant" / "4.png"):
        file.write_bytes(file.read_bytes()[:50])
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.parametrize("flags", [["--data.num_workers=1", "--epochs=1"], []], ids=["worker", "kept"])
def test_training_stops_and_names_the_broken_picture(tree, flags):
    with pytest.raises(SystemExit, match=r"^error: train row 1[239], bee/[239]\.png: .*; data\.on_error skip"):
        train.main([*TINY, f"--data.path={tree / 'data'}", f"--output_dir={tree / 'run'}", *flags])
    assert not (tree / "run" / "results.json").exists()


@pytest.mark.slow
def test_training_and_test_go_on_without_broken_pictures(tree, capsys):
    flags = [*TINY, f"--data.path={tree / 'data'}", "--data.on_error=skip"]
    run = train.main([*flags, f"--output_dir={tree / 'run'}"])
    printed = capsys.readouterr().out
    assert "4 pictures could not be decoded and were skipped:\ntrain row 12, bee/2.png: " in printed
    assert re.search(r"\ntest row 4, ant/4\.png: .+\n", printed)
    results = json.loads((run / "results.json").read_text())
    broken = results["broken_pictures"]
    assert (broken["train"], broken["test"], results["test_images"]) == (3, 1, 11)
    assert [line.split(":")[0] for line in broken["first"]] == [
        *(f"train row 1{i}, bee/{i}.png" for i in BROKEN),
        "test row 4, ant/4.png",
    ]

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    train.main([*flags, f"--output_dir={tree / 'parts'}", "--train.max_steps=3"])
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([*flags, f"--output_dir={tree / 'parts'}", "--data.num_workers=2", "--resume"])
    parts = json.loads((tree / "parts" / "results.json").read_text())
    assert parts["test"] == results["test"]
    assert parts["broken_pictures"] == broken

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    tested = evaluate.main([f"--run={run}", "--landscape_images=12"])
    assert tested["test"] == results["test"]
    assert tested["broken_pictures"]["test"] == 1
    assert "1 test images could not be decoded and are left out:\ntest row 4, ant/4.png" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["tde_idr", "ncm", "tcl"])
def test_methods_that_look_at_all_training_pictures_leave_broken_ones_out(tree, method):
    flags = [*TINY, f"--method={method}", f"--data.path={tree / 'data'}", "--data.on_error=skip"]
    run = train.main([*flags, f"--output_dir={tree / 'run'}"])
    assert json.loads((run / "results.json").read_text())["finished"]
