"""Heads on the kept features of a frozen encoder, through the training script, and choosing by validation pictures."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import train as train_script
from PIL import Image
from safetensors.torch import load_file, save_file
from train import main

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.mixing import mixup
from ecl_hf.data.views import evaluation_view
from ecl_hf.evidence.evaluation import predict, score
from ecl_hf.evidence.metrics import group_accuracy
from ecl_hf.learning.tuning import FrozenEncoder, check_kept_features
from ecl_hf.methods import METHODS
from ecl_hf.methods.base import Method, Stage
from ecl_hf.runs.recipe import Recipe
from tests.reference import balanced_likelihood
from tests.training.test_train_script import TINY, assert_same_run, fresh_accelerate  # noqa: F401 (a fixture)

SMALL = [flag for flag in TINY if not flag.startswith(("--data.source", "--data.max_count", "--data.imbalance_factor"))]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights of an encoder, by timm's names."""
    torch.manual_seed(3)
    file = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_file(timm.create_model("resnet20_cifar", num_classes=0).state_dict(), file)
    return file


@pytest.fixture
def train(pretrained, tmp_path):
    def run(name, *flags):
        head = [f"--model.pretrained={pretrained}", "--model.tune=head"]
        tiny = SMALL if any(flag.startswith("--data.path") for flag in flags) else TINY
        return main([*tiny, *head, f"--output_dir={tmp_path / name}", *flags])

    return run


def test_heads_learn_what_a_model_of_pictures_gives_back(train, pretrained):
    flags = ["--method=bc", "--model.classifier=cosine", "--model.head_init=class_means", "--data.horizontal_flip=true"]
    run = train("run", *flags, "--epochs=4", "--data.val_fraction=0.2")
    model = ECLForImageClassification.from_pretrained(run / "model")
    encoder = load_file(pretrained)
    own = model.experts[0].backbone.state_dict()
    assert all(torch.equal(own[name], encoder[name]) for name in encoder)  # not even running statistics have moved
    kept = load_file(run / "features.safetensors")
    data = load_longtailed(Recipe.from_file(run / "recipe.yaml").data)
    view = evaluation_view(model.config.pretrained_cfg)
    with torch.no_grad():
        for part, pictures in (("train", data.train), ("val", data.val), ("test", data.test)):
            pixels = torch.stack([view(picture.convert("RGB")) for picture in pictures["image"]])
            torch.testing.assert_close(kept[f"{part}.features"][0], model.experts[0].backbone.eval()(pixels))
        mirrored = torch.stack([view(picture.convert("RGB")).flip(-1) for picture in data.train["image"][:9]])
        torch.testing.assert_close(kept["train.features"][1, :9], model.experts[0].backbone(mirrored))
        pixels = torch.stack([view(picture.convert("RGB")) for picture in data.test["image"]])
        found = predict(model, [{"pixel_values": pixels, "labels": torch.tensor(data.test["label"][:])}])
    results = json.loads((run / "results.json").read_text())
    for way, (logits, _) in found.ways.items():
        for name, value in score(logits, found.labels, data.class_counts).items():
            assert results["test"][way]["ensemble"][name] == (value and pytest.approx(value, rel=1e-4))
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    checkpoint = next((run / "checkpoints").glob("step_*")) / "model.safetensors"
    assert not any("backbone" in key for key in load_file(checkpoint))


def test_experts_on_one_encoder_are_small_files_beside_it(train, pretrained, tmp_path):
    run = train("run", "--method=ride", "--epochs=1")
    files = {}
    for key, name in json.loads((run / "model/model.safetensors.index.json").read_text())["weight_map"].items():
        files.setdefault(name, set()).add(".".join(key.split(".")[:2]))
    names = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    parts = [{"experts.0"}, {"experts.1"}, {"experts.2"}, {"trunk.backbone"}]
    assert files == dict(zip(names, parts, strict=True))
    sizes = [(run / "model" / name).stat().st_size for name in names]
    assert max(sizes[:3]) < sizes[3] / 10
    whole = ECLForImageClassification.from_pretrained(run / "model").eval()
    encoder = load_file(pretrained)
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in whole.trunk.backbone.state_dict().items())
    (run / "model" / names[0]).unlink()
    one = ECLForImageClassification.from_pretrained(run / "model", experts=[1]).eval()
    plain = timm.create_model("resnet20_cifar", num_classes=10).eval()
    head = {f"fc.{name}": tensor for name, tensor in one.experts[0].head.state_dict().items()}
    plain.load_state_dict(encoder | {"fc.bias": torch.zeros(10)} | head)
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(one(image).logits, whole(image).expert_logits[:, 1])
        if whole.config.classifier == "linear":
            torch.testing.assert_close(one(image).logits, plain(image))


def test_epoch_and_temperature_are_chosen_on_the_validation_pictures(train):
    flags = ["--method=bc", "--data.val_fraction=0.3", "--epochs=5", "--optim.lr=0.02", "--data.max_count=80"]
    run = train("run", *flags)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    model = ECLForImageClassification.from_pretrained(run / "model").eval()
    data = load_longtailed(Recipe.from_file(run / "recipe.yaml").data)
    view = evaluation_view(model.config.pretrained_cfg)
    labels = torch.tensor(data.val["label"][:])
    with torch.no_grad():
        logits = model(torch.stack([view(picture.convert("RGB")) for picture in data.val["image"]])).logits
    found = group_accuracy(logits.argmax(-1), labels, data.class_counts)["balanced"]
    assert found == pytest.approx(max(line["val/balanced"] for line in lines))
    temperature, val_counts = model.config.temperature, labels.bincount(minlength=10).tolist()
    assert temperature != 1

    def likelihood(other):
        return balanced_likelihood((logits * temperature).tolist(), labels.tolist(), val_counts, other)

    assert likelihood(temperature) <= min(likelihood(1.02 * temperature), likelihood(temperature / 1.02))


@pytest.mark.slow
def test_temperature_by_cross_validation_costs_no_picture(train, monkeypatch):
    """Each picture is judged once, by a model that has not seen it; the published heads have seen them all."""
    flags = ["--method=ride", "--epochs=4", "--optim.lr=0.02", "--data.max_count=40", "--data.imbalance_factor=40"]
    asked, seen = [], []
    predict_held_out = train_script.Fold.predict_held_out

    def remember(fold):
        found = predict_held_out(fold)
        seen.append((fold.held_out, set(fold.train_set.rows.tolist()), fold.train_set.labels[fold.held_out]))
        asked.append(found)
        return found

    monkeypatch.setattr(train_script.Fold, "predict_held_out", remember)
    run, plain = train("run", *flags, "--train.calibration_folds=3"), train("plain", *flags)
    ours, theirs = (load_file(folder / "model/model-00001-of-00004.safetensors") for folder in (run, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in plain.iterdir())
    assert (run / "metrics.jsonl").read_text().count("\n") == 4
    counts = torch.tensor(json.loads((run / "results.json").read_text())["class_counts"])
    assert counts[-1] == 1
    judged = sum(held_out.long() for held_out, _, _ in seen)
    assert judged.max() == 1
    assert judged.sum() == counts.sum() - (counts == 1).sum()
    for (held_out, rows, labels), found in zip(seen, asked, strict=True):
        assert not rows & set(torch.nonzero(held_out)[:, 0].tolist())
        assert found.labels.tolist() == labels.tolist()
    logits = torch.cat([found.ensemble_logits for found in asked]).double()
    labels = torch.cat([found.labels for found in asked])
    config, judged_counts = ECLConfig.from_pretrained(run / "model"), labels.bincount(minlength=10).tolist()
    assert config.logit_prior == "uniform"

    def likelihood(temperature):
        return balanced_likelihood(logits.tolist(), labels.tolist(), judged_counts, temperature)

    assert config.temperature != 1
    assert likelihood(config.temperature) <= min(likelihood(factor * config.temperature) for factor in (0.98, 1.02))


def test_a_broken_picture_is_named_with_its_split(train, tmp_path):
    for name, colour in (("ant", 50), ("bee", 200)):
        for split in ("train", "test"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (8, 8), (colour, i, 0)).save(tmp_path / "data" / split / name / f"{i}.png")
    (tmp_path / "data" / "train" / "bee" / "3.png").write_bytes(b"nothing")
    flags = [f"--data.path={tmp_path / 'data'}", "--data.profile=as_is", "--batch_size=4", "--method=bc"]
    with pytest.raises(SystemExit, match=r"^error: train row 9, bee/3\.png"):
        train("run", *flags)


def test_folds_that_are_not_made_are_named(train, capsys):
    flags = ["--method=bc", "--epochs=1", "--train.calibration_folds=2"]
    train("all", *flags, "--model.tune=all")
    assert "warning: train.calibration_folds does nothing here" in capsys.readouterr().out
    train("validated", *flags, "--data.val_fraction=0.2")
    said = capsys.readouterr().out
    assert "calibration_folds" not in said
    assert re.search(
        r"temperature [\d.]+, found on \d+ pictures\nprobabilities may be far from true: 9 classes of 10", said
    )


@pytest.mark.slow
def test_interrupted_run_on_kept_features_is_the_uninterrupted_one(train, tmp_path, monkeypatch):
    flags = ["--method=ecl", "--data.val_fraction=0.2", "--model.head_init=class_means"]
    flags += ["--model.classifier=cosine", "--epochs=3", "--train.checkpoint_every=1"]
    whole = train("whole", *flags)
    steps = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])["step"]
    train("parts", *flags, f"--train.max_steps={steps + 2}")
    monkeypatch.setattr("ecl_hf.session.encode", None)  # what was kept is read
    assert_same_run(whole, train("parts", *flags, "--resume"))
    heads = ECLForImageClassification.from_pretrained(whole / "model").experts
    assert not torch.equal(heads[0].head.weight, heads[1].head.weight)  # as they would stay from equal starts
    results = json.loads((whole / "results.json").read_text())
    assert results["feature_seconds"] > 0
    assert results["pretrained_weights"] == results["recipe"]["model"]["pretrained"] == "encoder.safetensors"
    (tmp_path / "another").mkdir()
    shutil.copy(whole / "features.safetensors", tmp_path / "another")
    assert_same_run(whole, train("another", *flags))


def test_features_of_another_split_are_not_taken_for_its_own(train, tmp_path):
    """Of class folders every split has the same labels in the same order."""
    noise = np.random.RandomState(0).randint(0, 256, (24, 8, 8, 3)).astype(np.uint8)
    for n, picture in enumerate(noise):
        file = tmp_path / f"pictures/c{n % 2}/{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    flags = [f"--data.path={tmp_path / 'pictures'}", "--data.profile=as_is", "--data.test_fraction=0.25"]
    flags += ["--method=bc", "--train.max_steps=1"]
    first = train("first", *flags)
    (tmp_path / "other").mkdir()
    shutil.copy(first / "features.safetensors", tmp_path / "other")
    other = train("other", *flags, "--data.split_seed=1")
    ours, theirs = (load_file(run / "features.safetensors")["test.features"] for run in (other, first))
    assert not torch.equal(ours, theirs)


def test_run_ends_when_it_does_not_get_better(train):
    run = train("run", "--method=bc", "--epochs=40", "--data.val_fraction=0.3", "--train.patience=2", "--optim.lr=0.1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line["val/balanced"] for line in lines]
    best = scores.index(max(scores))
    assert len(scores) == best + 3 < 40
    assert json.loads((run / "results.json").read_text())["finished"]


def test_head_on_a_random_encoder_is_refused(train, tmp_path):
    with pytest.raises(SystemExit, match=r"set model\.pretrained"):
        train("run", "--method=bc", "--model.pretrained=false")
    assert not (tmp_path / "run").exists()


def test_method_that_mixes_pictures_is_refused():
    supervision = METHODS["bc"].stages[0].terms
    method = Method((Stage(supervision, mixing=mixup(0.2)),))
    with pytest.raises(ValueError, match="mixed mixes pictures"):
        check_kept_features(method, "mixed", pretrained=True, streaming=False)


def test_the_encoder_goes_back_before_heads_of_several_layers():
    config = ECLConfig(architecture="resnet20_cifar", num_experts=2, num_labels=3, classifier_neck=5)
    model = ECLForImageClassification(config).eval()
    pictures = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(pictures).logits
        FrozenEncoder(model).put_into(model)
        assert torch.equal(model(pictures).logits, expected)
