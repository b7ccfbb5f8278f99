"""Published lists in their official layouts, built small; the pictures in them are never opened."""

import dataclasses
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.official import BENCHMARKS, load_official
from ecl_hf.runs.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
SYNSETS = ["n01440764", "n02012849", "n03126707"]  # tench and two kinds of crane
TRAIN_COUNTS, TEST_COUNT = [4, 3, 1], 2
PUBLISHED = dict(BENCHMARKS)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """The benchmarks with three classes, and a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, benchmark in BENCHMARKS.items():
        replaced = dataclasses.replace(benchmark, train_counts=TRAIN_COUNTS, test_count=TEST_COUNT)
        monkeypatch.setitem(BENCHMARKS, name, replaced)


def write_lists(root, names, train, test):
    for name, entries in zip(names, (train, test), strict=True):
        (root / name).write_text("".join(f"{path} {label}\n" for path, label in entries))


def touch(root, entries):
    for path, _ in entries:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"not opened")


def imagenet_entries():
    train = [
        (f"train/{SYNSETS[c]}/{SYNSETS[c]}_{10 * c + i}.JPEG", c) for c in range(3) for i in range(TRAIN_COUNTS[c])
    ]
    test = [(f"val/{SYNSETS[c]}/ILSVRC2012_val_{2 * c + i:08d}.JPEG", c) for i in range(2) for c in range(3)]
    return train, test


def imagenet_lt(root):
    train, test = imagenet_entries()
    touch(root, train + test)
    write_lists(root, ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"), train, test)
    return train, test, ["tench", "crane (1)", "crane (2)"]


def places_lt(root):
    scenes = ["airfield", "airplane_cabin", "zen_garden"]
    train = [(f"train/{scenes[c]}/0000{i}.jpg", c) for c in range(3) for i in range(TRAIN_COUNTS[c])]
    test = [(f"test/{scenes[c]}/0000{i}.jpg", c) for c in range(3) for i in range(2)]
    touch(root, train + test)
    (root / "lists").mkdir()
    write_lists(root / "lists", ("Places_LT_train.txt", "Places_LT_test.txt"), train, test)
    return train, test, scenes


def inaturalist2018(root):
    categories = [{"id": 30, "name": "Zea mays"}, {"id": 7, "name": "Apis mellifera"}, {"id": 12, "name": "Größe"}]
    names = ["Apis mellifera", "Größe", "Zea mays"]
    ids = [7, 12, 30]
    found = []
    for name, counts in (("train2018.json", TRAIN_COUNTS), ("val2018.json", [2] * 3)):
        entries = [(f"train_val2018/Aves/{ids[c]}/{name[:3]}{i}.jpg", c) for c in range(3) for i in range(counts[c])]
        touch(root, entries)
        images = [{"id": 100 + i, "file_name": path} for i, (path, _) in enumerate(entries)]
        annotations = [{"image_id": 100 + i, "category_id": ids[c]} for i, (_, c) in enumerate(entries)]
        content = {"images": images, "annotations": annotations[::-1], "categories": categories}
        (root / name).write_text(json.dumps(content))
        found.append(entries)
    return *found, names


LAYOUTS = {"imagenet_lt": imagenet_lt, "places_lt": places_lt, "inaturalist2018": inaturalist2018}


def entries_of(split, root):
    paths = [row["path"] for row in split.cast_column("image", datasets.Image(decode=False))["image"]]
    return list(zip([Path(path).relative_to(root).as_posix() for path in paths], split["label"], strict=True))


@pytest.mark.parametrize("recipe", ["imagenet_lt_resnet50", "imagenet_lt_resnext50", "inaturalist2018", "places_lt"])
def test_recipe_reads_the_official_layout(recipe, tmp_path):
    config = Recipe.from_file(RECIPES / f"{recipe}.yaml").data
    root = tmp_path / "pictures of mine"
    root.mkdir()
    train, test, names = LAYOUTS[config.source](root)
    data = load_longtailed(dataclasses.replace(config, path=str(root)))
    assert data.class_names == names
    assert data.class_counts == TRAIN_COUNTS
    assert entries_of(data.train, root) == train
    assert entries_of(data.test, root) == test


def test_validation_pictures_in_one_folder(tmp_path):
    _, test, _ = imagenet_lt(tmp_path)
    for path, _ in test:
        (tmp_path / path).rename(tmp_path / "val" / Path(path).name)
    data = load_longtailed(config(tmp_path))
    assert entries_of(data.test, tmp_path) == [(f"val/{Path(path).name}", label) for path, label in test]


def config(root, source="imagenet_lt", **options):
    return DataConfig(**{"source": source, "path": str(root), "profile": "as_is"} | options)


def write_parquet(root, stored_name):
    """`ILSVRC/imagenet-1k`: more pictures than the lists have, in another order, and an unlabelled test split."""
    train, test = imagenet_entries()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z", "w"])})
    more = [(f"train/n09999999/n09999999_{i}.JPEG", 3) for i in range(5)]
    root.mkdir()
    for split, entries in (("train", more + train), ("validation", test), ("test", more)):
        order = np.random.RandomState(3).permutation(len(entries))
        images = [{"bytes": entries[i][0].encode(), "path": stored_name(entries[i][0])} for i in order]
        rows = datasets.Dataset.from_dict({"image": images, "label": [entries[i][1] for i in order]}, features)
        rows.to_parquet(root / f"{split}-00000-of-00001.parquet")
    write_lists(root.parent, ("train.txt", "test.txt"), train, test)
    lists = {"train_list": str(root.parent / "train.txt"), "test_list": str(root.parent / "test.txt")}
    return train, test, {"test_split": "validation", **lists}


@pytest.mark.parametrize(
    "stored_name",
    [
        lambda path: Path(path).name,
        lambda path: f"{Path(path).stem}_{Path(path).parent.name}.JPEG",  # as in ILSVRC/imagenet-1k
        lambda path: f"some/folder/{Path(path).stem}_{Path(path).parent.name}.JPEG",
    ],
)
def test_stored_pictures_are_found_by_name(stored_name, tmp_path):
    train, test, options = write_parquet(tmp_path / "imagenet-1k", stored_name)
    data = load_longtailed(config(tmp_path / "imagenet-1k", **options))
    for split, entries in ((data.train, train), (data.test, test)):
        stored = split.cast_column("image", datasets.Image(decode=False))["image"]
        assert [(row["bytes"].decode(), label) for row, label in zip(stored, split["label"], strict=True)] == entries
    assert data.class_names == ["tench", "crane (1)", "crane (2)"]


def test_lost_file_names_are_said_with_a_way_out(tmp_path):
    _, _, options = write_parquet(tmp_path / "imagenet-1k", lambda path: None)  # noqa: ARG005
    with pytest.raises(ValueError, match=r"8 of 8 pictures.*did not survive.*data\.profile pareto"):
        load_longtailed(config(tmp_path / "imagenet-1k", **options))


def test_pictures_of_the_hub(hub, tmp_path, monkeypatch):
    train, test, options = write_parquet(tmp_path / "imagenet-1k", lambda path: Path(path).name)
    datasets.load_dataset(str(tmp_path / "imagenet-1k")).push_to_hub("owner/imagenet")
    benchmark = dataclasses.replace(BENCHMARKS["imagenet_lt"], hub="owner/imagenet")
    monkeypatch.setitem(BENCHMARKS, "imagenet_lt", benchmark)
    data = load_longtailed(config(None, **options | {"path": None}))
    for split, entries in ((data.train, train), (data.test, test)):
        stored = split.cast_column("image", datasets.Image(decode=False))["image"]
        assert [(row["bytes"].decode(), label) for row, label in zip(stored, split["label"], strict=True)] == entries
    assert hub.requests("GET", "imagenet")


def drop_line(root):
    file = root / "ImageNet_LT_train.txt"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "n02012849_11" not in line))


def relabel(root):
    file = root / "ImageNet_LT_test.txt"
    file.write_text(file.read_text().replace("00000000.JPEG 0", "00000000.JPEG 5"))


def damage_line(root):
    file = root / "ImageNet_LT_train.txt"
    file.write_text(file.read_text().replace("n02012849_11.JPEG 1", "n02012849_11.JPEG one"))


def absurd(label):
    def harm(root):
        with (root / "ImageNet_LT_train.txt").open("a") as file:
            file.write(f"train/n02012849/n02012849_11.JPEG {label}\n")

    return harm


def cut(root):
    file = root / "ImageNet_LT_train.txt"
    file.write_text(file.read_text()[:-2])


def no_text(root):
    (root / "ImageNet_LT_test.txt").write_bytes(b"\xff\xfe\x00")


def empty(root):
    (root / "ImageNet_LT_test.txt").write_text("\n")


def remove_pictures(root):
    (root / "train" / SYNSETS[1] / f"{SYNSETS[1]}_12.JPEG").unlink()
    for file in (root / "train" / SYNSETS[0]).iterdir():
        file.unlink()


def remove_list(root):
    (root / "ImageNet_LT_test.txt").unlink()


def two_lists(root):
    (root / "old").mkdir()
    (root / "old" / "ImageNet_LT_test.txt").write_text("")


@pytest.mark.parametrize(
    ("harm", "error", "said"),
    [
        (drop_line, ValueError, ["ImageNet_LT_train.txt", "class 1 (crane (1)) has 2", "but 3", "7 of 8 pictures"]),
        (relabel, ValueError, ["ImageNet_LT_test.txt", "class 0 (tench) has 1", "but 2", "2 such classes"]),
        (damage_line, ValueError, ["ImageNet_LT_train.txt, line 6", "'train/n02012849/n02012849_11.JPEG one'"]),
        (absurd(300_000_000), ValueError, ["ImageNet_LT_train.txt, line 9", "up to 6 digits", "11.JPEG 300000000"]),
        (absurd(2**63), ValueError, ["ImageNet_LT_train.txt, line 9", "up to 6 digits"]),
        (absurd("9" * 5000), ValueError, ["ImageNet_LT_train.txt, line 9", "up to 6 digits"]),
        (absurd(999_999), ValueError, ["ImageNet_LT_train.txt: class 999999 has 1 pictures, but 0", "1 such"]),
        (cut, ValueError, ["ImageNet_LT_train.txt, line 8"]),
        (no_text, ValueError, ["ImageNet_LT_test.txt", "no text file"]),
        (empty, ValueError, ["ImageNet_LT_test.txt", "no pictures"]),
        (remove_pictures, FileNotFoundError, ["5 of 8 pictures", "ImageNet_LT_train.txt", "n01440764_0.JPEG"]),
        (remove_list, FileNotFoundError, ["data.test_list", "ImageNet_LT_test.txt", "none"]),
        (two_lists, FileNotFoundError, ["data.test_list", "old/ImageNet_LT_test.txt"]),
    ],
)
def test_what_is_wrong_with_lists_and_pictures(harm, error, said, tmp_path):
    imagenet_lt(tmp_path)
    harm(tmp_path)
    every_part = "".join(f"(?=.*{re.escape(part)})" for part in said)
    with pytest.raises(error, match=every_part):
        load_longtailed(config(tmp_path))


def edit(root, change, file="train2018.json"):
    content = json.loads((root / file).read_text())
    change(content)
    (root / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["annotations"].pop(), r"train2018\.json.*lacks or does not know"),
        (lambda c: c["annotations"].append(c["annotations"][0]), r"train2018\.json has 9 annotations for 8 images"),
        (lambda c: c["categories"].pop(0), r"train2018\.json.*lacks or does not know 30"),
        (lambda c: c["images"][0].update(file_name=7), r"train2018\.json.*lacks or does not know a file_name of text"),
        (lambda c: c.pop("images"), r"train2018\.json.*'images'"),
        (lambda c: c["annotations"][0].update(category_id=7), r"class 0 \(Apis mellifera\) has 5 pictures, but 4"),
        (lambda c: c["categories"][0].update(name="Zea"), r"val2018\.json has other categories than .*train2018\.json"),
    ],
)
def test_what_is_wrong_with_json(change, said, tmp_path):
    inaturalist2018(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=said):
        load_longtailed(config(tmp_path, "inaturalist2018"))


def test_damaged_json(tmp_path):
    inaturalist2018(tmp_path)
    text = (tmp_path / "train2018.json").read_text()
    (tmp_path / "train2018.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"train2018\.json is damaged"):
        load_longtailed(config(tmp_path, "inaturalist2018"))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"profile": "exponential"}, ValueError, r"data\.profile as_is"),
        ({"test_fraction": 0.2}, ValueError, r"data\.test_fraction"),
        ({"path": None}, FileNotFoundError, r"data\.train_list: name the published list, ImageNet_LT_train\.txt"),
        ({"path": None, "source": "places_lt"}, ValueError, r"places_lt needs data\.path"),
        ({"train_list": "no/such.txt"}, FileNotFoundError, r"data\.train_list no/such\.txt is not a file"),
    ],
)
def test_what_a_benchmark_needs(options, error, said, tmp_path):
    imagenet_lt(tmp_path)
    with pytest.raises(error, match=said):
        load_longtailed(config(tmp_path, **options))


@pytest.mark.parametrize(
    ("source", "num_classes", "total", "largest", "smallest", "tested"),
    [
        ("imagenet_lt", 1000, 115_846, 1280, 5, 50_000),
        ("places_lt", 365, 62_500, 4980, 5, 36_500),
        ("inaturalist2018", 8142, 437_513, 1000, 2, 24_426),
    ],
)
def test_published_numbers(source, num_classes, total, largest, smallest, tested):
    benchmark = PUBLISHED[source]
    counts = benchmark.train_counts
    assert (len(counts), sum(counts), max(counts), min(counts)) == (num_classes, total, largest, smallest)
    assert benchmark.test_count * num_classes == tested


def test_scene_names_of_both_editions_of_the_lists():
    for path in ("train/airfield/0.jpg", "data_256/a/airfield/0.jpg"):
        assert BENCHMARKS["places_lt"].class_name(path) == "airfield"
    path = "data_256/a/apartment_building/outdoor/0.jpg"
    assert BENCHMARKS["places_lt"].class_name(path) == "apartment_building/outdoor"


def test_own_benchmark(tmp_path):
    """The numbers are those of the benchmark object, so that other published lists can be read the same way."""
    mine = dataclasses.replace(BENCHMARKS["imagenet_lt"], name="mine", train_counts=[2], test_count=1)
    entries = [("a/x.jpg", 0), ("a/y with space.jpg", 0)], [("b/z.jpg", 0)]
    touch(tmp_path, entries[0] + entries[1])
    write_lists(tmp_path, ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"), *entries)
    source = load_official(mine, config(tmp_path))
    assert (source.name, source.class_names, source.published) == ("mine", ["a"], True)
    assert entries_of(source.train, tmp_path) == entries[0]
