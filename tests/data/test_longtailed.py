"""Long-tailed splits of small data sets in every supported layout, and what the loaders make of them."""

import json
import random
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ecl_hf.data.config import DataConfig
from ecl_hf.data.loaders import EpochSampler, ViewDataset, collate, evaluation_loader, train_loader
from ecl_hf.data.longtail import longtail_indices
from ecl_hf.data.longtailed import choose_rows, load_longtailed, load_source
from ecl_hf.data.pictures import to_rgb
from ecl_hf.data.splits import Split
from ecl_hf.data.views import contrastive_view, evaluation_view, supervised_view

NAMES = ["ant", "bee", "cow"]
SIZES = [12, 9, 10]
TEST_LABELS = [2, 0, 1, 1, 0, 2]
PIXELS = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "crop_pct": 1.0}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(value):
    """A picture that tells which one it is."""
    return Image.fromarray(np.full((8, 8, 3), value, np.uint8))


def numbers(split):
    return [image.getpixel((0, 0))[0] for image in split.cast_column("image", datasets.Image())["image"]]


def features(label=None, image_name="img", label_name="label", **more):
    label = datasets.ClassLabel(names=NAMES) if label is None else label
    return datasets.Features({image_name: datasets.Image(), label_name: label, **more})


def write_parquet(folder, train_labels, test_labels=TEST_LABELS, columns=None, **extra):
    """Two files as the Hub has them for CIFAR; training picture i has value i, test picture i has value 100 + i."""
    columns = columns or features()
    image_name, label_name = list(columns)[:2]
    folder.mkdir()
    for split, labels, first in (("train", train_labels, 0), ("test", test_labels, 100)):
        rows = {image_name: [picture(first + i) for i in range(len(labels))], label_name: labels}
        rows |= {name: [value] * len(labels) for name, value in extra.items()}
        datasets.Dataset.from_dict(rows, columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def overwrite_labels(file, labels):
    """Put labels into a file that `datasets` itself would refuse to write."""
    table = pq.read_table(file)
    changed = table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.int64()))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), file)


def train_labels():
    return np.random.RandomState(5).permutation(np.repeat(np.arange(3), SIZES)).tolist()


def cifar10_layout(folder):
    return write_parquet(folder, train_labels()), train_labels(), {}


def cifar100_layout(folder):
    columns = features(label_name="fine_label", coarse_label=datasets.ClassLabel(names=["insect", "mammal"]))
    path = write_parquet(folder, train_labels(), columns=columns, coarse_label=1)
    return path, train_labels(), {"label_column": "fine_label"}


def plain_integers(folder):
    columns = features(label=datasets.Value("int32"), image_name="photo", label_name="kind")
    return write_parquet(folder, train_labels(), columns=columns), train_labels(), {"label_column": "kind"}


def image_folder(folder):
    labels = sorted(train_labels())
    for split, split_labels, first in (("train", labels, 0), ("test", sorted(TEST_LABELS), 100)):
        for i, label in enumerate(split_labels):
            (folder / split / NAMES[label]).mkdir(parents=True, exist_ok=True)
            picture(first + i).save(folder / split / NAMES[label] / f"{i:03d}.png")
    return folder, labels, {}


LAYOUTS = [cifar10_layout, cifar100_layout, plain_integers, image_folder]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_images_of_the_protocol(layout, tmp_path):
    path, labels, options = layout(tmp_path / "data")
    data = load_longtailed(DataConfig(path=str(path), imbalance_factor=4, split_seed=3, **options))
    assert data.class_names == (["0", "1", "2"] if layout is plain_integers else NAMES)
    assert data.class_counts == [9, 4, 2]  # int(9 / 4^(i / 2)): the smallest of the classes has 9 images
    assert all(type(count) is int for count in data.class_counts)
    assert data.train.column_names == data.test.column_names == ["image", "label"]
    rows = sorted(longtail_indices(labels, [9, 4, 2], seed=3).tolist())
    assert numbers(data.train) == rows
    assert list(data.train["label"]) == [labels[row] for row in rows]
    assert numbers(data.test) == [100 + i for i in range(6)]
    assert list(data.test["label"]) == (sorted(TEST_LABELS) if layout is image_folder else TEST_LABELS)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"imbalance_factor": 4, "max_count": 6}, [6, 3, 1]),
        ({"imbalance_factor": 1}, [9, 9, 9]),
        # 9 * (((i + 1) / 3)^(-1/6) - 1) / (3^(1/6) - 1), and at least 9 / 4
        ({"profile": "pareto", "imbalance_factor": 4}, [9, 3, 2]),
        ({"profile": "as_is"}, SIZES),
        ({"profile": "as_is", "max_count": 5, "imbalance_factor": 1000}, SIZES),
    ],
)
def test_profiles(options, counts, tmp_path):
    path, labels, _ = cifar10_layout(tmp_path / "data")
    data = load_longtailed(DataConfig(path=str(path), **options))
    assert data.class_counts == counts
    assert np.bincount(data.train["label"][:]).tolist() == counts
    if options.get("profile") == "as_is":
        assert numbers(data.train) == list(range(len(labels)))


def test_split_seed_alone_chooses_the_images(tmp_path):
    path, _, _ = cifar10_layout(tmp_path / "data")

    def chosen(split_seed, global_seed):
        np.random.seed(global_seed)
        data = load_longtailed(DataConfig(path=str(path), imbalance_factor=4, split_seed=split_seed))
        return numbers(data.train), numbers(data.test)

    state = np.random.get_state()
    first, again, other = chosen(0, 1), chosen(0, 2), chosen(1, 1)
    np.random.set_state(state)
    assert first == again
    assert first[0] != other[0]
    assert first[1] == other[1]


def test_digits_are_split_once_and_completely():
    data = load_longtailed(DataConfig(source="digits", profile="as_is", split_seed=1))
    assert data.class_names == list("0123456789")
    assert data.class_counts == [138, 142, 137, 143, 141, 142, 141, 139, 134, 140]
    assert np.bincount(data.test["label"][:]).tolist() == [40] * 10
    source = load_digits()
    expected = sorted(
        (int(t), np.rint(i * 15.9375).astype(int).tolist()) for t, i in zip(source.target, source.images, strict=True)
    )
    found = [
        (label, np.asarray(image).astype(int).tolist())
        for split in (data.train, data.test)
        for label, image in zip(split["label"], split["image"], strict=True)
    ]
    assert sorted(found) == expected  # every digit once: no test picture is trained on
    other = load_longtailed(DataConfig(source="digits", split_seed=2, max_count=130, imbalance_factor=20))
    assert other.class_counts == [130, 93, 66, 47, 34, 24, 17, 12, 9, 6]
    assert [image.tobytes() for image in other.test["image"]] == [image.tobytes() for image in data.test["image"]]


def missing(folder):
    return folder


def a_file(folder):
    folder.write_text("no directory")
    return folder


def empty(folder):
    folder.mkdir()
    return folder


def empty_tree(folder):
    (folder / "train").mkdir(parents=True)
    return folder


def foreign(folder):
    folder.mkdir()
    (folder / "thesis.xyz").write_text("years of work")
    return folder


@pytest.mark.parametrize("place", [missing, a_file, empty, empty_tree, foreign])
def test_no_data_set_there(place, tmp_path):
    with pytest.raises(FileNotFoundError, match="place-of-data"):
        load_longtailed(DataConfig(path=str(place(tmp_path / "place-of-data"))))


def test_data_set_that_the_hub_can_not_give():
    with pytest.raises(FileNotFoundError, match="nobody/no-such-data-set"):
        load_longtailed(DataConfig(source="nobody/no-such-data-set"))


@pytest.mark.parametrize(
    ("layout", "options", "said"),
    [
        (cifar10_layout, {"train_split": "training"}, ["'training'", "data.train_split", "train, test"]),
        (cifar10_layout, {"test_split": "valid"}, ["'valid'", "data.test_split", "train, test"]),
        (cifar10_layout, {"image_column": "photo"}, ["'photo'", "data.image_column", "img, label"]),
        (cifar10_layout, {"label_column": "breed"}, ["'breed'", "data.label_column", "img, label"]),
        (cifar10_layout, {"image_column": "label"}, ["'label'", "data.image_column", "not images"]),
        (cifar10_layout, {"label_column": "img"}, ["'img'", "data.label_column", "not class labels"]),
        (cifar100_layout, {"label_column": None}, ["data.label_column", "fine_label, coarse_label"]),
        (plain_integers, {"label_column": None}, ["data.label_column", "none", "photo, kind"]),
        (cifar10_layout, {"max_count": 11}, ["bee (9 of 10)", "data.max_count"]),
        (cifar10_layout, {"max_count": 12, "imbalance_factor": 1}, ["bee (9 of 12)", "cow (10 of 12)"]),
        (cifar10_layout, {"imbalance_factor": 100}, ["imbalance_factor 100", "at most 9"]),
    ],
)
def test_what_the_user_is_told(layout, options, said, tmp_path):
    path, _, own = layout(tmp_path / "data")
    every_part = "".join(f"(?=.*{re.escape(part)})" for part in said)
    with pytest.raises(ValueError, match=every_part):
        load_longtailed(DataConfig(path=str(path), **({"imbalance_factor": 1.2} | own | options)))


@pytest.mark.parametrize(
    ("feature", "values"),
    [("float32", [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]), ("bool", [True] * 6)],
)
def test_label_column_must_hold_classes(feature, values, tmp_path):
    columns = features(label=datasets.Value(feature))
    path = write_parquet(tmp_path / "data", values, values, columns)
    with pytest.raises(ValueError, match=rf"'label' .*data.label_column.*{feature}.*not class labels"):
        load_longtailed(DataConfig(path=str(path), label_column="label"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("label", "shown"), [(-1, "-1"), (3, "3"), (None, "None")])
def test_label_outside_the_classes_is_shown_with_its_row(split, label, shown, tmp_path):
    path, _, _ = cifar10_layout(tmp_path / "data")
    file = path / f"{split}-00000-of-00001.parquet"
    labels = pq.read_table(file)["label"].to_pylist()
    labels[4] = label
    overwrite_labels(file, labels)
    with pytest.raises(ValueError, match=rf"split {split}, column label: row 4 has label {shown}, outside 0\.\.2"):
        load_longtailed(DataConfig(path=str(path), profile="as_is"))


def test_negative_plain_integer_is_shown_with_its_row(tmp_path):
    columns = features(label=datasets.Value("int64"))
    path = write_parquet(tmp_path / "data", [0, 1, 2, -1, 0, -1], columns=columns)
    with pytest.raises(ValueError, match=r"row 3 has label -1, outside 0\.\.2 \(2 such rows\)"):
        load_longtailed(DataConfig(path=str(path), label_column="label"))


@pytest.mark.parametrize("profile", ["exponential", "as_is"])
def test_class_without_training_images_is_named(profile, tmp_path):
    path = write_parquet(tmp_path / "data", [0, 2, 0, 2])
    with pytest.raises(ValueError, match=r"no training image of 1 classes: bee; fill or remove"):
        load_longtailed(DataConfig(path=str(path), profile=profile))


def pictures(count=10):
    """Colourful noise in memory; the label is the position."""
    noise = np.random.RandomState(1).randint(0, 256, (count, 12, 14, 3)).astype(np.uint8)
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": list(noise), "label": list(range(count))}, columns)


def random_views(augmentation="imagenet"):
    return {
        "pixel_values": supervised_view(PIXELS, augmentation),
        "contrast_pixel_values": contrastive_view(PIXELS),
    }


def one_draw_of_each_generator(_):
    return torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)


def global_states():
    return (
        random.getstate(),
        [np.asarray(part).tolist() for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
    )


def assert_same_items(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key]))


@pytest.mark.parametrize("augmentation", ["cifar", "imagenet"])
def test_item_depends_on_its_position_alone(augmentation):
    dataset = ViewDataset(pictures(), random_views(augmentation), seed=4)
    dataset.epoch = 2
    whole = dataset.__getitems__(list(range(10)))
    assert len(dataset) == 10
    assert [item["labels"] for item in whole] == list(range(10))
    assert_same_items(whole, [dataset[i] for i in range(10)])
    assert_same_items([whole[i] for i in (7, 3, 3, 9)], dataset.__getitems__([7, 3, 3, 9]))


def test_every_generator_is_seeded_by_seed_epoch_and_position():
    draws = {}
    for seed in (0, 1, 2):
        dataset = ViewDataset(pictures(4), {"draw": one_draw_of_each_generator}, seed)
        for epoch in (0, 1, 2):
            dataset.epoch = epoch
            for index in range(4):
                draws[seed, epoch, index] = dataset[index]["draw"].tolist()
    assert len(draws) == 36
    for generator in range(3):
        assert len({draw[generator] for draw in draws.values()}) == 36
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    again = ViewDataset(pictures(4), {"draw": one_draw_of_each_generator}, 2)
    again.epoch = 1
    assert again[3]["draw"].tolist() == draws[2, 1, 3]


def test_views_of_a_picture_are_drawn_one_after_the_other():
    view = one_draw_of_each_generator
    item = ViewDataset(pictures(2), {"a": view, "b": view})[1]
    assert not set(item["a"].tolist()) & set(item["b"].tolist())
    assert item["a"].tolist() == ViewDataset(pictures(2), {"a": view})[1]["a"].tolist()


def fails_after_drawing(image):
    one_draw_of_each_generator(image)
    raise OSError("broken picture")


def test_global_generators_are_left_alone():
    before = global_states()
    dataset = ViewDataset(pictures(), random_views())
    dataset[3]
    dataset.__getitems__([1, 2])
    assert global_states() == before
    with pytest.raises(OSError, match="broken picture"):
        ViewDataset(pictures(), {"pixel_values": fails_after_drawing})[0]
    assert global_states() == before


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 255), (77, 77, 77)),
        ("RGBA", (10, 20, 30, 51), (206, 208, 210)),  # a fifth of the colour, on white
        ("P", 1, (10, 20, 30)),
    ],
)
def test_other_pictures_come_out_in_three_channels(mode, colour, rgb):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, *rgb])
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    source = datasets.Dataset.from_dict({"image": [image], "label": [0]}, columns)
    assert source[0]["image"].mode == mode
    found = ViewDataset(source, {"pixel_values": evaluation_view(PIXELS)})[0]["pixel_values"]
    mean, std = (torch.tensor(PIXELS[key]) for key in ("mean", "std"))
    expected = (torch.tensor(rgb) / 255 - mean) / std
    assert torch.equal(found, expected[:, None, None].expand(3, 16, 16))


def orders(seed, epoch, count=50):
    dataset = ViewDataset(pictures(count), {}, seed)
    sampler = EpochSampler(dataset)
    dataset.epoch = epoch
    assert len(sampler) == count
    return list(sampler)


def test_sampler_shuffles_by_seed_and_epoch():
    seen = {(seed, epoch): orders(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(50)) for order in seen.values())
    assert len({tuple(order) for order in seen.values()}) == 9  # seed 0 in epoch 1 is not seed 1 in epoch 0
    torch.manual_seed(99)
    assert orders(2, 1) == seen[2, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_train_loader_shuffles_and_drops_the_rest(workers):
    dataset = ViewDataset(pictures(), random_views(), seed=3)
    loader = train_loader(dataset, 4, num_workers=workers)
    assert len(loader) == 2
    before = global_states()
    epochs = []
    for epoch in (0, 5):
        dataset.epoch = epoch
        batches = list(loader)
        order = list(EpochSampler(dataset))
        assert [label for batch in batches for label in batch["labels"].tolist()] == order[:8]
        for n, batch in enumerate(batches):
            items = [dataset[i] for i in order[4 * n : 4 * n + 4]]
            for name in ("pixel_values", "contrast_pixel_values"):
                assert batch[name].shape == (4, 3, 16, 16)
                assert batch[name].is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(
                    batch[name], torch.stack([dataset.views[name].normalise([item[name]])[0] for item in items])
                )
        epochs.append(batches)
    assert global_states() == before
    assert epochs[0][0]["labels"].tolist() != epochs[1][0]["labels"].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_loader_keeps_order_and_all_pictures(workers):
    source, view = pictures(), evaluation_view(PIXELS)
    before = global_states()
    batches = list(evaluation_loader(source, view, 4, workers))
    assert global_states() == before
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == list(range(10))
    expected = torch.stack([view(image) for image in source["image"]])
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


def test_collate_makes_integer_labels():
    batch = collate([{"pixel_values": torch.full((3, 2, 4), float(i)), "labels": i} for i in (5, 2)])
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [5, 2]
    assert batch["pixel_values"].shape == (2, 3, 2, 4)
    assert batch["pixel_values"][:, 1, 0, 3].tolist() == [5.0, 2.0]


def test_sixteen_bit_grey_keeps_its_shades():
    image = Image.fromarray(np.array([[0, 256, 20000, 65535]], np.uint16))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(4)] == [0, 1, 78, 255]


def test_local_directory_named_like_a_source(tmp_path, monkeypatch):
    cifar10_layout(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert load_longtailed(DataConfig(path="digits", imbalance_factor=2)).class_names != [str(c) for c in range(10)]


def test_plain_integers_with_a_gap_or_a_hole_are_refused(tmp_path):
    columns = features(label=datasets.Value("int64"))
    for name, labels, message in (("gap", [0, 1, 10**9], "label 1000000000"), ("hole", [0, None, 1], "label None")):
        path = write_parquet(tmp_path / name, labels, columns=columns)
        with pytest.raises(ValueError, match=message):
            load_longtailed(DataConfig(path=str(path), profile="as_is", label_column="label"))


def test_unreadable_data_set_is_named(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-0.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"can't read the data set .*broken"):
        load_longtailed(DataConfig(path=str(tmp_path / "broken")))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_make_up_the_batch(parts):
    dataset = ViewDataset(pictures(), random_views(), seed=3)
    whole = torch.cat([batch["labels"] for batch in train_loader(dataset, 4)])
    split = [batch["labels"] for batch in train_loader(dataset, 4, parts)]
    assert len(split) == len(whole) // 4 * parts
    assert torch.equal(torch.cat(split), whole)


SITES = ["x", "y", "z"]


def write_sites(folder, sites, classes=3):
    """Pictures 0, 1, ... of classes in turn in class folders, with a table that knows their sites."""
    lines = []
    for i, site in enumerate(sites):
        name = NAMES[i % classes]
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{name}/{i}.png", "label": name, "site": site}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("values", [SITES, [10, 20, 30]], ids=["text", "numbers"])
def test_groups_of_a_metadata_file_are_held_out_whole(tmp_path, values):
    sites = [values[i % 9 // 3] for i in range(45)]  # each of three sites has each class five times
    where = {"path": str(write_sites(tmp_path / "photos", sites)), "profile": "as_is", "group_column": "site"}
    data = load_longtailed(DataConfig(**where, test_fraction=0.34))
    tested = set(numbers(data.test))
    assert len({sites[i] for i in tested}) == 1
    assert len(tested) == 15
    assert not {sites[i] for i in numbers(data.train)} & {sites[i] for i in tested}
    assert data.class_counts == [10, 10, 10]
    again = load_longtailed(DataConfig(**where, test_fraction=0.34, val_fraction=0.5))
    assert set(numbers(again.test)) == tested
    parts = [{sites[i] for i in numbers(part)} for part in (again.train, again.val, again.test)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert set().union(*parts) == set(values)
    config = DataConfig(**where, test_fraction=0.34)
    source = load_source(config)
    split = Split.write(tmp_path / "split", config, source, choose_rows(config, source))
    found = load_longtailed(DataConfig(**where, test_fraction=0.34, split=str(split.path), val_fraction=0.5))
    assert [numbers(found.test), numbers(found.val)] == [numbers(again.test), numbers(again.val)]
    with pytest.raises(ValueError, match=r"data\.group_column is None, there site"):
        load_longtailed(DataConfig(**where | {"group_column": None}, test_fraction=0.34, split=str(split.path)))


def test_groups_of_a_column_of_a_data_set(tmp_path):
    labels = [0, 1, 2] * 8
    columns = features(site=datasets.ClassLabel(names=SITES))
    folder = write_parquet(tmp_path / "pictures", labels, columns=columns, site=0)
    rows = datasets.load_dataset(str(folder), split="train").remove_columns("site")
    rows.add_column("site", [i // 12 for i in range(24)]).to_parquet(folder / "train-00000-of-00001.parquet")
    rest = {"path": str(folder), "profile": "as_is", "label_column": "label", "val_fraction": 0.5}
    data = load_longtailed(DataConfig(**rest, group_column="site"))
    assert sorted(map(sorted, (numbers(data.train), numbers(data.val)))) == [list(range(12)), list(range(12, 24))]
    assert len(data.test) == len(TEST_LABELS)


@pytest.mark.parametrize(
    ("sites", "changes", "message"),
    [
        (["x"] * 12, {}, "1 groups are too few; none can be held out"),
        (["x", "y", "z"] * 4, {}, "3 groups are too few"),  # a site for each class
        (["x", "y"] * 6, {"group_column": "place"}, "has no column 'place' .* it has image, label, site"),
        (["x", None] * 6, {}, "row 1 has no site .data.group_column; 6 such rows."),
        (["x", "y"] * 6, {"group_column": "image"}, "'image' .* holds Image.*, not values"),
    ],
    ids=["single", "by class", "unknown", "missing", "pictures"],
)  # fmt: skip
def test_groups_that_can_not_be_held_out_are_refused(tmp_path, sites, changes, message):
    folder = write_sites(tmp_path / "photos", sites)
    config = DataConfig(path=str(folder), profile="as_is", test_fraction=0.3, **({"group_column": "site"} | changes))
    with pytest.raises(ValueError, match=message):
        load_longtailed(config)


def test_groups_need_a_table_and_something_to_hold_out(tmp_path):
    with pytest.raises(ValueError, match=r"set data\.test_fraction or data\.val_fraction"):
        DataConfig(group_column="site")
    folder = write_sites(tmp_path / "photos", ["x", "y"] * 6)
    (folder / "metadata.jsonl").unlink()
    config = DataConfig(path=str(folder), profile="as_is", test_fraction=0.3, group_column="site")
    with pytest.raises(
        ValueError, match=r"write .*metadata\.csv with the columns file_name .such as ant/1\.jpg., label"
    ):
        load_longtailed(config)
    with pytest.raises(ValueError, match="the digits have no column 'site'"):
        load_longtailed(DataConfig(source="digits", val_fraction=0.3, group_column="site"))
