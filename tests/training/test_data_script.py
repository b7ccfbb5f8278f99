"""`training/data.py` as a user calls it: build, verify, push; and a run on one's own pictures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import data as script
import datasets
import numpy as np
import predict
import pytest
import train
import yaml
from accelerate.state import AcceleratorState, PartialState
from huggingface_hub import DatasetCard, hf_hub_download
from PIL import Image

from ecl_hf.data.config import DataConfig
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.official import BENCHMARKS
from tests.markdown import HOSTILE, replaced, structure

NAMES = ["Grüner Specht", "ant hill", "bee|fly"]
COUNTS = {"train": [12, 9, 10], "test": [2, 1, 3]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def noise(seed, size=(20, 24)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8))


@pytest.fixture
def pictures(tmp_path):
    """Class folders with a test split."""
    seed = 0
    for split, counts in COUNTS.items():
        for name, count in zip(NAMES, counts, strict=True):
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                noise(seed).save(tmp_path / "pictures" / split / name / f"{i:02d}.png")
                seed += 1
    return tmp_path / "pictures"


def build(pictures, output, *flags):
    factor = [] if "--data.profile=as_is" in flags else ["--data.imbalance_factor=4"]
    return script.main(["build", f"--data.path={pictures}", f"--output={output}", *factor, *flags])


def test_build_and_verify(pictures, tmp_path, capsys):
    split = build(pictures, tmp_path / "split", "--data.split_seed=first")
    said = capsys.readouterr().out
    assert "15 images, 3 classes of 9 to 2" in said
    assert split.record["parts"]["train"]["sha256"] in said
    assert "cao-first of pictures" in said
    script.main(["verify", str(split.path), f"--data.path={pictures}"])
    assert "same lists, 21 pictures can be decoded" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*test is not used:UserWarning")
def test_build_by_a_recipe(pictures, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"epochs": 7, "data": {"path": str(pictures), "profile": "as_is"}}))
    split = script.main(["build", f"--recipe={recipe}", "--data.test_fraction=0.3", f"--output={tmp_path / 'split'}"])
    assert split.record["data"]["test_fraction"] == 0.3
    assert split.record["parts"]["train"]["class_counts"] == [8, 6, 7]


@pytest.mark.filterwarnings("ignore:.*no pictures by their suffix")
@pytest.mark.parametrize("form", [[], ["--pictures"]])
def test_every_broken_picture_is_named(form, pictures, tmp_path, capsys):
    folder = pictures / "train" / "ant hill"
    noise(1, (200, 200)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture")
    png = (folder / "00.png").read_bytes()
    (folder / "crossed.png").write_bytes(png[:60] + bytes([png[60] ^ 255]) + png[61:])
    odd = {"grey": "L", "cmyk": "CMYK", "palette": "P", "sixteen": "I;16", "alpha": "RGBA", "bit": "1", "both": "LA"}
    for name, mode in odd.items():
        image = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 256) if mode == "I;16" else noise(2)
        image = image if mode == "I;16" else image.convert(mode)
        image.save(folder / f"{name}.{'jpg' if mode == 'CMYK' else 'png'}")
    (pictures / "test" / "ant hill" / "99.webp").write_bytes(b"RIFF")
    (folder / "README.txt").write_text("mine")
    split = script.main(
        ["build", f"--data.path={pictures}", "--data.profile=as_is", f"--output={tmp_path / 's'}", *form]
    )
    capsys.readouterr()
    with pytest.raises(SystemExit, match="error: 0 differences, 5 broken pictures"):
        script.main(["verify", str(split.path), f"--data.path={pictures}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken")]
    files = sorted((pictures / "train").rglob("*.*g"), key=str)
    broken = {"crossed.png", "empty.jpg", "half.jpg", "text.png"}
    for line, file in zip(lines[:4], [file for file in files if file.name in broken], strict=True):
        assert f"train row {files.index(file)} (source row {files.index(file)}), {file}: " in line
    assert lines[4].startswith("broken: test row 3 (source row 3), ")
    assert "99.webp" in lines[4]
    assert "empty file" in lines[1]
    assert "truncated" in lines[2]


def change_label(pictures):
    (pictures / "train" / NAMES[0] / "03.png").rename(pictures / "train" / NAMES[1] / "03b.png")


def remove_class(pictures):
    for split in COUNTS:
        shutil.rmtree(pictures / split / NAMES[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [(change_label, "the source has other labels"), (remove_class, "classes of the split alone: bee|fly (1)")],
)
def test_other_source_is_told_from_another_split(change, said, pictures, tmp_path, capsys):
    split = build(pictures, tmp_path / "split")
    change(pictures)
    with pytest.raises(SystemExit, match="error: 1 differences"):
        script.main(["verify", str(split.path), f"--data.path={pictures}"])
    assert said in capsys.readouterr().out


def test_other_rows_than_the_protocols(pictures, tmp_path, capsys):
    split = build(pictures, tmp_path / "split")
    record = split.record | {"data": split.record["data"] | {"split_seed": 5}}
    (split.path / "split.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="error: 1 differences"):
        script.main(["verify", str(split.path), f"--data.path={pictures}"])
    assert "differs: train_rows.txt: " in capsys.readouterr().out


def test_stored_pictures_are_compared(pictures, tmp_path, capsys):
    split = build(pictures, tmp_path / "split", "--pictures")
    row = split.rows()["train"][0]
    noise(99).save(pictures / "train" / NAMES[0] / f"{row:02d}.png")
    with pytest.raises(SystemExit, match="error: 1 differences, 0 broken pictures"):
        script.main(["verify", str(split.path), f"--data.path={pictures}"])
    assert f"differs: train row 0 (source row {row})" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*fewer than 5")
def test_stored_labels_are_compared(pictures, tmp_path):
    split = build(pictures, tmp_path / "split", "--pictures")
    file = next((split.path / "data").glob("train*"))
    stored = datasets.load_dataset("parquet", data_files=str(file), split="train")
    stored.select(range(len(stored) - 1)).to_parquet(file)
    with pytest.raises(SystemExit, match=r"the train pictures .* are not those of train_rows\.txt"):
        script.main(["verify", str(split.path), f"--data.path={pictures}"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--data.path=nowhere", "--output={}/new"], "data.path nowhere is not a directory"),
        (["build", "--data.path={}/pictures", "--output={}/pictures"], "not an empty directory"),
        (["build", "--data.path={}/pictures", "--data.split=x", "--output={}/new"], "built already"),
        (["verify", "{}/pictures"], "holds no split.json"),
        (["verify", "{}/split"], "was made of the local directory pictures: name it in data.path"),
        (["verify", "{}/split", "--data.path=nowhere"], "data.path nowhere is not a directory"),
        (["push", "{}/split", "--repo_id=owner/new"], "holds no pictures: build it with --pictures"),
        (["push", "{}/pictures", "--repo_id=owner/new"], "holds no split.json"),
    ],
)
def test_what_is_refused(arguments, said, pictures, tmp_path):
    build(pictures, tmp_path / "split")
    with pytest.raises(SystemExit) as stopped:
        script.main([argument.replace("{}", str(tmp_path)) for argument in arguments])
    assert str(stopped.value).startswith("error: ")
    assert said in str(stopped.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--data.profile=steep", "--output=x"], "profile"),
        (["build", "--data.test_fraction=2", "--output=x"], "data.test_fraction must lie between 0 and 1"),
        (["push", "x"], "repo_id"),
        ([], "subcommand"),
    ],
)
def test_wrong_flags(arguments, said, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert said in capsys.readouterr().err


def test_published_list(tmp_path, monkeypatch, capsys):
    small = BENCHMARKS["places_lt"].__class__(
        **vars(BENCHMARKS["places_lt"]) | {"train_counts": [2, 1], "test_count": 1}
    )
    monkeypatch.setitem(BENCHMARKS, "places_lt", small)
    for name, files in (
        ("train", ["train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg"]),
        ("test", ["v/a/1.jpg", "v/b/1.jpg"]),
    ):
        lines = [f"{file} {'ab'.index(file.split('/')[1])}\n" for file in files]
        (tmp_path / f"Places_LT_{name}.txt").write_text("".join(lines))
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            noise(3).save(tmp_path / file)
    flags = ["--data.source=places_lt", f"--data.path={tmp_path}", "--data.profile=as_is"]
    split = script.main(["build", *flags, f"--output={tmp_path / 'split'}"])
    assert split.record["protocol"] == split.record["source"]["name"] == "places_lt"
    script.main(["verify", str(split.path), f"--data.path={tmp_path}"])
    assert "same lists, 5 pictures can be decoded" in capsys.readouterr().out


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:.*fewer than 5")
def test_push(pictures, tmp_path, capsys):
    split = build(pictures, tmp_path / "split", "--pictures")
    flags = ["--repo_id=owner/birds", "--private", "--license=cc-by-4.0", "--citation=A. Author: Birds, 2020."]
    script.main(["push", str(split.path), *flags])
    assert "owner/birds" in capsys.readouterr().out

    published = datasets.load_dataset("owner/birds")
    local = load_longtailed(DataConfig(path=str(split.path), profile="as_is"))
    for part, expected in (("train", local.train), ("test", local.test)):
        assert published[part]["label"][:] == expected["label"][:]
        found = published[part].cast_column("image", datasets.Image(decode=False))["image"]
        wanted = expected.cast_column("image", datasets.Image(decode=False))["image"]
        assert [row["bytes"] for row in found] == [row["bytes"] for row in wanted]
    trained_on = load_longtailed(DataConfig(source="owner/birds", profile="as_is"))
    assert trained_on.class_names == NAMES
    assert trained_on.class_counts == [9, 4, 2]

    card = DatasetCard.load("owner/birds")
    assert card.data.license == "cc-by-4.0"
    assert card.data.task_categories == ["image-classification"]
    assert {part["name"] for part in card.data.dataset_info["splits"]} == {"train", "test"}
    for said in (
        "15 training and 6 test images of 3 classes",
        "`cao-seed0`",
        split.record["parts"]["train"]["sha256"],
        "| 0 | Grüner Specht | 9 | 2 |",
        r"| 2 | bee\|fly | 2 | 3 |",
        "many): 0; 20 to 100 (medium): 0; fewer (few): 3",
        "A. Author: Birds, 2020.",
        "Cao, C. Wei",
    ):
        assert said in card.text
    assert str(tmp_path) not in card.content
    for file in ("split.json", "train_rows.txt", "test_rows.txt"):
        downloaded = hf_hub_download("owner/birds", file, repo_type="dataset")
        assert Path(downloaded).read_bytes() == (split.path / file).read_bytes()


@pytest.mark.filterwarnings("ignore:.*test is not used:UserWarning")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "fall exponentially to 1/4 of the largest"),
        (["--data.profile=pareto"], "Pareto distribution with power 6 (Liu et al., 2019) to 1/4 of the largest"),
        (["--data.profile=as_is"], "All images of the source."),
        (["--data.profile=as_is", "--data.test_fraction=0.25"], "Of each class, 25 % of the images are held out"),
        (["--data.split_seed=first"], "first images in the order of the source"),
        (["--data.split_seed=7"], "`numpy.random.RandomState(7)`"),
    ],
)
def test_card_says_the_protocol(flags, said, pictures, tmp_path):
    split = build(pictures, tmp_path / "split", *flags)
    options = script.Namespace(repo_id="me/birds", license=None, citation=None)
    text = str(script.dataset_card(split, options, DatasetCard("---\n---\n").data))
    assert said in text
    assert text.lower().count("not stated") == 3
    assert "license:" not in text


@pytest.mark.parametrize(
    ("profile", "protocol", "said", "unsaid"),
    [
        ("as_is", "cao-seed3", ["`numpy.random.RandomState(3)` decides.", "All other images"], ["shuffled"]),
        ("as_is", "cao-first", ["the first goes.", "All other images"], ["Each class keeps"]),
        (
            "exponential",
            "cao-seed3",
            ["its images are shuffled by `numpy.random.RandomState(3)`"],
            ["All other images"],
        ),
    ],
)
def test_card_says_that_groups_are_held_out_whole(profile, protocol, said, unsaid, pictures, tmp_path):
    split = build(pictures, tmp_path / "split")
    changes = {"profile": profile, "split_seed": 3, "test_fraction": 0.25, "group_column": "site`| "}
    grouped = replace(split, record={**split.record, "protocol": protocol, "data": {**split.record["data"], **changes}})
    options = script.Namespace(repo_id="me/birds", license=None, citation=None)
    text = script.dataset_card(grouped, options, DatasetCard("---\n---\n").data).text.partition("| list |")[0]
    for part in ["same value in the column `site'/`", "Whole groups", "near to 25 % of its images", *said]:
        assert part in text
    assert not any(part in text for part in ["Of each class, 25 %", *unsaid])


def test_nothing_that_a_stranger_wrote_changes_the_page(pictures, tmp_path):
    split = build(pictures, tmp_path / "split", "--data.profile=as_is")
    options = script.Namespace(repo_id="me/birds", license=None, citation=None)
    pages = []
    for text in ("red/fox", HOSTILE):
        told = replace(split, record=replaced(split.record, text))
        pages.append(str(script.dataset_card(told, options, DatasetCard("---\n---\n").data)))
    assert structure(pages[0]) == structure(pages[1])
    assert "\x1b" not in pages[1]


@pytest.mark.filterwarnings("ignore:.*fewer than 5")
def test_class_names_reach_the_pipeline(pictures, tmp_path, capsys):
    """An own folder, cut with a named split, through training to the prediction of a file."""
    split = build(pictures, tmp_path / "split")
    flags = ["--model.architecture=resnet20_cifar", "--model.image_size=16", "--batch_size=4", "--epochs=1"]
    flags += ["--data.imbalance_factor=4", "--method=bc_ensemble", "--model.num_experts=2"]
    AcceleratorState._reset_state(reset_partial_state=True)
    run = train.main(
        [f"--data.path={pictures}", f"--data.split={split.path}", *flags, f"--output_dir={tmp_path / 'run'}"]
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    results = json.loads((run / "results.json").read_text())
    assert results["class_names"] == NAMES
    assert results["class_counts"] == [9, 4, 2]
    assert results["recipe"]["data"]["split"] == "split"  # where it lies is this machine's affair
    picture = pictures / "test" / NAMES[1] / "00.png"
    (answers,) = predict.main([f"--model={run / 'model'}", "--top_k=3", str(picture)])
    assert sorted(answer["label"] for answer in answers) == NAMES
    assert NAMES[0] in capsys.readouterr().out
