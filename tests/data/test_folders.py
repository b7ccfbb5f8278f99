"""What a user's folder may look like that is not as it should be."""

import gc

import numpy as np
import pytest
from PIL import Image

from ecl_hf.data.config import DataConfig
from ecl_hf.data.sources import labels_of, read_source

OPEN_TABLE = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
"""`datasets` leaves the table open."""


@pytest.fixture(autouse=True)
def collected():
    """What was left open is closed before the next test."""
    yield
    gc.collect()


def write_pictures(root, names):
    for place, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (place, 0, 0)).save(path)
    return root


def read(root, **settings):
    return read_source(DataConfig(path=str(root), **{"test_fraction": 0.5, **settings}))


@pytest.mark.parametrize(("place", "fraction"), [("", 0.5), ("train/", 0.5), ("train/", None)])
def test_a_folder_without_class_folders_says_how_to_name_the_classes(tmp_path, place, fraction):
    root = write_pictures(tmp_path / "data", [f"{place}{n}.png" for n in range(3)])
    (root / "labels.csv").write_text("file,class\n0.png,ant\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"3 pictures lie in no class folder: .*metadata\.csv.*file_name and label"):
        read(root, test_fraction=fraction)


@OPEN_TABLE
def test_pictures_that_no_table_names_are_counted(tmp_path):
    root = write_pictures(tmp_path / "data", [f"{n}.png" for n in range(6)])
    rows = [f"{n}.png,{'ant' if n % 2 else 'bee'}" for n in range(4)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *rows]), encoding="utf-8")
    with pytest.warns(UserWarning, match="6 pictures lie in it, and its tables name 4: the others are left out"):
        source = read(root)
    assert source.class_names == ["ant", "bee"]
    np.testing.assert_array_equal(np.bincount(labels_of(source.train)), [2, 2])


@OPEN_TABLE
def test_a_table_that_names_all_pictures_goes_without_a_word(tmp_path):
    root = write_pictures(tmp_path / "data", [f"{n}.png" for n in range(4)])
    rows = [f"{n}.png,{'ant' if n % 2 else 'bee'}" for n in range(4)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *rows]), encoding="utf-8")
    assert len(read(root).train) == 4


def test_a_table_beside_class_folders_is_named(tmp_path):
    root = write_pictures(tmp_path / "data", ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"])
    (root / "labels.csv").write_text("file,class\n", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"labels\.csv is not read: .* must be called metadata\.csv"):
        assert read(root).class_names == ["ant", "bee"]


def test_what_macos_leaves_in_archives_is_no_class(tmp_path):
    root = write_pictures(tmp_path / "data", ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"])
    (root / "__MACOSX" / "ant").mkdir(parents=True)
    (root / "__MACOSX" / "ant" / "._0.png").write_bytes(b"Mac OS X")
    assert read(root).class_names == ["ant", "bee"]
