"""Weighing the experts by unlabelled pictures, from the command to the written model."""

import json
import shutil

import evaluate
import numpy as np
import pytest
import torch
import weigh
from accelerate.state import AcceleratorState, PartialState
from jsonargparse import Namespace
from PIL import Image
from torch.testing import assert_close
from train import main as train

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.data.views import evaluation_view

FLAGS = (
    "--data.source digits --data.max_count 20 --data.imbalance_factor 5 --data.horizontal_flip false --method sade "
    "--model.architecture resnet20_cifar --model.image_size 8 --batch_size 16 --epochs 1 --optim.lr 0.1"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = train([*FLAGS.split(), f"--output_dir={tmp_path_factory.mktemp('run') / 'run'}"])
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return folder


@pytest.mark.slow
def test_the_test_pictures_of_a_run(run, tmp_path, capsys):
    flags = [f"--run={run}", "--epochs=2", "--lr=2"]
    weights = weigh.main([*flags, f"--output={tmp_path / 'weighted'}"])
    assert "400 test pictures, the split test of digits, without labels" in capsys.readouterr().out
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    assert max(weights) - min(weights) > 1e-3
    before = ECLForImageClassification.from_pretrained(run / "model").eval()
    model = ECLForImageClassification.from_pretrained(tmp_path / "weighted").eval()
    assert model.config.aggregation == weights
    assert model.config.weighted_on == "400 test pictures, the split test of digits"
    pixels = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = torch.einsum("k,bkc->bc", torch.tensor(weights), before(pixels).expert_logits)
        assert_close(model(pixels).logits, expected)
    assert "transductive" in (tmp_path / "weighted" / "README.md").read_text()
    assert weigh.main([*flags, f"--output={tmp_path / 'again'}"]) == weights
    output = tmp_path / "test.json"
    evaluate.main([f"--model={tmp_path / 'weighted'}", f"--recipe={run / 'recipe.yaml'}", f"--output={output}"])
    assert json.loads(output.read_text())["weighted_on"] == model.config.weighted_on
    assert "weights were found on 400 test pictures" in capsys.readouterr().out


def test_own_pictures_are_called_by_their_folder(tmp_path, monkeypatch):
    for n in range(14):
        file = tmp_path / "patient 7" / "my foxes" / f"class {n % 2}" / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (9 * n, 0, 0)).save(file)
    monkeypatch.chdir(file.parents[1])
    for path in (str(file.parents[1]), "."):
        (tmp_path / "recipe.yaml").write_text(f"data: {{path: '{path}', profile: as_is, test_fraction: 0.28}}")
        _, what = weigh.unlabelled(Namespace(images=[], run=tmp_path))
        assert what == "4 test pictures, a held-out part of the split train of my foxes"


def test_views_that_do_not_differ_weigh_all_experts_alike(run, tmp_path, monkeypatch):
    monkeypatch.setattr(weigh, "agreement_view", lambda config, _: evaluation_view(config))
    assert weigh.main([f"--run={run}", f"--output={tmp_path / 'out'}", "--epochs=1"]) == pytest.approx(
        [1 / 3] * 3, abs=1e-5
    )


def test_picture_files(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 256, (9, 9), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{n}.png")
    (tmp_path / "pictures" / "broken.png").write_text("not a picture")
    weigh.main([f"--model={run / 'model'}", str(tmp_path / "pictures"), f"--output={tmp_path / 'out'}", "--flip=false"])
    config = ECLConfig.from_pretrained(tmp_path / "out")
    assert config.weighted_on == "6 pictures; 1 of them could not be decoded"
    one = ECLForImageClassification.from_pretrained(tmp_path / "out", experts=[1])
    assert one.config.aggregation == [config.aggregation[1]]


@pytest.mark.parametrize(
    ("aggregation", "experts", "said"),
    [
        ({"choices": 2, "width": 4, "threshold": 0.5}, 3, "a router"),
        ([[1.0] * 10] * 3, 3, "weights for each class"),
        ("mean", 1, "one expert"),
    ],
)
def test_experts_that_can_not_be_weighed(aggregation, experts, said, run, tmp_path):
    counts = list(range(20, 10, -1))
    config = ECLConfig(architecture="resnet20_cifar", num_experts=experts, class_counts=counts, aggregation=aggregation)
    ECLForImageClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=said):
        weigh.main([f"--model={tmp_path / 'model'}", str(run), f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_in_the_way_is_named(run, tmp_path, capsys):
    for flags in ([], [f"--model={run / 'model'}"], [f"--model={run / 'model'}", f"--run={run}", "x.png"]):
        with pytest.raises(SystemExit, match="2"):
            weigh.main([*flags, f"--output={tmp_path / 'out'}"])
    assert "give either --run or --model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nope"):
        weigh.main([f"--run={run}", "/nope.png", f"--output={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match="not an empty directory"):
        weigh.main([f"--run={run}", f"--output={run}"])
    shutil.copytree(run / "model", tmp_path / "model")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(SystemExit, match="no picture"):
        weigh.main([f"--model={tmp_path / 'model'}", str(tmp_path / "text.png"), f"--output={tmp_path / 'out'}"])
