"""Input that nobody thought of: a clear error or a correct result, and nothing else."""

import io
import json
import shutil
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.pictures import BrokenPictureError, decode
from ecl_hf.runs.checkpoints import CHECKSUMS, find_defect, seal
from ecl_hf.runs.folder import flatten
from ecl_hf.runs.recipe import Recipe

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**12),
    st.floats(allow_subnormal=False),
    st.text(max_size=8),
    st.sampled_from(["", "0", "-1", "1e-3", "ecl", "first", "true", "null", "inf", "~", "@x", "${HOME}", "/", "\x00"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)
KEYS = sorted([*flatten(asdict(Recipe())), "data", "train", "nonsense", "data.nonsense", "data.path.deep", ""])


def read_recipe(content: bytes) -> Recipe | None:
    """The recipe in a file; None for a ValueError in one piece."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(content)
        said = None
        try:
            recipe = Recipe.from_file(file)
        except ValueError as error:
            said = str(error)
        if said:
            return None
        file.write_text(yaml.safe_dump(asdict(recipe)))
        assert Recipe.from_file(file) == recipe
        return recipe


@few
@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
def test_recipes(changes):
    tree = {}
    for key, value in changes.items():
        *sections, name = key.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {}) if isinstance(at.get(section, {}), dict) else {}
        at[name] = value
    if recipe := read_recipe(yaml.safe_dump(tree).encode()):
        flat, unset = flatten(asdict(recipe)), flatten(asdict(Recipe()))
        assert {key for key in flat if flat[key] != unset[key]} <= flatten(tree).keys()
        for key in flatten(tree).keys() & flat.keys():
            assert str(flat[key]) == str(flatten(tree)[key]) or float(flat[key]) == float(flatten(tree)[key])


@few
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_recipe_files(content):
    read_recipe(content)


def columns() -> st.SearchStrategy[list]:
    kinds = [
        st.integers(0, 3),
        st.integers(-2, 5),
        st.integers(2**31 - 2, 2**63 - 1),
        st.booleans(),
        st.floats(0, 3),
        st.sampled_from([0.0, 1.0, 2.0]),
        st.sampled_from(["a", "b", "", " a", "A", "train", "ü"]),
        st.none(),
        st.lists(st.integers(0, 2), max_size=2),
        st.dictionaries(st.just("id"), st.integers(0, 2)),
    ]
    return st.one_of([st.lists(kind, min_size=1, max_size=8) for kind in [*kinds, *(k | st.none() for k in kinds[:7])]])


@pytest.fixture(scope="module")
def png():
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, "png")
    return file.getvalue()


@settings(few, max_examples=30)
@given(column=columns())
def test_label_columns(column, png):
    pictures = {"image": [{"bytes": png, "path": None}] * len(column), "label": column}
    try:
        split = datasets.Dataset.from_dict(pictures).cast_column("image", datasets.Image())
    except (OverflowError, TypeError, ValueError):
        return  # no column at all
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few images
        datasets.DatasetDict(train=split, test=split).save_to_disk(folder)
        said = None
        try:
            data = load_longtailed(DataConfig(path=folder, label_column="label", profile="as_is"))
        except ValueError as error:
            said = str(error)
        if said is not None:
            assert "label" in said or "class" in said
            return
        labels = data.train["label"][:]
        assert list(data.test["label"][:]) == list(labels)
    assert len(labels) == len(column)
    assert np.bincount(labels, minlength=len(data.class_names)).tolist() == data.class_counts
    assert min(data.class_counts) >= 1
    # One class for each value, and none for two
    assert len(set(zip(labels, map(repr, column), strict=True))) == len(set(labels)) == len(set(map(repr, column)))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bytes changed, cut off or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    data = data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data
    return bytes(data + draw(st.binary(max_size=8)))


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@settings(few, max_examples=200)
@given(st.sampled_from(["png", "jpeg", "gif", "webp", "bmp", "tiff"]).map(encoded).flatmap(damaged))
def test_pictures(content):
    said = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        try:
            image = decode({"bytes": content, "path": None}, "train row 7")
        except BrokenPictureError as error:
            said = str(error)
    if said is not None:
        assert said.startswith("train row 7: ")
        assert "\n" not in said
        return
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed") / "step_00000012"
    folder.mkdir()
    for name, content in {"model.safetensors": b"weights" * 9, "progress.json": b"{}", "empty": b""}.items():
        (folder / name).write_bytes(content)
    seal(folder)
    return folder


@settings(few, max_examples=150)
@given(data=st.data())
def test_checkpoints(data, checkpoint):
    with tempfile.TemporaryDirectory() as parent:
        folder = shutil.copytree(checkpoint, Path(parent) / "copy")
        assert find_defect(folder) is None
        name = data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir())))
        before = (folder / name).read_bytes()
        match data.draw(st.sampled_from(["change", "delete", "directory", "add"])):
            case "change":
                (folder / name).write_bytes(data.draw(damaged(before or b"x")))
            case "delete":
                (folder / name).unlink()
            case "directory":
                (folder / name).unlink()
                (folder / name).mkdir()
            case "add":
                (folder / "more").write_bytes(b"more")
        defect = find_defect(folder)
        if (folder / name).is_file() and (folder / name).read_bytes() == before and not (folder / "more").exists():
            assert defect is None
        elif name != CHECKSUMS or defect is not None:  # some changes of the list mean the same
            assert isinstance(defect, str)
            assert "\n" not in defect


@few
@given(st.lists(st.one_of(values.map(lambda value: json.dumps(value, default=str)), st.text(max_size=9)), max_size=3))
def test_checksum_lists(lines):
    with tempfile.TemporaryDirectory() as parent:
        (Path(parent) / "file").write_text("content")
        (Path(parent) / CHECKSUMS).write_text("\n".join(lines), errors="replace")
        assert find_defect(Path(parent)) is not None
