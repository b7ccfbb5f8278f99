"""`training/export.py` and the model cards: what a run becomes, loaded by other libraries."""

import json
import re
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import onnxruntime
import pytest
import timm
import torch
import train
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.methods import METHODS, PAPERS
from ecl_hf.publishing.hub import best_expert, model_card, write_card
from ecl_hf.runs.folder import RunFolder
from tests.markdown import HOSTILE, replaced, structure

ROOT = Path(__file__).parents[2]
NAMES = ["red fox", "wolf", "lynx", "otter"]
COUNTS = [300, 60, 12, 2]


def image_batch(model, count=3):
    return torch.randn(count, *model.config.pretrained_cfg["input_size"])


def scores(top1, few):
    return {"top1": top1, "balanced": 0.44, "macro_f1": 0.39, "many": 0.81, "medium": 0.52, "few": few, "ece": 0.07}


def results(num_experts, **data):
    """What `train.py` writes, with the second expert the best."""
    experts = [scores(0.4 + 0.01 * (k == 1), 0.125) for k in range(num_experts)]
    test = {"ensemble": scores(0.4375, None), "experts": experts, "expert_mean": experts[0]}
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / "cifar10_lt.yaml").read_text())
    data = {"source": "uoft-cs/cifar10", "path": None, "profile": "exponential", "imbalance_factor": 100.0} | data
    recipe |= {
        "data": {"split_seed": 0, "test_split": "test", "horizontal_flip": True, **data},
        "model": {"pretrained": False},
    }
    return {
        "method": "ecl",
        "seed": 3,
        "epochs": 200,
        "steps": 1000,
        "test": {"plain": test, "flip": {**test, "ensemble": scores(0.4525, None)}},
        "test_images": 4000,
        "class_counts": COUNTS,
        "parameters": 3_000_000,
        "parameters_per_expert": 1_000_000,
        "macs": 30_000_000,
        "macs_per_expert": 10_000_000,
        "training_seconds": 90.0,
        "mixed_precision": "no",
        "machine": {"processes": 2, "device": "cpu"},
        "versions": {"torch": "1", "timm": "2", "transformers": "3"},
        "commit": "abc",
        "recipe": recipe,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose experts are timm's own `test_resnet`."""
    return make_run(tmp_path_factory.mktemp("run"), "test_resnet")


def make_run(path, architecture, **config):
    torch.manual_seed(0)
    config = {"num_experts": 3, "class_counts": COUNTS, "id2label": dict(enumerate(NAMES))} | config
    model = ECLForImageClassification(ECLConfig(architecture=architecture, **config))
    model.train()(image_batch(model, 8))  # BatchNorm statistics of its own
    folder = RunFolder(path)
    model.save_pretrained(folder.model)
    folder.results_file.write_text(json.dumps(results(model.config.num_experts)))
    return folder


def load(run, **kwargs):
    return ECLForImageClassification.from_pretrained(run.model, **kwargs)


# --- cards ---


def test_cards_name_the_pretrained_weights_with_their_tag(run):
    tag = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    for template, expert in (("model_card.md", None), ("timm_card.md", 1)):
        told = {**results(3), "pretrained_weights": tag}
        card = model_card(ROOT / "hub_cards" / template, load(run).config, told, expert=expert)
        assert f"Training began with the pretrained weights `{tag}`." in card.text
        card = model_card(ROOT / "hub_cards" / template, load(run).config, results(3), expert=expert)
        assert "pretrained weights" not in card.text


@pytest.mark.parametrize(("template", "expert"), [("model_card.md", None), ("timm_card.md", 1)])
def test_nothing_that_a_stranger_wrote_changes_the_page(template, expert):
    pages = []
    for text in ("red/fox", HOSTILE):
        names = {c: f"{text} {c}" for c in range(4)}
        config = ECLConfig(
            architecture="test_resnet", num_experts=3, class_counts=COUNTS, id2label=names, weighted_on=text
        )
        told = {**replaced(results(3), text), "pretrained_weights": text, "paper": text}
        told["recipe"]["data"]["path"] = text.replace("/", "|")
        pages.append(str(model_card(ROOT / "hub_cards" / template, config, told, expert=expert)))
    assert structure(pages[0]) == structure(pages[1])
    assert "\x1b" not in pages[1]
    assert ModelCard(pages[1]).data.library_name == ModelCard(pages[0]).data.library_name


def test_every_number_of_the_card_is_in_the_results(run, tmp_path):
    export.main(
        ["--run", str(run.path), "--output", str(tmp_path / "out"), "--repo_id", "me/foxes", "--license", "mit"]
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "mit"
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert {"ecl", "long-tailed"} <= set(card.data.tags)
    recorded = {result.metric_name: result.metric_value for result in card.data.eval_results}
    kinds = {"Top-1 accuracy", "Balanced accuracy", "Macro F1", "Accuracy", "Expected calibration error"}
    assert {name.split(",")[0] for name in recorded} == kinds
    assert sorted(recorded.values()) == [0.07, 0.39, 0.4375, 0.44, 0.52, 0.81]  # no entry for the empty group
    assert all(result.dataset_type == "uoft-cs/cifar10" for result in card.data.eval_results)
    assert "| ensemble | no | 44.0 | 43.8 | 39.0 | 81.0 | 52.0 | none | 7.0 |" in card.text
    assert "| ensemble | yes | 44.0 | 45.2 | 39.0 | 81.0 | 52.0 | none | 7.0 |" in card.text
    assert "| expert 1 | no | 44.0 | 41.0 | 39.0 | 81.0 | 52.0 | 12.5 | 7.0 |" in card.text
    assert "| red fox | 300 |" in card.text
    assert "many): 1; 20 to 100 (medium): 1; fewer (few): 2" in card.text
    assert card.text.count("me/foxes") >= 4
    assert "experts=[1]" in card.text
    assert "target_prior" in card.text
    assert "@article" in card.text
    [file] = (tmp_path / "out" / ".eval_results").iterdir()
    assert file.name == "cifar10.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("uoft-cs/cifar10", "balanced_accuracy", 0.44),
        ("uoft-cs/cifar10", "accuracy", 0.4375),
        ("uoft-cs/cifar10", "f1", 0.39),
    ]
    assert entries[0].notes.startswith("3 experts, no test-time flip; trained on a long-tailed part (exponential")


def test_example_pictures_are_published_without_their_names_and_offered(run, tmp_path):
    secret = tmp_path / "patient 12.png"
    Image.new("RGB", (9, 9), "green").save(secret)
    export.main(["--run", str(run.path), "--output", str(tmp_path / "out"), "--examples", str(secret)])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["widget"] == [{"src": "examples/0.png", "example_title": "Example 1"}]
    assert (tmp_path / "out" / "examples" / "0.png").read_bytes() == secret.read_bytes()
    assert "patient" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("pretrained", "base"),
    [
        (False, None),
        (True, "timm/resnet50.a1_in1k"),
        ("hf-hub:me/encoder", "me/encoder"),
        ("/home/me/weights", None),
        ("weights.bin", None),
    ],
)
def test_base_model_is_a_hub_repository_or_none(pretrained, base):
    told = results(1)
    told["recipe"]["model"]["pretrained"] = pretrained
    config = ECLConfig(architecture="resnet50", class_counts=COUNTS, id2label=dict(enumerate("abcd")))
    config.pretrained_cfg = {"input_size": [3, 32, 32]}
    card = model_card(ROOT / "hub_cards" / "model_card.md", config, told)
    assert card.data.base_model == base
    assert card.data.metrics == ["balanced_accuracy", "accuracy"]
    assert card.data.eval_results[0].metric_type == "balanced_accuracy"


def test_card_says_what_was_not_measured(run):
    config = load(run).config
    card = model_card(ROOT / "hub_cards" / "model_card.md", config, None)
    assert card.data.eval_results is None
    assert "Not measured." in card.text
    assert "Licence:** not stated" in card.text
    assert "Probabilities" not in card.text
    config.temperature = 0.6543
    card = model_card(ROOT / "hub_cards" / "model_card.md", config, None)
    assert "logits are divided by 0.65, a temperature" in card.text
    assert not any(row.startswith("| ensemble") for row in card.text.splitlines())


def test_card_names_no_hub_data_set_for_local_pictures(run):
    template = ROOT / "hub_cards" / "model_card.md"
    card = model_card(template, load(run).config, results(3, path="my_foxes"))
    assert card.data.datasets is None
    assert "`my_foxes`" in card.text
    elsewhere = model_card(template, load(run).config, results(3, path="/home/me/my_foxes"))
    assert elsewhere.content == card.content
    named = model_card(template, load(run).config, results(3, path="cifar10"), dataset="uoft-cs/cifar10")
    assert named.data.datasets == ["uoft-cs/cifar10"]


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ("uniform", "Raw logits suit data in which all classes are equally frequent"),
        ("train", "rare classes are seldom predicted"),
        ([0.0, -1.0, -2.0, -3.0], "Raw logits carry another class prior, neither uniform nor"),
    ],
)
def test_card_says_which_prior_the_logits_carry(prior, said):
    config = ECLConfig(class_counts=COUNTS, id2label=dict(enumerate(NAMES)), logit_prior=prior)
    config.pretrained_cfg = {"input_size": [3, 32, 32]}
    text = model_card(ROOT / "hub_cards" / "model_card.md", config, None).text
    assert said in text
    assert sum(text.count(part) for part in ("Raw logits suit", "Raw logits carry")) == 1
    assert ("seldom" in text) == (prior == "train")
    assert ("a weighted mean, `target_prior` is approximate" in text) == isinstance(prior, list)


def test_scores_on_held_out_pictures_are_not_told_as_those_of_the_test_split(run, tmp_path):
    told = {**results(3, test_fraction=0.2, train_split="train"), "finished": True}
    told["recipe"]["data"]["val_fraction"] = 0.1
    config = ECLConfig.from_pretrained(run.model)
    for name, expert in (("model_card.md", None), ("timm_card.md", 1)):
        write_card(tmp_path, ROOT / "hub_cards" / name, config, told, expert=expert)
        assert not (tmp_path / ".eval_results").exists()
        card = ModelCard.load(tmp_path / "README.md")
        assert {result.dataset_split for result in card.data.eval_results} == {None}
        assert "4000 images, a held-out part of the split train" in card.text
        assert "after the epoch that was the best on validation pictures" in card.text
        assert "the split test" not in card.text
    unfinished = model_card(ROOT / "hub_cards" / "model_card.md", config, {**told, "finished": False})
    assert "after the last epoch" in unfinished.text


def test_cards_name_the_method_and_speak_of_several_experts_where_there_are_some(run):
    config = ECLConfig.from_pretrained(run.model)
    alone = ECLConfig(architecture="test_resnet", num_experts=1, class_counts=COUNTS, id2label=config.id2label)
    ours, paper = "Towards Effective Collaborative Learning", PAPERS["ldam"]
    for name, expert in (("model_card.md", None), ("timm_card.md", 0)):
        template = ROOT / "hub_cards" / name
        for told in (results(1) | {"method": "ldam", "paper": paper}, results(1) | {"method": "ldam"}):
            text = model_card(template, alone, told, expert=expert).text
            assert not any(word in text for word in ("together", "It is expert", "An ensemble"))
            cited = f"Method `ldam`: {paper}. " if "paper" in told else "Method `ldam`. "
            assert f"{cited}The package `ecl_hf`:" in text
            assert ours in text.partition("The package")[2]
        assert "trained together" in model_card(template, config, results(3), expert=expert).text
    assert PAPERS.keys() == METHODS.keys()
    assert all(re.search(r"\b20\d\d\)", said) for said in PAPERS.values())
    assert paper == "LDAM, and LDAM with deferred re-weighting (Cao et al., NeurIPS 2019)"


def test_card_without_flip_where_mirroring_changes_the_class(run):
    card = model_card(ROOT / "hub_cards" / "model_card.md", load(run).config, results(3, horizontal_flip=False))
    assert "| ensemble | yes |" not in card.text
    assert "| ensemble | no |" in card.text
    assert "flip=True" not in card.text
    assert "flip=True" in model_card(ROOT / "hub_cards" / "model_card.md", load(run).config, results(3)).text


@pytest.mark.parametrize("pretrained", [True, "timm/resnet18.a1_in1k", "weights/mine.safetensors"])
def test_card_names_the_base_model(pretrained):
    config = ECLConfig(architecture="resnet18.a1_in1k", num_experts=1, num_labels=2)
    config.pretrained_cfg = {"input_size": [3, 224, 224]}
    recorded = results(1)
    recorded["recipe"]["model"]["pretrained"] = pretrained
    card = model_card(ROOT / "hub_cards" / "model_card.md", config, recorded)
    expected = None if pretrained == "weights/mine.safetensors" else "timm/resnet18.a1_in1k"
    assert card.data.base_model == expected


def test_any_class_name_stands_in_its_row():
    names = ["pi|pe", "new\nline", "<b>", "{{ x }}"]
    config = ECLConfig(class_counts=COUNTS, id2label=dict(enumerate(names)), pretrained_cfg={"input_size": [3, 32, 32]})
    text = model_card(ROOT / "hub_cards" / "model_card.md", config, None).text
    rows = text.split("| class | training images |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert rows == ["| pi\\|pe | 300 |", "| new line | 60 |", "| &lt;b&gt; | 12 |", "| {{ x }} | 2 |"]


def test_committed_card_is_what_the_template_makes_of_the_committed_results():
    recorded = json.loads((ROOT / "training/results/cifar10_lt_small/ecl-sum/seed0.json").read_text())
    config = ECLConfig(
        architecture="resnet20_cifar",
        class_counts=recorded["class_counts"],
        id2label=dict(enumerate(recorded["class_names"])),
        pretrained_cfg={"input_size": [3, 16, 16]},
    )
    card = model_card(
        ROOT / "hub_cards" / "model_card.md", config, recorded, "me/ecl-cifar10-lt-small", dataset="uoft-cs/cifar10"
    )
    assert card.content == (ROOT / "hub_cards" / "example_cifar10_lt_small.md").read_text()


def test_saving_alone_writes_a_short_card(tmp_path):
    model = ECLForImageClassification(ECLConfig(architecture="resnet20_cifar", num_experts=2, num_labels=3))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert "not measured" in card.text
    (tmp_path / "README.md").write_text("my own")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"


# --- timm ---


@pytest.mark.parametrize("flags", [[], ["--expert", "2"]])
def test_one_expert_as_a_timm_model(run, tmp_path, flags):
    export.main(["--run", str(run.path), "--output", str(tmp_path / "out"), "--timm", *flags])
    chosen = 2 if flags else best_expert(results(3))
    x = image_batch(load(run))
    with torch.no_grad():
        expected = load(run)(x).expert_logits[:, chosen]
        plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert torch.equal(plain(x), expected)
        assert torch.equal(stock(x).logits, expected)
    assert type(stock).__name__ == "TimmWrapperForImageClassification"
    assert plain.pretrained_cfg["label_names"] == NAMES
    assert [stock.config.id2label[c] for c in range(4)] == NAMES
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"It is expert {chosen}, " in text
    assert ("chosen by hand" if flags else "the one with the best recorded top-1") in text
    assert "import ecl_hf" not in text


def test_timm_model_sees_the_same_pixels(run, tmp_path):
    export.main(["--run", str(run.path), "--output", str(tmp_path / "out"), "--timm"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    ours = pipeline("image-classification", model=load(run, experts=[1]), image_processor=str(run.model))
    theirs = pipeline("image-classification", model=str(tmp_path / "out"))
    assert ours(picture) == theirs(picture)


@pytest.mark.slow
def test_timm_export_needs_nothing_of_the_package(run, tmp_path):
    export.main(["--run", str(run.path), "--output", str(tmp_path / "out"), "--timm"])
    code = (
        "import sys, torch, timm\nsys.modules['ecl_hf'] = None\n"
        "model = timm.create_model('local-dir:out', pretrained=True)\nprint(model.num_classes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "4"


def test_cifar_resnets_say_what_to_import(tmp_path, capsys):
    run = make_run(tmp_path / "run", "resnet20_cifar", num_experts=2)
    export.main(["--run", str(run.path), "--output", str(tmp_path / "out"), "--timm"])
    assert "`import ecl_hf` before loading it" in capsys.readouterr().out
    assert "timm does not know the architecture `resnet20_cifar`" in (tmp_path / "out" / "README.md").read_text()
    x = image_batch(load(run))
    with torch.no_grad():
        plain = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(plain(x), load(run)(x).expert_logits[:, 1])


def test_without_results_the_first_expert_is_exported_and_the_card_says_so(run, tmp_path):
    export.main(["--model", str(run.model), "--output", str(tmp_path / "out"), "--timm"])
    assert "It is expert 0; no test results were recorded" in (tmp_path / "out" / "README.md").read_text()


def test_cosine_classifier_is_no_timm_model(tmp_path):
    run = make_run(tmp_path / "run", "resnet20_cifar", classifier="cosine")
    with pytest.raises(SystemExit, match="cosine"):
        export.main(["--run", str(run.path), "--output", str(tmp_path / "out"), "--timm"])
    assert not (tmp_path / "out").exists()


# --- ONNX ---


@pytest.mark.parametrize("flags", [pytest.param([], marks=pytest.mark.slow), ["--expert", "1"]])
def test_onnx(run, tmp_path, flags):
    export.main(["--run", str(run.path), "--output", str(tmp_path / "out"), "--onnx", *flags])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    model = load(run, experts=[1] if flags else None)
    for batch in (1, 5):
        x = image_batch(model, batch)
        (logits,) = session.run(["logits"], {"pixel_values": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x).logits, rtol=1e-4, atol=1e-4)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(saved["id2label"].values()) == NAMES


# --- bad input ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out"], "give either --run or --model"),
        (["--run", "r", "--model", "m", "--output", "out"], "give either --run or --model"),
        (["--run", "r"], "give --output, --push or both"),
        (["--run", "r", "--push"], "--push needs --repo_id"),
        (["--run", "r", "--output", "out", "--onnx", "--timm"], "--onnx"),
        (["--run", "r", "--output", "out", "--expert", "1"], "--expert goes with"),
    ],
)
def test_flags_that_do_not_fit(flags, message, capsys):
    with pytest.raises(SystemExit):
        export.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda r: r["test"]["plain"]["experts"].pop(), [], r"are those of 2 expert\(s\), but .* has 3"),
        (lambda r: r["test"]["plain"]["experts"].pop(), ["--timm"], r"are those of 2 expert\(s\), but .* has 3"),
        (lambda r: r.update(class_counts=[9] * 7), [], r"are those of \d+ classes, but .* has \d+"),
        (lambda r: r["test"].pop("flip"), ["--timm"], "lacks something that the card says: KeyError"),
        (lambda r: r.pop("machine"), [], "lacks something that the card says: .*machine"),
        (lambda r: r["recipe"].update(model="x"), [], "lacks something that the card says"),
        (lambda r: r["recipe"]["data"].update(source=7), [], "lacks something that the card says: TypeError"),
    ],
)
def test_results_of_another_model_or_kind_are_refused(run, tmp_path, change, flags, message):
    recorded = results(3)
    change(recorded)
    (tmp_path / "results.json").write_text(json.dumps(recorded))
    given = ["--model", str(run.model), "--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        export.main([*given, *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("way", "part"),
    [
        ("plain", {"experts": [1, 2, 3]}),
        ("plain", {"experts": []}),
        ("plain", {"experts": [{"top1": 0.5}, {"top1": None}, {"top1": 0.5}]}),
        ("plain", {"experts": [{"top1": 0.5}, {"top1": "x"}, {"top1": 0.5}]}),
        ("plain", {"experts": [{"top1": 0.5}, {"top1": float("nan")}, {"top1": 0.5}]}),
        ("plain", {"ensemble": {"top1": 0.5, "ece": [1]}}),
        ("flip", {"ensemble": []}),
        ("flip", {"experts": None}),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--timm"]])
def test_scores_that_are_none_are_refused(way, part, flags, run, tmp_path):
    recorded = results(3)
    recorded["test"][way] = recorded["test"][way] | part
    (tmp_path / "results.json").write_text(json.dumps(recorded))
    given = ["--model", str(run.model), "--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=rf"results\.json is no results file of a run: test\.{way}"):
        export.main([*given, *flags])


def test_what_is_not_there_is_named(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="nowhere holds no model"):
        export.main(["--run", "nowhere", "--output", str(out)])
    with pytest.raises(SystemExit, match=r"experts=\[7\] must be a list of different experts out of 0..2"):
        export.main(["--run", str(run.path), "--output", str(out), "--timm", "--expert", "7"])
    (tmp_path / "other.json").write_text('{"top1": 1}')
    with pytest.raises(SystemExit, match=r"other\.json is no results file"):
        export.main(["--run", str(run.path), "--output", str(out), "--results", str(tmp_path / "other.json")])
    for text in ("7", "[]", '{"test": {"plain": {"experts": 3}}, "recipe": {"data": {}}}', "[" * 100_000):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(SystemExit, match=r"^error: .*other\.json (holds|is)"):
            export.main(["--run", str(run.path), "--output", str(out), "--results", str(tmp_path / "other.json")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json"]
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is not an empty directory"):
        export.main(["--run", str(run.path), "--output", str(out)])
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_run_folder_has_the_full_card(tmp_path):
    recipe = str(ROOT / "training" / "recipes" / "quickstart.yaml")
    flags = ["--recipe", recipe, "--output_dir", str(tmp_path / "run"), "--method", "ce", "--train.max_steps", "1"]
    train.main([*flags, "--model.architecture", "resnet20_cifar", "--model.image_size", "8"])
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())
    assert f"| expert 0 | no | {100 * recorded['test']['plain']['ensemble']['top1']:.1f} |" in text
