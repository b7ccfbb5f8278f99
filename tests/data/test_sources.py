"""Pictures as users have them: class folders, tables of file names, parquet files of every habit."""

import gc
import hashlib
import json
import re
import warnings

import datasets
import numpy as np
import pytest
from PIL import Image

from ecl_hf.data import official
from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtail import longtail_indices
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.sources import labels_of


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(value):
    """A picture that tells which one it is."""
    return Image.fromarray(np.full((4, 4, 3), value, np.uint8))


def values(split):
    return [image.getpixel((0, 0))[0] for image in split.cast_column("image", datasets.Image())["image"]]


def class_folders(root, counts, first=0, suffix=".png"):
    """Pictures numbered in the order of the sorted names."""
    for name, count in sorted(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(first + i).save(root / name / f"{i:02d}{suffix}")
        first += count
    return root


def as_is(path, **options):
    return DataConfig(**{"path": str(path), "profile": "as_is"} | options)


def test_folder_without_splits(tmp_path):
    counts = {"Grüner Specht": 9, "train": 6, "two words": 21, "日本": 7}
    class_folders(tmp_path / "data", counts)
    data = load_longtailed(as_is(tmp_path / "data", test_fraction=0.2))
    assert data.class_names == sorted(counts)
    held_out = [2, 1, 4, 1]  # 1.8, 1.2, 4.2, 1.4
    assert data.class_counts == [7, 5, 17, 6]
    assert np.bincount(data.test["label"]).tolist() == held_out
    assert sorted(values(data.train) + values(data.test)) == list(range(43))
    labels = np.repeat(np.arange(4), [9, 6, 21, 7])
    assert values(data.train) == sorted(longtail_indices(labels, data.class_counts).tolist())
    assert list(data.train["label"]) == labels[values(data.train)].tolist()


def test_held_out_pictures_depend_on_the_seed(tmp_path):
    class_folders(tmp_path / "data", {"ant": 12, "bee": 10})

    def tested(seed):
        return values(load_longtailed(as_is(tmp_path / "data", test_fraction=0.25, split_seed=seed)).test)

    assert tested(0) == tested(0) != tested(1)
    assert tested("first") == [9, 10, 11, 20, 21]  # the first ones are trained on


def test_held_out_pictures_and_a_profile(tmp_path):
    class_folders(tmp_path / "data", {"ant": 30, "bee": 20})
    data = load_longtailed(DataConfig(path=str(tmp_path / "data"), test_fraction=0.1, imbalance_factor=6))
    assert data.class_counts == [18, 3]
    assert len(data.test) == 5
    assert not set(values(data.train)) & set(values(data.test))


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("training", "val")])
def test_folder_with_splits(train, test, tmp_path):
    class_folders(tmp_path / "data" / train, {"bee": 6, "train": 7, "ant": 6})
    class_folders(tmp_path / "data" / test, {"ant": 1, "train": 2, "bee": 3}, first=100)
    data = load_longtailed(as_is(tmp_path / "data", train_split=train, test_split=test))
    assert data.class_names == ["ant", "bee", "train"]
    assert data.class_counts == [6, 6, 7]
    assert values(data.train) == list(range(19))
    assert values(data.test) == list(range(100, 106))
    with pytest.warns(UserWarning, match=rf"data/{test} is not used: data\.test_fraction cuts .*test_fraction null"):
        held_out = load_longtailed(as_is(tmp_path / "data", train_split=train, test_split=test, test_fraction=0.2))
    assert sorted(values(held_out.train) + values(held_out.test)) == list(range(19))


def test_what_lies_around_in_folders(tmp_path):
    root = class_folders(tmp_path / "data", {"ant": 6, "bee": 7})
    (root / "ant" / "deep" / "er").mkdir(parents=True)
    (root / "ant" / "05.png").rename(root / "ant" / "deep" / "er" / "05.png")
    for hidden in (".git", ".ipynb_checkpoints"):
        class_folders(root / hidden, {"x": 1})
        class_folders(root / "ant" / hidden, {"x": 1})
    (root / "ant" / "._01.png").write_bytes(b"left by another system")
    (root / "README").write_text("mine")
    data = load_longtailed(as_is(root, test_fraction=0.1))
    assert data.class_names == ["ant", "bee"]
    assert sorted(values(data.train) + values(data.test)) == list(range(13))
    (root / "bee" / "notes.txt").write_text("mine")
    (root / "bee" / "photo.heic").write_bytes(b"no picture that can be read")
    with pytest.warns(UserWarning, match=r"2 files are no pictures by their suffix: \.txt \(1\), \.heic \(1\)"):
        load_longtailed(as_is(root, test_fraction=0.1))


@pytest.mark.parametrize(
    ("folders", "options", "error", "said"),
    [
        (
            {"train/ant": 6, "test/ant": 1, "test/bee": 1},
            {},
            ValueError,
            "no training image of 1 classes: bee; fill or remove",
        ),
        (
            {"train/ant": 6, "train/bee": 0, "test/ant": 1},
            {},
            ValueError,
            "no training image of 1 classes: bee; fill or remove",
        ),
        (
            {"ant": 6, "bee": 0},
            {"test_fraction": 0.2},
            ValueError,
            "no training image of 1 classes: bee; fill or remove",
        ),
        ({"train/ant": 6}, {}, ValueError, r"no split 'test' \(data\.test_split\); it has train; data\.test_fraction"),
        (
            {"ant": 6, "bee": 6},
            {},
            ValueError,
            r"no split 'test' \(data\.test_split\); it has train; data\.test_fraction",
        ),
        ({"ant": 0}, {"test_fraction": 0.2}, FileNotFoundError, "can't load the data set"),
        ({"images": 6}, {"test_fraction": 0.2}, ValueError, r"one class folder, 'images': .* metadata\.csv"),
    ],
)
def test_folders_that_lack_something(folders, options, error, said, tmp_path):
    class_folders(tmp_path / "data", folders)
    with pytest.raises(error, match=said):
        load_longtailed(as_is(tmp_path / "data", **options))


@pytest.mark.parametrize(
    ("folders", "options", "said"),
    [
        ({"train/ant": 6, "train/bee": 6, "test/ant": 1}, {}, "no test image of 1 classes: bee$"),
        ({"train/ant": 6, "train/bee": 4, "test/ant": 1, "test/bee": 1}, {}, r"fewer than 5 .* 1 classes: bee \(4\)$"),
        ({"ant": 9, "bee": 1}, {"test_fraction": 0.2}, "no test image of 1 classes: bee$"),
    ],
)
def test_small_classes_are_named(folders, options, said, tmp_path):
    class_folders(tmp_path / "data", folders)
    with pytest.warns(UserWarning, match="of 1 classes") as seen:
        load_longtailed(as_is(tmp_path / "data", **options))
    assert [re.search(said, str(warning.message)) for warning in seen].count(None) == len(seen) - 1


def test_single_picture_of_a_class_is_trained_on(tmp_path):
    class_folders(tmp_path / "data", {"ant": 9, "bee": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load_longtailed(as_is(tmp_path / "data", test_fraction=0.3))
    assert data.class_counts == [6, 1]
    assert np.bincount(data.test["label"], minlength=2).tolist() == [3, 0]


def table_csv(folder, rows):
    lines = ["file_name,label,place", *(f"{file},{label},here" for file, label in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")


def table_jsonl(folder, rows):
    lines = [json.dumps({"file_name": file, "label": label, "place": "here"}) for file, label in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves the table open
@pytest.mark.parametrize("table", [table_csv, table_jsonl])
def test_tables_of_file_names(table, tmp_path):
    names = ["zebra", "Grüner Specht", "ant hill"]
    kinds = [1, 0, 2, 2, 1, 0] * 5
    for split, first, labels in (("train", 0, kinds), ("test", 100, kinds[:6])):
        (tmp_path / "data" / split / "pictures").mkdir(parents=True)
        rows = [(f"pictures/{i:02d}.png", names[label]) for i, label in enumerate(labels)]
        for i, (file, _) in enumerate(rows):
            picture(first + i).save(tmp_path / "data" / split / file)
        table(tmp_path / "data" / split, rows)
    data = load_longtailed(as_is(tmp_path / "data"))
    assert data.class_names == ["Grüner Specht", "ant hill", "zebra"]
    assert values(data.train) == list(range(30))
    assert [data.class_names[label] for label in data.train["label"]] == [names[label] for label in kinds]
    assert [data.class_names[label] for label in data.test["label"]] == [names[label] for label in kinds[:6]]
    gc.collect()


def parquet(folder, name, labels, label, first=0):
    folder.mkdir(exist_ok=True)
    columns = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [picture(first + i) for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(rows, columns).to_parquet(folder / f"{name}.parquet")


def test_strings_are_classes(tmp_path):
    labels = ["wasp", "ant", "bee", "ant", "wasp", "bee"] * 5
    parquet(tmp_path / "data", "train-0", labels, datasets.Value("string"))
    parquet(tmp_path / "data", "test-0", ["bee", "ant", "wasp"], datasets.Value("string"), 100)
    data = load_longtailed(as_is(tmp_path / "data"))
    assert data.class_names == ["ant", "bee", "wasp"]
    assert data.train.features["label"].names == data.class_names
    assert [data.class_names[label] for label in data.train["label"]] == labels
    assert list(data.test["label"]) == [1, 0, 2]
    again = load_longtailed(as_is(tmp_path / "data", test_fraction=0.2))
    assert sorted(values(again.train) + values(again.test)) == list(range(30))


@pytest.mark.parametrize("missing", [None, ""])
def test_row_without_a_class_is_shown(missing, tmp_path):
    parquet(tmp_path / "data", "train-0", ["ant", "bee", missing] * 5, datasets.Value("string"))
    parquet(tmp_path / "data", "test-0", ["bee", "ant"], datasets.Value("string"))
    with pytest.raises(ValueError, match=rf"split train, column label: row 2 has label {missing}, .*\(5 such rows\)"):
        load_longtailed(as_is(tmp_path / "data"))


def class_label(*names):
    return datasets.ClassLabel(names=list(names))


def test_splits_that_number_the_classes_differently(tmp_path):
    """`datasets` itself would give the second file the names of the first, number by number."""
    names = ["bee", "wasp", "ant"]
    parquet(tmp_path / "data", "train-0", names * 6, class_label("ant", "bee", "wasp"))
    parquet(tmp_path / "data", "test-0", names, class_label("wasp", "ant", "bee"), 100)
    silently = datasets.load_dataset(str(tmp_path / "data"))["test"]
    assert [silently.features["label"].int2str(label) for label in silently["label"]] != names
    data = load_longtailed(as_is(tmp_path / "data"))
    assert data.class_names == ["ant", "bee", "wasp"]
    for split in (data.train, data.test):
        assert [data.class_names[label] for label in split["label"]] == names * (len(split) // 3)


def test_saved_splits_that_number_the_classes_differently(tmp_path):
    names = ["bee", "wasp", "ant"]
    splits = {}
    for split, order, n in (("train", sorted(names), 6), ("test", ["wasp", "ant", "bee"], 1)):
        columns = datasets.Features({"image": datasets.Image(), "label": class_label(*order)})
        rows = [{"image": picture(i), "label": order.index(name)} for i, name in enumerate(names * n)]
        splits[split] = datasets.Dataset.from_list(rows, columns)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = load_longtailed(as_is(tmp_path / "saved"))
    for split in (data.train, data.test):
        assert [data.class_names[label] for label in split["label"]] == names * (len(split) // 3)


def test_pictures_beside_the_class_folders_are_counted(tmp_path):
    class_folders(tmp_path, {"ant": 6, "bee": 6})
    for name in ("x.png", "y.JPG", ".hidden.png"):
        picture(1).save(tmp_path / name)
    with pytest.warns(UserWarning, match=rf"^{re.escape(str(tmp_path))}: 2 pictures lie in no class folder"):
        assert load_longtailed(as_is(tmp_path, test_fraction=0.2)).class_counts == [5, 5]


def test_split_folders_are_not_taken_for_classes(tmp_path):
    for split in ("training", "validation"):
        class_folders(tmp_path / split, {"ant": 6, "bee": 6})
    with pytest.raises(ValueError, match=r"no split 'train' \(data.train_split\); it has training, validation"):
        load_longtailed(as_is(tmp_path, test_fraction=0.2))
    assert load_longtailed(as_is(tmp_path, train_split="training", test_fraction=0.2)).class_names == ["ant", "bee"]


def test_test_split_that_knows_fewer_classes(tmp_path):
    parquet(tmp_path / "data", "train-0", ["ant", "bee", "wasp"] * 6, class_label("ant", "bee", "wasp"))
    parquet(tmp_path / "data", "test-0", ["wasp", "bee"], class_label("bee", "wasp"))
    with pytest.warns(UserWarning, match="no test image of 1 classes: ant"):
        data = load_longtailed(as_is(tmp_path / "data"))
    assert [data.class_names[label] for label in data.test["label"]] == ["wasp", "bee"]


def test_classes_of_the_test_split_alone(tmp_path):
    parquet(tmp_path / "data", "train-0", ["ant", "bee"] * 6, class_label("ant", "bee"))
    parquet(tmp_path / "data", "test-0", ["ant", "fly", "wasp"], class_label("ant", "fly", "wasp"))
    with pytest.raises(
        ValueError, match="split test, column label: 2 classes are none of the training split: fly, wasp"
    ):
        load_longtailed(as_is(tmp_path / "data"))


def test_files_of_one_split_that_disagree(tmp_path):
    parquet(tmp_path / "data", "train-00000-of-00002", ["ant", "bee"] * 6, class_label("ant", "bee"))
    parquet(tmp_path / "data", "train-00001-of-00002", ["ant", "bee"] * 6, class_label("bee", "ant"))
    parquet(tmp_path / "data", "test-00000-of-00001", ["ant", "bee"], class_label("ant", "bee"))
    with pytest.raises(ValueError, match=r"files of split train number the classes differently.*00001-of"):
        load_longtailed(as_is(tmp_path / "data"))


def test_data_set_saved_to_disk(tmp_path):
    columns = datasets.Features({"photo": datasets.Image(), "kind": class_label("ant", "bee")})
    rows = {"photo": [picture(i) for i in range(12)], "kind": [0, 1] * 6}
    full = datasets.Dataset.from_dict(rows, columns)
    datasets.DatasetDict({"train": full.select(range(11, 1, -1)), "test": full.select([0, 1])}).save_to_disk(
        tmp_path / "data"
    )
    data = load_longtailed(as_is(tmp_path / "data"))
    assert values(data.train) == list(range(11, 1, -1))
    assert list(data.train["label"]) == [1, 0] * 5
    full.save_to_disk(tmp_path / "single")
    assert load_longtailed(as_is(tmp_path / "single", test_fraction=0.16)).class_counts == [5, 5]


def test_first_images_in_source_order(tmp_path):
    class_folders(tmp_path / "data" / "train", {"ant": 9, "bee": 9})
    class_folders(tmp_path / "data" / "test", {"ant": 1, "bee": 1})
    data = load_longtailed(DataConfig(path=str(tmp_path / "data"), split_seed="first", imbalance_factor=3))
    assert values(data.train) == [*range(9), 9, 10, 11]


def test_incomplete_cifar_is_not_cut_in_silence(tmp_path, monkeypatch):
    digest = hashlib.sha256(b"ant\nbee").hexdigest()
    monkeypatch.setattr(official, "CIFAR", {digest: ("BUGS-2", 9, 2)})
    class_folders(tmp_path / "data" / "train", {"ant": 9, "bee": 8})
    class_folders(tmp_path / "data" / "test", {"ant": 2, "bee": 2})
    path = str(tmp_path / "data")
    with pytest.raises(ValueError, match=r"class bee has 8 training images, but 9 in BUGS-2 .* set data\.max_count"):
        load_longtailed(DataConfig(path=path, imbalance_factor=3))
    assert load_longtailed(DataConfig(path=path, imbalance_factor=4, max_count=8)).class_counts == [8, 2]
    assert load_longtailed(as_is(path)).class_counts == [9, 8]
    picture(1).save(tmp_path / "data" / "train" / "bee" / "more.png")
    assert load_longtailed(DataConfig(path=path, imbalance_factor=3)).class_counts == [9, 3]
    (tmp_path / "data" / "test" / "ant" / "00.png").unlink()
    with pytest.raises(ValueError, match="class ant has 1 test images, but 2 in BUGS-2"):
        load_longtailed(DataConfig(path=path, imbalance_factor=3))


def test_labels_are_read_without_pictures(tmp_path):
    root = class_folders(tmp_path / "data", {"ant": 6, "bee": 6})
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    data = load_longtailed(as_is(root, test_fraction=0.2))
    assert labels_of(data.train).tolist() == [0] * 5 + [1] * 5


@pytest.mark.usefixtures("hub")
def test_subset_of_a_repository():
    columns = datasets.Features({"image": datasets.Image(), "label": class_label("ant", "bee")})
    for subset, count in (("large", 20), ("small", 12)):
        rows = {"image": [picture(i) for i in range(count)], "label": [0, 1] * (count // 2)}
        full = datasets.Dataset.from_dict(rows, columns)
        datasets.DatasetDict({"train": full, "test": full.select([0, 1])}).push_to_hub("owner/bugs", subset)
    with pytest.raises(ValueError, match=r"(?s)owner/bugs: .*'large', 'small'.*; set data\.subset"):
        load_longtailed(DataConfig(source="owner/bugs", profile="as_is"))
    data = load_longtailed(DataConfig(source="owner/bugs", subset="small", profile="as_is"))
    assert data.class_counts == [6, 6]
    with pytest.raises(ValueError, match="'tiny'"):
        load_longtailed(DataConfig(source="owner/bugs", subset="tiny", profile="as_is"))
