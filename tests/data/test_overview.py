"""What is said of pictures before they are trained on."""

from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from ecl_hf.data import overview
from ecl_hf.data.config import DataConfig
from ecl_hf.data.folders import pictures
from ecl_hf.data.longtailed import LongTailedData
from ecl_hf.session import Session

COUNTS, NAMES = [3, 200, 40, 5, 7, 120, 30], ["c0", "c1", "c2", "c3", "c4", "c5", "<c6>\x1b[2J"]


def save(file, seed, size=(20, 10)):
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(file)
    return str(file)


@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"{'ab'[i % 2]}" / f"{i}.png", i, (20 + i, 10 + i)) for i in range(6)]


def parts(train, test):
    split = {"train": train, "test": test}
    return {name: pictures(found, np.arange(len(found)) % 2, ["a", "b"]) for name, found in split.items()}


def test_classes_largest_and_smallest_with_groups():
    lines = overview.describe_classes(COUNTS, NAMES, {"many": 2, "medium": 2, "few": 3}, {"testing": 1234})
    assert lines == [
        "pictures: 405 of 7 classes for training, 1,234 for testing",
        "largest classes: c1 200, c5 120, c2 40",
        "smallest classes: c4 7, c3 5, c0 3",
        "classes by training pictures: 2 have more than 100, 2 have 20 to 100, 3 have fewer than 20",
    ]
    few = overview.describe_classes([1, 2], ["x" * 99, "a\n\x1b[31mb"], {"many": 0, "medium": 0, "few": 2}, {})
    assert few[1] == "classes: a \N{REPLACEMENT CHARACTER}[31mb 2, " + "x" * 19 + "…" + "x" * 20 + " 1"


def test_sizes_broken_files_and_copies(files, tmp_path):
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    copy = tmp_path / "b" / "copy.png"  # of a training picture of class a, and tested on as class b
    copy.write_bytes((tmp_path / "a" / "0.png").read_bytes())
    test = [files[5], str(copy), str(tmp_path / "a" / "broken.png"), str(tmp_path / "a" / "empty.png")]
    lines = overview.describe_pictures(parts(files[:5], test))
    assert lines == [
        "pixels: 20 x 10 to 25 x 15, median 22 x 12",
        "broken files: 2, such as test row 2, a/broken.png: no picture, or of an unknown format",
        "missing or empty files: 1, such as a/empty.png",
        "copies of other files: 1, such as a/0.png (train) and b/copy.png (test)",
        "warning: 1 pictures are in training and test both, such as a/0.png (train) and b/copy.png (test): test scores "
        "will flatter the model; remove one of each",
        "warning: 1 pictures lie in several classes, such as a/0.png (train) and b/copy.png (test)",
    ]


def test_pictures_within_the_data_set_and_validation(files):
    stored = parts(files[:4], files[4:])
    rows = [{"image": {"bytes": Path(files[0]).read_bytes(), "path": None}, "label": 0}] * 2
    stored["val"] = datasets.Dataset.from_list(rows, stored["train"].features)
    lines = overview.describe_pictures(stored)
    assert "copies of other files: 2, such as a/0.png (train) and val row 0 (val)" in lines
    assert not any("warning" in line for line in lines)


def test_a_large_set_is_looked_at_in_part(files, monkeypatch):
    monkeypatch.setattr(overview, "SAMPLE", 3)
    monkeypatch.setattr(overview, "MOST", 5)
    lines = overview.describe_pictures(parts(files[:3], files[3:]))
    assert lines == [
        "pixels, of 3 that were looked at: 20 x 10 to 25 x 15, median 22 x 12",
        "broken files, of 3 that were looked at: none",
        "duplicates: not looked for among more than 5 pictures",
    ]
    monkeypatch.setattr(overview, "SAMPLE_PIXELS", 1)
    assert "of 1 that were looked at" in overview.describe_pictures(parts(files[:3], files[3:]))[0]


def test_files_that_would_take_long_are_not_read(files, monkeypatch):
    twice = [*files, files[0]]
    monkeypatch.setattr(overview, "MOST_BYTES", 10)
    assert "duplicates: not looked for" in overview.describe_pictures(parts(twice[:5], twice[5:]))[-1]


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        ({"path": "photos"}, 6),
        ({"path": "photos", "streaming": True}, 3),
        ({"profile": "exponential"}, 0),
        ({"source": "imagenet_lt"}, 0),
    ],
)
def test_own_pictures_are_described_and_those_of_a_protocol_are_not(files, config, lines):
    split = parts(files[:4], files[4:])
    data = LongTailedData(split["train"], split["test"], [2, 2], ["a", "b"])
    recipe, said = SimpleNamespace(data=DataConfig(**{"profile": "as_is"} | config)), []
    Session._describe_data(SimpleNamespace(recipe=recipe, data=data, say=said.append))
    assert len("".join(said).splitlines()) == lines
    assert not lines or said[0].startswith("pictures: 4 of 2 classes for training, 2 for testing\n")
