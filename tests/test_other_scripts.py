"""The scripts that come after training: classify pictures, render a comparison."""

import csv
import json
import shutil
import statistics
from pathlib import Path

import evaluate
import numpy as np
import predict
import pytest
import reproduce
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from train import main as train

from ecl_hf import ECLForImageClassification
from ecl_hf.data import load_longtailed
from ecl_hf.recipe import Recipe
from ecl_hf.views import evaluation_view

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


def test_picture_files_of_any_mode(run, tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.fromarray(np.full((9, 7), 200, np.uint8)).convert(mode).save(tmp_path / f"{mode}.png")
    files = [str(tmp_path / f"{mode}.png") for mode in ("L", "RGBA", "P")]
    answers = predict.main([f"--model={run / 'model'}", *files])
    assert len(answers) == 3
    assert answers[0] == answers[2]


@pytest.mark.parametrize(("name", "content"), [("missing.png", None), ("text.png", "not a picture")])
def test_unreadable_picture_is_named(run, tmp_path, name, content):
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=name):
        predict.main([f"--run={run}", str(tmp_path / name)])


def test_evaluation_repeats_the_results_of_the_run(run, tmp_path):
    evaluate.main([f"--model={run / 'model'}", f"--recipe={run / 'recipe.yaml'}", f"--output={tmp_path / 'test.json'}"])
    ours, theirs = (json.loads(path.read_text()) for path in (tmp_path / "test.json", run / "results.json"))
    for key in ("test", "test_images", "class_counts", "class_names", "parameters", "macs"):
        assert ours[key] == theirs[key]


def test_evaluation_into_a_run_keeps_what_is_said_of_the_training(run, tmp_path):
    before = json.loads((run / "results.json").read_text())
    output = shutil.copyfile(run / "results.json", tmp_path / "results.json")
    evaluate.main([f"--model={run / 'model'}", f"--recipe={run / 'recipe.yaml'}", f"--output={output}"])
    assert json.loads(output.read_text()) == before


@pytest.mark.parametrize(
    "flags",
    [["--recipe=/nope.yaml", "--model=/nope"], ["--recipe={recipe}", "--model={model}", "--output=/nope/x.json"]],
)
def test_evaluation_names_missing_files(run, flags):
    with pytest.raises(SystemExit, match="nope"):
        evaluate.main([flag.format(recipe=run / "recipe.yaml", model=run / "model") for flag in flags])


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


def test_comparison_runs_skips_and_renders(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("epochs: 1\n")
    argv = [f"--recipe={recipe}", f"--runs_dir={tmp_path / 'runs'}", f"--results_dir={tmp_path / 'results'}"]
    argv += ["--seeds", "0", "1", "--cells", "bc", "fail"]
    with pytest.raises(SystemExit):
        reproduce.main(argv)
    argv = [*argv[:-1], "ecl-sum", f"--flags={FLAGS}"]
    table = reproduce.main(argv)
    results = [json.loads((tmp_path / "results/tiny/bc" / f"seed{s}.json").read_text()) for s in (0, 1)]
    assert [result["seed"] for result in results] == [0, 1]
    assert results[0]["recipe"]["method"] == "bc"
    scores = [100 * result["test"]["plain"]["ensemble"]["top1"] for result in results]
    expected = f"{statistics.mean(scores):.1f} ± {abs(scores[0] - scores[1]) / 2**0.5:.1f}"
    with (tmp_path / "results/tiny/table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["top1"] == expected
    assert rows[0]["many"] == "none"
    assert [(row["method"], row["model"]) for row in rows if row["flip"] == "no"] == [
        ("bc", "single network"),
        ("ecl-sum", "ensemble"),
        ("ecl-sum", "one expert (mean)"),
    ]
    assert expected in table.read_text()
    assert "Not run: nothing." in table.read_text()

    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("model/*"))]
    reproduce.main(argv)  # everything is finished
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "runs").rglob("model/*"))]
    reproduce.main([*argv, "--seeds", "0", "2", "--render_only=true"])
    assert "Not run: bc seed 2, ecl-sum seed 2." in table.read_text()

    changed = tmp_path / "runs/tiny/bc/seed0/results.json"
    changed.write_text(json.dumps(results[0] | {"recipe": results[0]["recipe"] | {"epochs": 7}}))
    with pytest.raises(SystemExit, match=r"different recipes.*epochs"):
        reproduce.main([*argv, "--render_only=true"])
