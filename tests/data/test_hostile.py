"""Data sets that a stranger made: nothing waits for ever, fills the memory or leaks; what is wrong is named."""

import inspect
import json
import os
import shutil
import struct
import sys
import warnings
import zlib

import data as data_script
import datasets
import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ecl_hf.data.config import DataConfig
from ecl_hf.data.folders import Seen, find_pictures
from ecl_hf.data.loaders import ViewDataset
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.pictures import BrokenPictureError, decode
from ecl_hf.data.splits import PARTS, Split
from ecl_hf.evidence.evaluation import Predictions
from tests.data.test_pictures import stored

ODD_FILES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": lambda path: path.mkdir(),
    "terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


def zeros(width, height, rows=None):
    """A PNG of so many black pixels, in few bytes; with fewer rows than its header promises."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    content = b"".join(packer.compress(bytes(1 + width)) for _ in range(rows or height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def png(seed=0):
    return stored(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)))["bytes"]


@pytest.fixture
def folders(tmp_path):
    """Two classes of six pictures."""
    root = tmp_path / "photos"
    for n in range(12):
        file = root / "ab"[n % 2] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(n))
    return root


def tables(root, images=None, labels=None, kind=None):
    """Parquet files of ten pictures each."""
    root.mkdir()
    images = images or [{"bytes": png(n), "path": None} for n in range(10)]
    labels = pa.array(labels or [n % 2 for n in range(10)], kind or pa.int64())
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(str(labels.type))})
    about = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    for split in ("train", "test"):
        pq.write_table(
            pa.table({"image": image, "label": labels}).replace_schema_metadata(about), root / f"{split}-0.parquet"
        )
    return root


def load(root, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few pictures
        return load_longtailed(DataConfig(path=str(root), **{"profile": "as_is", **more}))


def own(root, **more):
    return load(root, test_fraction=0.3, **more)


def test_class_names_in_messages_do_nothing_to_a_terminal(folders):
    (folders / "b").rename(folders / "\x1b[31mred")
    with pytest.raises(ValueError, match=r"few images of 1 classes: \ufffd\[31mred \(4 of 9\)"):
        own(folders, profile="pareto", max_count=9)


@pytest.mark.parametrize("odd", ODD_FILES.values(), ids=ODD_FILES)
def test_only_regular_files_are_pictures(odd, tmp_path):
    odd(tmp_path / "x.png")
    with pytest.raises(BrokenPictureError, match=r"^picture, .*/x\.png: "):
        decode({"bytes": None, "path": str(tmp_path / "x.png")})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (zeros(1, 30_000), "1 x 30000: a side is more than 100 times the other"),
        (zeros(20_000, 10), "a side is more than 100 times"),
        (zeros(9500, 9500), "9500 x 9500 pixels are more than data.max_pixels, 89478485"),
        (zeros(40_000, 40_000, rows=1), "Image size .1600000000 pixels. exceeds limit"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", "of an unknown format"),
    ],
    ids=["tall", "wide", "large", "giant", "eps"],
)
def test_pictures_that_would_fill_the_memory_or_start_programs(content, said, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BrokenPictureError, match=said):
        decode({"bytes": content, "path": None})


def test_pixels_may_be_bounded(folders):
    pictures = own(folders).train
    assert decode(stored(Image.new("RGB", (8, 8))), max_pixels=64).size == (8, 8)
    with pytest.raises(
        BrokenPictureError,
        match=r"train row 0, .: 8 x 8 pixels are more than data\.max_pixels, 63".replace(", .", ", ./.*png"),
    ):
        ViewDataset(pictures, {}, max_pixels=63)[0]
    with pytest.raises(ValueError, match=r"data\.max_pixels must lie in 1\.\."):
        DataConfig(max_pixels=0)


@pytest.mark.parametrize("target", ["photos/a", "photos", "", "/"])
def test_links_into_the_data_set_or_above_it_are_refused(target, folders, tmp_path):
    (folders / "a" / "more").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"photos/a/more is the same folder as .*; remove the link"):
        own(folders)


def test_test_pictures_do_not_come_into_training(folders):
    for split in ("train", "test"):
        (folders / split).mkdir()
    for name in "ab":
        (folders / name).rename(folders / "train" / name)
        (folders / "test" / name).mkdir()
        (folders / "test" / name / "x.png").write_bytes(png(ord(name)))
    assert sum(load(folders).class_counts) == 12
    (folders / "train" / "a" / "more").symlink_to(folders / "test" / "b")
    with pytest.raises(ValueError, match=r"is the same folder as .*train/a/more"):
        load(folders)


@pytest.mark.parametrize(
    "name", ["photos", "photos/**/*.png", "**/[0-9]*.png", "photos/**", "*/**/**/*", "ph*/*/*.png"]
)
def test_each_picture_is_found_once(name, folders, tmp_path, monkeypatch):
    """Through two links upwards there are as many ways to each as the system's bound on links lets be."""
    monkeypatch.chdir(tmp_path)
    for link in ("a/up", "b/up"):
        (folders / link).symlink_to(folders)
    (folders / "a" / "circle").symlink_to("circle")
    (folders / "a" / ".hidden.png").write_bytes(png())
    (folders / "[b]").mkdir()
    (folders / "[b]" / "12.png").write_bytes(png())
    found = find_pictures([name, "photos/b", "photos/a/up/b/*.png"])
    assert sorted(int(path.stem) for path in found) == list(range(13))
    assert {path.parent for path in found} == {folders.relative_to(tmp_path) / folder for folder in ("a", "b", "[b]")}
    assert find_pictures([str(tmp_path / name)]) == [tmp_path / path for path in find_pictures([name])]


def test_more_folders_in_each_other_than_functions_may_be(folders):
    (folders / "a" / "/".join("d" * 200)).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert len(find_pictures([str(folders)])) == len(find_pictures([f"{folders}/**/*.png"])) == 12
        assert len(Seen([]).files(folders)) == 12
    finally:
        sys.setrecursionlimit(limit)


def test_class_folder_may_lie_elsewhere(folders, tmp_path):
    (folders / "b").rename(tmp_path / "elsewhere")
    (folders / "b").symlink_to(tmp_path / "elsewhere")
    (folders / "a" / "unreachable").symlink_to("unreachable")
    assert sum(own(folders).class_counts) + len(own(folders).test) == 12


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_beside_a_link_upwards(streaming, tmp_path):
    root = tables(tmp_path / "tables")
    (root / "up").symlink_to(".")
    with pytest.raises(ValueError, match=r"tables/up is the same folder as"):
        load(root, label_column="label", streaming=streaming)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": png(n), "path": None} for n in range(10)], "label": [n % 2 for n in range(10)]}
    part = datasets.Dataset.from_dict(rows, features).with_format("torch")
    datasets.DatasetDict(train=part, test=part).save_to_disk(tmp_path_factory.mktemp("saved") / "data")
    return tmp_path_factory.getbasetemp() / "saved0" / "data"


STATE, INFO, ARROW = "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow"


@pytest.mark.parametrize("odd", ODD_FILES.values(), ids=ODD_FILES)
@pytest.mark.parametrize("name", [STATE, INFO, ARROW])
def test_only_regular_files_of_a_saved_data_set_are_read(name, odd, on_disk, tmp_path):
    root = shutil.copytree(on_disk, tmp_path / "data")
    (root / name).unlink()
    odd(root / name)
    with pytest.raises((ValueError, OSError), match=f"{root}/{name} |can't read the data set {root}"):
        load(root)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dataset_dict.json", "{}"),
        ("dataset_dict.json", "[]"),
        ("dataset_dict.json", '{"splits": 7}'),
        ("dataset_dict.json", '{"splits": ["train", "../data/test"]}'),
        (STATE, "{}"),
        (STATE, '{"_data_files": [7]}'),
        (STATE, '{"_data_files": [{"filename": "/dev/zero"}]}'),
        pytest.param(INFO, "[" * 100_000, id="deep"),
        (INFO, "[]"),
        (INFO, '{"features": 7}'),
    ],
)
def test_descriptions_of_a_saved_data_set_that_are_none(name, text, on_disk, tmp_path):
    assert load(on_disk).class_counts == [5, 5]
    root = shutil.copytree(on_disk, tmp_path / "data")
    (root / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{root}/{name} |can't read the data set {root}"):
        load(root)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("odd", ["pipe", "device", "terabyte"])
@pytest.mark.parametrize("name", [".huggingface.yaml", "metadata.csv", "README.md"])
def test_tables_beside_what_never_ends(name, odd, streaming, tmp_path):
    root = tables(tmp_path / "tables")
    ODD_FILES[odd](root / name)
    if name.startswith(".") or odd == "terabyte":
        with pytest.raises(ValueError, match=rf"tables/{name} (is no regular file|has 109951\d+ bytes)"):
            load(root, label_column="label", streaming=streaming)
    else:
        assert load(root, label_column="label", streaming=streaming).class_counts == [5, 5]


def test_names_that_are_no_text_are_named(folders):
    (folders / "a" / "x\udcff.png").write_bytes(png())
    with pytest.raises(ValueError, match=r"the name of .*udcff.* is no UTF-8"):
        own(folders)
    (folders / "c\udcff").mkdir()
    with pytest.raises(ValueError, match=r"the name of the class folder .*udcff.* is no UTF-8"):
        own(folders)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [pa.uint8(), pa.uint64(), pa.int16()], ids=str)
def test_labels_of_any_integer_type(kind, streaming, tmp_path):
    data = load(tables(tmp_path / "tables", kind=kind), label_column="label", streaming=streaming)
    assert data.class_counts == [5, 5]
    assert list(data.test["label"][:]) == [0, 1] * 5


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("label", [300_000_000, 2**63 + 1])
def test_absurd_label_is_named(label, streaming, tmp_path):
    root = tables(tmp_path / "tables", labels=[0, 1, 0, label] + [1] * 6, kind=pa.uint64())
    with pytest.raises(ValueError, match=rf"column label.*row 3 has label {label}"):
        load(root, label_column="label", streaming=streaming)


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}])
def test_row_without_a_picture_is_named_or_skipped(image, tmp_path):
    images = [{"bytes": png(n), "path": None} for n in range(9)] + [image]
    pictures = load(tables(tmp_path / "tables", images), label_column="label").train
    with pytest.raises(BrokenPictureError, match="train row 9: no picture in this row"):
        ViewDataset(pictures, {})[9]
    assert ViewDataset(pictures, {}, on_error="replace")[9]["labels"] == 0


def build(root, output, *flags):
    return build_lists(root, output, *flags, "--pictures")


def build_lists(root, output, *flags):
    flags = ["--data.profile=as_is", *flags, f"--output={output}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data_script.main(["build", f"--data.path={root}", *flags])


def test_row_without_a_picture_is_found_by_verify(tmp_path, capsys):
    images = [{"bytes": png(n), "path": None} for n in range(9)] + [None]
    root = tables(tmp_path / "tables", images)
    build_lists(root, tmp_path / "split", "--data.label_column=label")
    with pytest.raises(SystemExit, match="error: 0 differences, 2 broken pictures"):
        data_script.main(["verify", str(tmp_path / "split"), f"--data.path={root}"])
    assert "broken: test row 9 (source row 9): no picture in this row" in capsys.readouterr().out


def test_picture_that_a_split_lost_is_found_by_verify(tmp_path, capsys):
    root = tables(tmp_path / "tables")
    split = build(root, tmp_path / "split", "--data.label_column=label")
    [file] = (split.path / "data").glob("train-*")
    table = pq.read_table(file)
    column, kind = table.column_names.index("image"), table.schema.field("image")
    pq.write_table(table.set_column(column, kind, pa.nulls(len(table), kind.type)), file)
    with pytest.raises(SystemExit, match="error: 10 differences, 10 broken pictures"):
        data_script.main(["verify", str(split.path), f"--data.path={root}"])
    assert "differs: train row 3 (source row 3): not the source's picture" in capsys.readouterr().out


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret.png"
    file.write_bytes(png(99))
    return file


@pytest.mark.parametrize("dots", ["", "tables/../"])
def test_no_file_that_a_table_names_is_published(dots, secret, tmp_path):
    images = [{"bytes": png(n), "path": None} for n in range(9)] + [
        {"bytes": None, "path": f"{tmp_path}/{dots}secret.png"}
    ]
    root = tables(tmp_path / "tables", images)
    with pytest.raises(SystemExit, match=r"^error: train row 9: .*secret\.png lies outside of the data set"):
        build(root, tmp_path / "split", "--data.label_column=label")
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("named", ["secret.png", "tables/link.png"])
def test_no_file_that_a_table_names_is_shown_in_a_report(named, secret, tmp_path, capsys):
    """All pictures of a class are taken for another; two of them are the data set's, one has no name."""
    root = tmp_path / "tables"
    paths = [f"{root}/own.png", f"{tmp_path}/{named}", "a\0b"]
    images = [{"bytes": png(n), "path": None} for n in range(2)] + [{"bytes": None, "path": path} for path in paths]
    tables(root, images, [1, 0, 0, 0, 0])
    (root / "own.png").write_bytes(png(2))
    (root / "link.png").symlink_to(secret)
    data = load(root, label_column="label")
    logits = torch.tensor([[0.0, 5.0], [0.0, 4.0], [0.0, 3.0], [0.0, 2.0], [0.0, 1.0]])
    predictions = Predictions(torch.tensor([1, 0, 0, 0, 0]), logits[:, None], logits[:, None])
    [worst] = evaluate.class_tables(predictions, data, [4, 1], torch.ones(2), 10**6)["worst"]
    confidences = logits[1:3].double().softmax(-1)[:, 1].tolist()
    assert [picture["confidence"] for picture in worst["pictures"]] == confidences
    assert capsys.readouterr().out.startswith("2 pictures of mistakes are not shown")


def test_no_file_that_a_link_leads_to_is_published(secret, folders, tmp_path):
    (folders / "a" / "x.png").symlink_to(secret)
    with pytest.raises(
        SystemExit, match=r"^error: train row \d: .*a/x\.png lies outside of the data set, or leads there"
    ):
        build(folders, tmp_path / "split", "--data.test_fraction=0.1")
    (folders / "a" / "x.png").unlink()
    (folders / "a" / "x.png").symlink_to("0.png")  # one of its own
    split = build(folders, tmp_path / "split", "--data.test_fraction=0.1")
    copied = [
        row["bytes"]
        for part in PARTS
        for row in pq.read_table(next((split.path / "data").glob(f"{part}-*")))["image"].to_pylist()
    ]
    assert sorted(copied) == sorted(file.read_bytes() for file in folders.rglob("*.png"))


def test_split_with_paths_in_place_of_pictures_is_not_pushed(secret, folders, tmp_path):
    split = build(folders, tmp_path / "split", "--data.test_fraction=0.1")
    [file] = (split.path / "data").glob("train-*")
    table = pq.read_table(file)
    images = [{"bytes": None, "path": str(secret)} for _ in range(len(table))]
    image = pa.array(images, table.schema.field("image").type)
    pq.write_table(table.set_column(0, table.schema.field("image"), image), file)
    assert Split.read(split.path).has_pictures
    with pytest.raises(SystemExit, match=r"train row 0 holds no picture"):
        data_script.main(["push", str(split.path), "--repo_id=me/stolen"])
