"""Splits as objects: what is written, what is refused, and that a run takes just these pictures."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtail import longtail_indices
from ecl_hf.data.longtailed import choose_rows, load_longtailed, load_source
from ecl_hf.data.splits import Split, compare_rows

NAMES = ["Grüner Specht", "ant hill", "bee"]
COUNTS = {"train": [12, 9, 10], "test": [2, 1, 3]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path):
    """Class folders whose pictures are numbered, and a protocol."""
    value = 0
    for split, counts in COUNTS.items():
        for name, count in zip(NAMES, counts, strict=True):
            (tmp_path / "source" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((4, 4, 3), value, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "source" / split / name / f"{i:02d}.png")
                value += 1
    return DataConfig(path=str(tmp_path / "source"), imbalance_factor=4, split_seed=3)


def build(config, path, with_pictures=False):
    source = load_source(config)
    return Split.write(path, config, source, choose_rows(config, source), with_pictures)


def values(split):
    return [image.getpixel((0, 0))[0] for image in split.cast_column("image", datasets.Image())["image"]]


def test_record(config, tmp_path):
    split = build(config, tmp_path / "split")
    assert sorted(path.name for path in split.path.iterdir()) == ["split.json", "test_rows.txt", "train_rows.txt"]
    record = json.loads((split.path / "split.json").read_text(encoding="utf-8"))
    assert Split.read(split.path).record == record == split.record
    labels = np.repeat(np.arange(3), COUNTS["train"])
    rows = sorted(longtail_indices(labels, [9, 4, 2], seed=3).tolist())
    assert record["protocol"] == "cao-seed3"
    assert record["class_names"] == NAMES
    assert record["data"]["imbalance_factor"] == 4
    assert record["source"]["name"] == "source"  # not where it lies
    assert str(tmp_path) not in (split.path / "split.json").read_text()
    for part, expected, counts in (("train", rows, [9, 4, 2]), ("test", list(range(6)), COUNTS["test"])):
        file = split.path / f"{part}_rows.txt"
        assert file.read_text() == "".join(f"{row}\n" for row in expected)
        assert record["parts"][part] == {
            "images": len(expected),
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "class_counts": counts,
        }
        assert split.rows()[part].tolist() == expected
        source_labels = "".join(f"{c}\n" for c in np.repeat(np.arange(3), COUNTS[part]))
        digest = hashlib.sha256(source_labels.encode()).hexdigest()
        assert record["source"][part] == {"images": sum(COUNTS[part]), "labels_sha256": digest}


def test_lists_are_the_same_on_every_machine():
    """Of 10 x 100 interleaved labels; the numbers were computed once."""
    labels = np.arange(1000) * 7 % 10
    expected = {
        0: "511d70d80bb5c1505886eabef1e00966a28093d54447bab097a9f0a770db4542",
        1: "157655b35a45187dbcbb52ed840064ae2c690c0c8e3192dea1b57d4143d769b6",
        "first": "236454fb4b4fd547bd2e3e2a22b2ce09cd48a248c725ba5dba3510d770c1c28f",
    }
    for seed, digest in expected.items():
        rows = np.sort(longtail_indices(labels, [100, 60, 36, 21, 13, 8, 5, 3, 2, 1], seed))
        assert hashlib.sha256("".join(f"{row}\n" for row in rows).encode()).hexdigest() == digest


@pytest.mark.filterwarnings("ignore:.*test is not used:UserWarning")
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "cao-seed3"),
        ({"split_seed": "first"}, "cao-first"),
        ({"profile": "pareto"}, "cao-seed3"),
        ({"profile": "as_is"}, "as_is"),
        ({"profile": "as_is", "test_fraction": 0.2}, "cao-seed3"),
    ],
)
def test_protocol_names(options, name, config, tmp_path):
    assert build(replace(config, **options), tmp_path / "split").record["protocol"] == name


@pytest.mark.filterwarnings("ignore:.*test is not used:UserWarning")
def test_held_out_rows_are_positions_in_the_training_pictures(config, tmp_path):
    split = build(replace(config, test_fraction=0.3), tmp_path / "split")
    rows = split.rows()
    assert split.record["parts"]["test"]["class_counts"] == [4, 3, 3]
    assert not set(rows["train"].tolist()) & set(rows["test"].tolist())
    assert rows["test"].max() < sum(COUNTS["train"])
    assert split.record["source"]["test"] == split.record["source"]["train"]


@pytest.mark.filterwarnings("ignore:.*fewer than 5")
def test_pictures_are_copied_as_they_are(config, tmp_path):
    split = build(config, tmp_path / "split", with_pictures=True)
    expected = load_longtailed(config)
    data = load_longtailed(DataConfig(path=str(split.path), profile="as_is", split_seed=1))
    assert data.class_names == NAMES
    assert data.class_counts == expected.class_counts == [9, 4, 2]
    for found, wanted in ((data.train, expected.train), (data.test, expected.test)):
        assert values(found) == values(wanted)
        assert list(found["label"]) == list(wanted["label"])
        stored = found.cast_column("image", datasets.Image(decode=False))["image"]
        files = wanted.cast_column("image", datasets.Image(decode=False))["image"]
        for record, file in zip(stored, files, strict=True):
            assert record["bytes"] == Path(file["path"]).read_bytes()
            assert record["path"] == Path(file["path"]).name


@pytest.mark.filterwarnings("ignore:.*fewer than 5")
def test_many_pictures_are_stored_in_parts(config, tmp_path, monkeypatch):
    monkeypatch.setattr("ecl_hf.data.splits.SHARD", 4)
    monkeypatch.setattr("ecl_hf.data.splits.ROW_GROUP", 3)
    split = build(config, tmp_path / "split", with_pictures=True)
    assert len(list((split.path / "data").glob("train-*-of-00004.parquet"))) == 4
    data = load_longtailed(DataConfig(path=str(split.path), profile="as_is"))
    assert values(data.train) == values(load_longtailed(config).train)


def test_run_takes_the_rows_of_the_split(config, tmp_path):
    split = build(config, tmp_path / "split")
    named = load_longtailed(replace(config, split=str(split.path)))
    computed = load_longtailed(config)
    assert values(named.train) == values(computed.train)
    assert named.class_counts == computed.class_counts
    # Another list under the same protocol, as somebody else's tools may have made it: it is taken, not computed.
    replace_list(split, "".join(f"{row}\n" for row in range(15)))
    theirs = load_longtailed(replace(config, split=str(split.path)))
    assert values(theirs.train) == list(range(15))
    assert theirs.class_counts == [12, 3, 0]


def replace_list(split, text):
    """Put another list and its digest in the place of the training list."""
    (split.path / "train_rows.txt").write_text(text)
    record = json.loads((split.path / "split.json").read_text())
    record["parts"]["train"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (split.path / "split.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1\ntwo\n", "lines that are no positions"),
        ("1\n-2\n", "lines that are no positions"),
        (f"1\n{10**19}\n", "lines that are no positions"),
        ("1\n3\n2\n", "must ascend"),
        ("1\n1\n", "must ascend"),
        ("1\n31\n", "less than the source's 31 pictures"),
    ],
)
def test_senseless_list(text, said, config, tmp_path):
    split = build(config, tmp_path / "split")
    replace_list(split, text)
    with pytest.raises(ValueError, match=rf"train_rows\.txt.*{said}"):
        Split.read(split.path).rows()


def test_where_the_source_is(config, tmp_path):
    split = build(config, tmp_path / "split")
    with pytest.raises(ValueError, match=r"made of the local directory source: name it in data\.path"):
        split.config(path=None)
    assert split.config(path="/elsewhere") == replace(config, path="/elsewhere")
    for record, source in (
        ({"protocol": "cao-seed0", "name": "uoft-cs/cifar10", "local": False}, "uoft-cs/cifar10"),
        ({"protocol": "cao-seed0", "name": "imagenet_lt", "local": True}, DataConfig().source),  # a folder of that name
        ({"protocol": "imagenet_lt", "name": "imagenet_lt", "local": True}, "imagenet_lt"),
    ):
        split.record["protocol"] = record.pop("protocol")
        split.record["source"] |= record
        assert split.config(path="/elsewhere").source == source


@pytest.mark.filterwarnings("ignore:.*test is not used:UserWarning")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"imbalance_factor": 2.0}, r"data\.imbalance_factor is 2\.0, there 4"),
        (
            {"split_seed": "first", "max_count": 8},
            r"data\.max_count is 8, there None; data\.split_seed is first, there 3",
        ),
        ({"profile": "as_is"}, r"data\.profile is as_is, there exponential"),
        ({"test_fraction": 0.5}, r"data\.test_fraction is 0\.5, there None"),
    ],
)
def test_other_protocol_than_the_split(options, said, config, tmp_path):
    split = build(config, tmp_path / "split")
    with pytest.raises(ValueError, match=said):
        load_longtailed(replace(config, split=str(split.path), **options))


def remove_picture(root):
    (root / "train" / "bee" / "03.png").unlink()


def move_picture(root):
    (root / "train" / "bee" / "03.png").rename(root / "train" / "ant hill" / "99.png")


def rename_class(root):
    for split in COUNTS:
        (root / split / "bee").rename(root / split / "wasp")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove_picture, "the source has 30 train pictures, the split's had 31"),
        (move_picture, r"other labels than the split's, or in another order \(train pictures\)"),
        (rename_class, r"classes of the split alone: bee \(1\); classes of the source alone: wasp \(1\)"),
    ],
)
def test_other_source_than_the_split(change, said, config, tmp_path):
    split = build(config, tmp_path / "split")
    change(tmp_path / "source")
    with pytest.raises(ValueError, match=said):
        load_longtailed(replace(config, split=str(split.path)))


def test_classes_in_another_order(config, tmp_path):
    split = build(config, tmp_path / "split")
    source = load_source(config)
    assert split.differences(source) == []
    turned = replace(source, class_names=[NAMES[1], NAMES[0], NAMES[2]])
    assert split.differences(turned) == [
        "the classes are in another order: class 0 is ant hill in the source, Grüner Specht in the split"
    ]


def test_changed_list(config, tmp_path):
    split = build(config, tmp_path / "split")
    (split.path / "train_rows.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"train_rows\.txt was changed"):
        split.rows()
    (split.path / "train_rows.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_rows\.txt is missing"):
        split.rows()


@pytest.mark.parametrize("text", ["", "{}", '{"parts": 3}', "[]"])
def test_damaged_record(text, config, tmp_path):
    split = build(config, tmp_path / "split")
    (split.path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=r"split\.json is damaged"):
        Split.read(split.path)


def test_unknown_key_in_the_record(config, tmp_path):
    split = build(config, tmp_path / "split")
    record = split.record | {"data": split.record["data"] | {"mystery": 1}}
    (split.path / "split.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"split\.json is damaged.*mystery"):
        Split.read(split.path)


def test_no_split_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no split\.json"):
        Split.read(tmp_path)


def test_nothing_is_overwritten(config, tmp_path):
    (tmp_path / "split").mkdir()
    build(config, tmp_path / "split")
    before = {path.name: path.read_bytes() for path in (tmp_path / "split").iterdir()}
    with pytest.raises(FileExistsError, match="not an empty directory"):
        build(replace(config, split_seed=0), tmp_path / "split")
    assert {path.name: path.read_bytes() for path in (tmp_path / "split").iterdir()} == before


def test_all_or_nothing(config, tmp_path):
    source = load_source(config)
    rows = choose_rows(config, source)
    (tmp_path / "source" / "test" / "bee" / "02.png").unlink()  # is found to be missing when it is copied
    with pytest.raises(FileNotFoundError, match=r"02\.png"):
        Split.write(tmp_path / "split", config, source, rows, with_pictures=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_comparison_of_lists():
    assert compare_rows(np.array([1, 2, 5]), np.array([1, 2, 5])) is None
    assert compare_rows(np.array([1, 2, 7]), np.array([1, 3, 5])) == (
        "2 rows that the protocol does not take, 2 missing; row 2 is there, row 3 is missing"
    )
    assert compare_rows(np.array([1]), np.array([1, 3])) == (
        "0 rows that the protocol does not take, 1 missing; row 3 is missing"
    )
