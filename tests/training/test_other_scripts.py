"""The scripts that come after training: classify pictures, test a model."""

import csv
import json
import os
import re
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import datasets
import evaluate
import numpy as np
import predict
import pytest
import torch
import weigh
import yaml
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file, save_file
from train import main as train

from ecl_hf import ECLForImageClassification
from ecl_hf.data.loaders import evaluation_loader
from ecl_hf.data.longtailed import load_longtailed
from ecl_hf.data.pictures import BrokenPictureError
from ecl_hf.data.views import evaluation_view
from ecl_hf.losses import transfer_weights
from ecl_hf.runs.checkpoints import seal
from ecl_hf.runs.folder import RunFolder
from ecl_hf.runs.recipe import Recipe

FLAGS = (
    "--data.source digits --data.max_count 20 --data.imbalance_factor 5 --data.horizontal_flip false "
    "--model.architecture resnet20_cifar --model.image_size 8 --batch_size 16 --epochs 1"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = train([*FLAGS.split(), "--method=fld", f"--output_dir={tmp_path_factory.mktemp('run') / 'run'}"])
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return folder


def test_test_pictures_go_through_the_pipeline(run, capsys):
    answers = predict.main([f"--run={run}", "--how_many=5", "--top_k=3"])
    data = load_longtailed(Recipe.from_file(run / "recipe.yaml").data)
    model = ECLForImageClassification.from_pretrained(run / "model")
    view = evaluation_view(model.config.pretrained_cfg)
    printed = capsys.readouterr().out
    for row, best in zip(np.linspace(0, len(data.test) - 1, 5).astype(int), answers, strict=True):
        with torch.no_grad():
            probabilities = model(view(data.test[int(row)]["image"].convert("RGB"))[None]).logits.softmax(-1)[0]
        top = probabilities.topk(3)
        assert [answer["label"] for answer in best] == [str(int(c)) for c in top.indices]
        assert [answer["score"] for answer in best] == pytest.approx(top.values.tolist(), abs=1e-5)
        assert best[0]["label"] in printed


def test_a_broken_test_picture_is_listed_and_none_comes_twice(run, capsys, monkeypatch):
    found, original = load_longtailed(Recipe.from_file(run / "recipe.yaml").data), predict.decode
    few = replace(found, test=found.test.select(range(4)))
    monkeypatch.setattr(predict, "load_longtailed", lambda _: few)

    def decode(record, name, *more):
        if name == "test row 2":
            raise BrokenPictureError(f"{name}: empty file")
        return original(record, name, *more)

    monkeypatch.setattr(predict, "decode", decode)
    assert len(predict.main([f"--run={run}", "--how_many=100"])) == 3
    assert "1 pictures could not be decoded:\ntest row 2: empty file" in capsys.readouterr().out


@pytest.mark.parametrize("script", [evaluate, predict, weigh])
def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = ["--output=new"] if script is weigh else []
    with pytest.raises(SystemExit, match=r"^error: nowhere holds no model; is it the folder of a finished run"):
        script.main(["--run=nowhere", *output])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_for_answers_is_named_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict.main(["--model=nowhere", "x.png", f"--output={tmp_path / 'missing' / 'answers.csv'}"])
    assert f"output: there is no directory {tmp_path / 'missing'}" in capsys.readouterr().err


def test_picture_files_of_any_mode(run, tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.fromarray(np.full((9, 7), 200, np.uint8)).convert(mode).save(tmp_path / f"{mode}.png")
    files = [str(tmp_path / f"{mode}.png") for mode in ("L", "RGBA", "P")]
    answers = predict.main([f"--model={run / 'model'}", *files])
    assert len(answers) == 3
    assert answers[0] == answers[2]


def test_a_long_path_does_not_run_into_the_answer(run, tmp_path, capsys):
    files = [tmp_path / f"{'long' * 20}.png", tmp_path / "a.png"]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    answers = predict.main([f"--run={run}", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    for file, [best, *_] in zip(files, answers, strict=True):
        assert any(re.fullmatch(rf"\S*{file.name}  +{best['label']} \d\.\d\d.*", line) for line in lines)


def test_flip_and_disagreement_on_request(run, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for name, picture in (("a", pixels), ("b", pixels[:, ::-1])):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    flags = [f"--model={run / 'model'}", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--disagreement"]
    plain, flipped = predict.main(flags), predict.main([*flags, "--flip"])
    assert flipped[0][0]["score"] == pytest.approx(flipped[1][0]["score"], abs=1e-5)
    assert plain[0][0]["score"] != pytest.approx(plain[1][0]["score"], abs=1e-5)
    assert f"disagreement {flipped[0][0]['disagreement']:.3f}" in capsys.readouterr().out


def test_large_pictures_and_inputs_go_a_few_at_a_time(run, monkeypatch):
    alive, sizes, decoded, forward = [], [], predict.decode, ECLForImageClassification.forward

    def watched_decode(*args):
        image = decoded(*args)
        alive.append(weakref.ref(image))
        return image

    def watched_forward(model, pixel_values, **kwargs):
        sizes.append((len(pixel_values), sum(image() is not None for image in alive)))
        return forward(model, pixel_values, **kwargs)

    monkeypatch.setattr(predict, "decode", watched_decode)
    monkeypatch.setattr(ECLForImageClassification, "forward", watched_forward)
    monkeypatch.setattr("ecl_hf.data.loaders.BATCH_PIXELS", 3 * 8 * 8 + 63)
    assert len(predict.main([f"--run={run}", "--how_many=7", "--estimate_prior"])) == 7
    assert [batch for batch, _ in sizes] == [3, 3, 1, 3, 3, 1]
    assert max(images for _, images in sizes) <= 2


@pytest.mark.parametrize("flag", ["--top_k=0", "--how_many=0", "--top_k=-1"])
def test_number_of_answers_is_positive(run, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        predict.main([f"--run={run}", "--disagreement", flag])
    assert flag.split("=")[0].removeprefix("--") in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content"), [("missing.png", None), ("text.png", "not a picture")])
def test_unreadable_picture_is_named(run, tmp_path, name, content):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=name):
        predict.main([f"--run={run}", str(tmp_path / name)])


def test_folders_and_patterns_are_answered_in_a_file_and_broken_pictures_listed(run, tmp_path, capsys):
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    for name, grey in (("a.png", 10), ("b.png", 120), ("c.PNG", 250)):
        Image.new("L", (9, 9), grey).save(folder / name, "png")
    (folder / "broken.png").write_text("not a picture")
    (folder / "notes.txt").write_text("not looked at")
    flags = [f"--model={run / 'model'}", "--top_k=2"]
    answers = predict.main([*flags, str(tmp_path / "pictures"), f"--output={tmp_path / 'a.csv'}"])
    assert "1 pictures could not be decoded:\ndeep/broken.png" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.png", "c.PNG"]
    for row, best in zip(rows, answers, strict=True):
        assert [row["class_1"], row["class_2"]] == [answer["label"] for answer in best]
        assert float(row["confidence_2"]) == pytest.approx(best[1]["score"], abs=1e-6)
        assert float(row["disagreement"]) == pytest.approx(best[0]["disagreement"], abs=1e-6)
    predict.main([*flags, str(tmp_path / "**" / "[ab].png"), f"--output={tmp_path / 'a.json'}"])
    entries = json.loads((tmp_path / "a.json").read_text())
    assert [Path(entry["path"]).name for entry in entries] == ["a.png", "b.png"]
    assert entries[0]["classes"][0]["label"] == answers[0][0]["label"]
    with pytest.raises(SystemExit, match="nothing"):
        predict.main([*flags, str(tmp_path / "nothing" / "*.png")])


def test_answers_hold_nothing_that_a_spreadsheet_computes(tmp_path):
    names = ["=1+1.png", "+x.png", "-1+1|x.png", "@x.png", "\t=1.png", "a\r=1.png", "plain.png"]
    answers = [[{"label": "=HYPERLINK(1)", "score": 1.0, "disagreement": -0.5}] for _ in names]
    predict.write_answers(tmp_path / "a.csv", names, answers)
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [*(f"'{name}" for name in names[:-2]), "a\n=1.png", "plain.png"]
    assert {row["class_1"] for row in rows} == {"'=HYPERLINK(1)"}
    assert {row["disagreement"] for row in rows} == {"-0.500000"}


def test_picture_whose_name_is_no_text_has_one_in_the_answers(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("L", (9, 9)).save(file)
    [(name, _)] = predict.readable([file], [])
    assert name == str(tmp_path / r"caf\xe9.png")


def test_estimated_frequencies_are_those_that_the_answers_carry(run, tmp_path, capsys):
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    answers = predict.main([f"--model={run / 'model'}", str(tmp_path), "--estimate_prior", "--top_k=10"])
    means = {str(c): 0.0 for c in range(10)}
    for best in answers:
        for answer in best:
            means[answer["label"]] += answer["score"] / len(answers)
    printed = re.search("frequencies: (.*)", capsys.readouterr().out)[1]
    for label, percentage in re.findall(r"(\d) ([\d.]+) %", printed):  # at its end, EM's E step keeps the frequencies
        assert 100 * means[label] == pytest.approx(float(percentage), abs=0.5)


def test_evaluation_repeats_the_results_of_the_run(run, tmp_path):
    evaluate.main([f"--model={run / 'model'}", f"--recipe={run / 'recipe.yaml'}", f"--output={tmp_path / 'test.json'}"])
    ours, theirs = (json.loads(path.read_text()) for path in (tmp_path / "test.json", run / "results.json"))
    for key in ("test", "test_images", "class_counts", "class_names", "parameters", "macs"):
        assert ours[key] == theirs[key]


def test_run_whose_method_had_more_settings_is_predicted_and_evaluated(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    recipe = old / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("loss:\n", "loss:\n  queue_size: 1024\n"))
    assert len(predict.main([f"--run={old}", "--how_many=2"])) == 2
    assert evaluate.main([f"--run={old}"])["test_images"] == 400


def test_evaluation_of_a_run_writes_tables_and_arrays(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)  # as where only what the package needs is installed
    results = evaluate.main([f"--run={run}", "--landscape_images=6"])
    written = json.loads((run / "evaluation.json").read_text())
    assert written["test"] == json.loads((run / "results.json").read_text())["test"] == results["test"]
    assert written["images_per_second"] > 0
    for way in ("plain", "flip"):
        ensemble = written["test"][way]["ensemble"]
        table = written["reliability"][way]["ensemble"]
        bins = zip(table["share"], table["confidence"], table["accuracy"], strict=True)
        assert ensemble["ece"] == pytest.approx(sum(s * abs(a - c) for s, c, a in bins if s))
    uniform = next(row for row in written["shifted"] if row["direction"] == "uniform")
    assert uniform["top1"] == pytest.approx(written["test"]["plain"]["ensemble"]["top1"])
    at_zero = written["posthoc"]["taus"].index(0.0)
    assert written["posthoc"]["ensemble"][at_zero] == pytest.approx(uniform["top1"])
    assert [curve[at_zero] for curve in written["posthoc"]["experts"]] == pytest.approx(
        [expert["top1"] for expert in written["test"]["plain"]["experts"]]
    )
    with np.load(run / "evaluation.npz") as arrays:
        assert arrays["confusion"].sum() == written["test_images"] == 400
        assert arrays["class_accuracy_plain"].shape == (4, 10)
        assert arrays["class_accuracy_plain"][0] == pytest.approx(np.diag(arrays["confusion"]) / 40)
        assert arrays["class_accuracy_flip"].mean(1)[1:] == pytest.approx(
            [expert["top1"] for expert in written["test"]["flip"]["experts"]]
        )
        assert arrays["feature_distance"].shape == (3, 10)
        assert len(arrays["sampled_features"]) == 400
        assert arrays["sampled_labels"].tolist() == sorted(arrays["sampled_labels"].tolist())
        assert np.isfinite(arrays["transfer_value"]).all()
        assert "transfer_weight" not in arrays  # no reference heads
        assert arrays["landscape_loss"].shape == arrays["landscape_accuracy"].shape == (5, 21)
        assert len(set(arrays["landscape_loss"][:, 10].round(9))) == 1  # magnitude 0


@pytest.mark.slow
def test_transfer_of_a_run_reads_the_reference_heads_of_its_checkpoint(tmp_path):
    flags = [*FLAGS.split(), "--method=bkt", "--train.max_steps=2", f"--output_dir={tmp_path / 'run'}"]
    folder = train(flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    evaluate.main([f"--run={folder}"])
    model = ECLForImageClassification.from_pretrained(folder / "model")
    state = load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")
    data = load_longtailed(Recipe.from_file(folder / "recipe.yaml").data)
    batches = list(evaluation_loader(data.train, evaluation_view(model.config.pretrained_cfg), 64))
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        output = model(images, output_features=True)
        ref = torch.stack(
            [
                output.features[:, k] @ state[f"references.{k}.weight"].T + state[f"references.{k}.bias"]
                for k in range(3)
            ]
        )
    weights = transfer_weights(ref, output.expert_logits.transpose(0, 1), labels).mean(0)
    with np.load(folder / "evaluation.npz") as arrays:
        for c in range(10):
            assert arrays["transfer_weight"][c] == pytest.approx(weights[labels == c].mean().item(), rel=1e-4)
        assert "landscape_loss" not in arrays


def cut_weights(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_weights(checkpoint):
    save_file({"references.0.weight": torch.ones(3)}, checkpoint / "model.safetensors")
    seal(checkpoint)


def no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_weights, "model.safetensors is damaged"),
        (other_weights, "model.safetensors does not hold this model's reference heads"),
        (no_weights, "model.safetensors is no regular file"),
        (shutil.rmtree, "no weights of the reference heads in"),
    ],
)
def test_damaged_checkpoint_has_no_reference_heads(harm, said, run, tmp_path):
    copy = RunFolder(shutil.copytree(run, tmp_path / "run"))
    harm(copy.newest_checkpoint())
    with pytest.raises((OSError, ValueError), match=said):
        evaluate.reference_heads(copy, ECLForImageClassification.from_pretrained(copy.model))


def test_evaluation_needs_a_run_or_a_model_with_recipe(run, capsys):
    for flags in ([], [f"--model={run / 'model'}"], [f"--run={run}", "--batch_size=0"]):
        with pytest.raises(SystemExit):
            evaluate.main(flags)
    assert "--model with --recipe" in capsys.readouterr().err
    for other in ("--recipe=quickstart", f"--model={run / 'model'}"):  # of two recipes one would count silently
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([f"--run={run}", other])
        assert "give either --run, or --model with --recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [["--recipe=/nope.yaml", "--model=/nope"], ["--recipe={recipe}", "--model={model}", "--output=/nope/x.json"]],
)
def test_evaluation_names_missing_files(run, flags):
    with pytest.raises(SystemExit, match="nope"):
        evaluate.main([flag.format(recipe=run / "recipe.yaml", model=run / "model") for flag in flags])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", "no json", "is no JSON file of this script"),
        ("x.json", "[1]", "is no JSON file of this script"),
        ("results.json", '{"test": {}, "recipe": {}}', "holds the results of a training; choose another file"),
        ("x.npz", None, "must be a .json file"),
    ],
)
def test_output_that_can_not_be_written_is_refused_before_the_test(name, content, said, run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_longtailed", lambda _: pytest.fail("work was begun"))
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=said):
        evaluate.main([f"--run={run}", f"--output={tmp_path / name}"])


@pytest.mark.parametrize("good", [0, 1])
def test_tiny_test_split(good, run, tmp_path, monkeypatch):
    """A single picture can be tested; none at all is told."""
    pictures = load_longtailed(Recipe.from_file(run / "recipe.yaml").data)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["on_error"] = "skip"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"image": {"bytes": b"nothing", "path": None}, "label": 1}] * 2
    rows += [{"image": image, "label": 0} for image in pictures.test["image"][:good]]
    monkeypatch.setattr(
        evaluate,
        "load_longtailed",
        lambda _: replace(pictures, test=datasets.Dataset.from_list(rows, pictures.test.features)),
    )
    flags = [f"--model={run / 'model'}", f"--recipe={tmp_path / 'recipe.yaml'}", f"--output={tmp_path / 'x.json'}"]
    if good:
        assert evaluate.main(flags)["test_images"] == good
        with np.load(tmp_path / "x.npz") as arrays:
            assert arrays["confusion"].sum() == good
            assert len(arrays["sampled_features"]) == good
    else:
        with pytest.raises(SystemExit, match="none of 2 test pictures can be decoded"):
            evaluate.main(flags)


def test_outputs_take_the_place_of_links(tmp_path):
    """Those of a stranger's run folder could lead to any file."""
    (tmp_path / "run").mkdir()
    results = {"classes": [{"accuracy": 1.0, "test_images": 1}], "class_names": ["a"]}
    linked = [
        f"{dot}evaluation{kind}{end}"
        for kind in (".json", ".npz", ".csv")
        for dot, end in ((".", ".partial"), ("", ""))
    ]
    for name in [*linked, ".evaluation.partial.npz"]:
        (tmp_path / name).write_text("years of work")
        (tmp_path / "run" / name).symlink_to(tmp_path / name)
    evaluate.write(tmp_path / "run" / "evaluation.json", results, {"x": np.arange(3)})
    assert {(tmp_path / name).read_text() for name in linked} == {"years of work"}
    assert (tmp_path / ".evaluation.partial.npz").read_text() == "years of work"
    with np.load(tmp_path / "run" / "evaluation.npz") as arrays:
        assert arrays["x"].tolist() == [0, 1, 2]


def test_missing_model_or_run_is_named(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(SystemExit, match="nope"):
        predict.main(["--model=/nope", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match="nope"):
        predict.main(["--run=/nope"])


def test_evaluation_refuses_other_classes(run, tmp_path):
    config = json.loads((run / "model" / "config.json").read_text())
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"id2label": config["id2label"] | {"3": "three"}})
    )
    with pytest.raises(SystemExit, match="'three' against '3'"):
        evaluate.main([f"--model={tmp_path / 'model'}", f"--recipe={run / 'recipe.yaml'}"])
