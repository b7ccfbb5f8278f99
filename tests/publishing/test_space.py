"""The page to try a model: its folder, its answers, and how it looks in a browser."""

import importlib.util
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace

import export
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.publishing import space
from ecl_hf.publishing.space import Classifier

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAMES = ["red fox", "wolf", "<b>lynx</b>"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("pictures") / "grey.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def folder(picture, tmp_path_factory):
    torch.manual_seed(0)
    config = ECLConfig(
        architecture="test_resnet", num_experts=2, class_counts=[300, 60, 2], id2label=dict(enumerate(NAMES))
    )
    root = tmp_path_factory.mktemp("space")
    ECLForImageClassification(config).save_pretrained(root / "model")
    export.main([f"--model={root / 'model'}", f"--space={root / 'demo'}", f"--examples={picture}"])
    return root / "demo"


def test_the_folder_is_a_space(folder):
    card = huggingface_hub.RepoCard.load(folder / "README.md", repo_type="space")
    assert card.data.to_dict()["sdk"] == "gradio"
    assert (folder / card.data.to_dict()["app_file"]).is_file()
    assert "300 in the largest class, 2 in the smallest" in " ".join(card.text.split())
    assert [path.name for path in (folder / "examples").iterdir()] == ["0.png"]
    assert "ecl-hf" in (folder / "requirements.txt").read_text()


def test_answers_are_those_of_the_model(folder, picture, tmp_path):
    classifier, image = Classifier(folder / "model"), Image.open(picture)
    model = ECLForImageClassification.from_pretrained(folder / "model")
    pixels = AutoImageProcessor.from_pretrained(folder / "model")(image.convert("RGB"), return_tensors="pt")[
        "pixel_values"
    ]
    (tmp_path / "prior.csv").write_text('class,frequency\nwolf,3\n"<b>lynx</b>",1\n')
    for strength, file, prior in ((0, None, None), (1, None, [300, 60, 2]), (0, tmp_path / "prior.csv", [0, 3, 1])):
        with torch.no_grad():
            output = model(pixels, target_prior=prior)
        scores, rows, differ = classifier.classify(image, 5, False, classifier.prior(strength, file))
        expected = output.logits.softmax(-1)[0].sort(descending=True)
        assert list(scores.values()) == pytest.approx(expected.values.tolist(), abs=1e-6)
        assert list(scores) == [NAMES[c] for c in expected.indices]
        assert [row[0] for row in rows] == ["expert 0", "expert 1"]
        assert differ == pytest.approx(model(pixels).disagreement[0].item(), abs=1e-6)
    assert rows[0][1] != "red fox"  # which is not there, by the file


def test_classes_are_equally_common_whatever_prior_the_logits_carry(folder, tmp_path):
    model = ECLForImageClassification.from_pretrained(folder / "model")
    model.config.logit_prior = "train"
    model.save_pretrained(tmp_path)
    classifier = Classifier(tmp_path)
    logits = torch.tensor([[1.0, 0.5, 0.0]]) + torch.tensor([300, 60, 2]).log()
    output = classifier.model._run_experts
    classifier.model._run_experts = lambda pixels: (output(pixels)[0], logits[:, None].expand(-1, 2, -1))
    scores, *_ = classifier.classify(Image.new("RGB", (9, 9)), 3, False, classifier.prior(0, None))
    expected = torch.tensor([1.0, 0.5, 0.0]).softmax(0)
    assert [scores[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("text", "said"),
    [("bear,1", "line 1 of x.csv: 'bear' is no class"), ("wolf,1\nwolf,2", "line 2"), ("wolf,-1", "0 or more"),
     ("wolf", "0 or more"), ("wolf,nan", "0 or more"), ("wolf,0", "no class a frequency above 0"), ("", "no class")],
)  # fmt: skip
def test_a_wrong_file_of_frequencies_is_named(folder, tmp_path, text, said):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        Classifier(folder / "model").prior(0, str(tmp_path / "x.csv"))


@pytest.mark.parametrize("content", [b"caf\xe9", b'"' + b"x" * 200_000, b"wolf,1\n" * 1_000_000])
def test_a_file_of_a_visitor_that_is_no_table_is_named(folder, tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.csv (is no|has)"):
        Classifier(folder / "model").prior(0, str(tmp_path / "x.csv"))


def test_a_picture_that_would_fill_the_memory_is_refused(folder):
    with pytest.raises(ValueError, match="1 x 300: a side is more than 100 times the other"):
        Classifier(folder / "model").classify(Image.new("RGB", (1, 300)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--output=x"], "goes with none of"), (["--push"], "--push needs"), (["--onnx"], "goes with none")],
)
def test_flags_that_do_not_fit(flags, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        export.main(["--model=m", "--space=s", *flags])
    assert said in capsys.readouterr().err


def test_an_example_that_is_no_picture_is_named(folder, tmp_path):
    (tmp_path / "no.png").write_text("nothing")
    with pytest.raises(SystemExit, match=r"no\.png is no picture"):
        export.main(
            [f"--model={folder / 'model'}", f"--space={tmp_path / 'demo'}", f"--examples={tmp_path / 'no.png'}"]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["no.png"]


def empty_png(width: int, height: int) -> bytes:
    """What says that it has so many pixels, and has none."""
    parts = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT")
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "of an unknown format"),
        (os.mkfifo, "no regular file"),
        (lambda file: file.write_bytes(empty_png(8, 8) + bytes(8)), "broken PNG"),
        (lambda file: file.write_bytes(empty_png(1, 30_000)), "a side is more than 100 times the other"),
        (lambda file: file.write_bytes(empty_png(60_000, 60_000)), "3600000000 pixels"),
    ],
    ids=["postscript", "pipe", "damaged", "thin", "bomb"],
)
def test_examples_are_read_as_carefully_as_other_pictures(make, said, tmp_path):
    make(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=rf"^example .*a\.jpg .*{said}"):
        space.copy_examples(tmp_path, [tmp_path / "a.jpg"])
    assert list((tmp_path / "examples").iterdir()) == []


def test_upload_makes_a_space(folder, tmp_path, monkeypatch):
    calls = {}

    def upload(_, **given):
        calls.update(given, files={path.name for path in Path(given["folder_path"]).iterdir()})
        return SimpleNamespace(repo_url="u", oid="o")

    monkeypatch.setattr(space.HfApi, "create_repo", lambda _, repo_id, **given: calls.update(given, made=repo_id))
    monkeypatch.setattr(space.HfApi, "upload_folder", upload)
    export.main([f"--model={folder / 'model'}", f"--space={tmp_path / 'demo'}", "--push", "--repo_id=me/demo"])
    assert (calls["made"], calls["repo_id"]) == ("me/demo", "me/demo")
    assert (calls["repo_type"], calls["space_sdk"]) == ("space", "gradio")
    assert {"app.py", "README.md", "model"} <= calls["files"]


@pytest.fixture
def page(folder, tmp_path):
    """Address of the running page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    log = tmp_path / "app.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=os.environ | settings, stdout=said, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio here: pip install 'ecl-hf[space]'")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: .ci/run installs Debian's, where it may")
def test_the_page_in_a_browser(page, picture, tmp_path):
    from gradio_client import Client, handle_file

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=20000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,900"]
    text = subprocess.run([CHROMIUM, *flags, page], capture_output=True, text=True, timeout=180, check=True).stdout
    for said in ("Long-tailed image classification", "Classify", "How common are the classes", "What each expert says"):
        assert said in text
    label, table, differ = Client(page, verbose=False).predict(
        handle_file(picture), 3, False, 0, None, api_name="/classify"
    )
    assert {entry["label"] for entry in label["confidences"]} == set(NAMES)
    assert len(table["data"]) == 2
    assert "nats" in differ
