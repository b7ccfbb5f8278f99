"""Publishing and loading over the wire: the tests' Hub counts the bytes, refuses, and breaks connections off."""

import json
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import pytest
import timm
import torch
import train
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from ecl_hf import ECLConfig, ECLForImageClassification
from ecl_hf.learning.config import ModelConfig
from ecl_hf.learning.initialise import initialise_model
from ecl_hf.methods import METHODS
from ecl_hf.publishing.hub import BackgroundUpload

ROOT = Path(__file__).parents[2]
NAMES = ["red fox", "wolf", "lynx", "otter"]
REPO = "owner/foxes"
CODE = {
    "aggregation.py",
    "backbones.py",
    "configuration_ecl.py",
    "files.py",
    "heads.py",
    "modeling_ecl.py",
    "repository.py",
}


def build(num_experts=3, architecture="test_resnet", seed=0):
    torch.manual_seed(seed)
    counts, names = [300, 60, 12, 2], dict(enumerate(NAMES))
    config = ECLConfig(architecture=architecture, num_experts=num_experts, class_counts=counts, id2label=names)
    model = ECLForImageClassification(config)
    with torch.no_grad():
        model.train()(torch.randn(8, *config.pretrained_cfg["input_size"]))
        for expert in model.experts:
            expert.head.weight.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def pushed(hub, model):
    model.push_to_hub(REPO)
    return model


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))


def logits(model, count=2):
    x = torch.randn(count, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x).expert_logits


def weight_files(num_experts):
    return {f"model-{k:05}-of-{num_experts:05}.safetensors" for k in range(1, num_experts + 1)}


# --- four ways to load ---


def test_files_of_a_repository(hub, pushed):
    names = set(HfApi().list_repo_files(REPO)) - {".gitattributes"}
    beside = {"README.md", "SHA256SUMS", "config.json", "model.safetensors.index.json"}
    assert names == weight_files(3) | CODE | beside
    assert HfApi().model_info(REPO).pipeline_tag == "image-classification"


@pytest.mark.slow
def test_four_ways_give_the_same_numbers(hub, pushed, tmp_path):
    loaded = [ECLForImageClassification.from_pretrained(REPO), AutoModelForImageClassification.from_pretrained(REPO)]
    for each in loaded:
        assert torch.equal(logits(each), logits(pushed))
    pixels = AutoImageProcessor.from_pretrained(REPO)(picture(), return_tensors="pt").pixel_values
    with torch.no_grad():
        scores = pushed(pixels).logits.softmax(-1)[0]
    expected = pipeline("image-classification", model=REPO)(picture())
    assert [answer["label"] for answer in expected] == [NAMES[c] for c in scores.argsort(descending=True)]
    assert [answer["score"] for answer in expected] == pytest.approx(scores.sort(descending=True).values.tolist())
    assert pipeline(model=REPO)(picture()) == expected  # the card names the task

    picture().save(tmp_path / "picture.png")
    code = (
        "import sys, json; sys.modules['ecl_hf'] = None\n"
        "from transformers import AutoModelForImageClassification, pipeline\n"
        f"answer = pipeline('image-classification', model='{REPO}', trust_remote_code=True)('picture.png')\n"
        f"model = AutoModelForImageClassification.from_pretrained('{REPO}', trust_remote_code=True, experts=[2])\n"
        "print(json.dumps([answer, len(model.experts), type(model).__module__]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=hub.environment(),
    )
    assert done.returncode == 0, done.stderr
    answer, experts, module = json.loads(done.stdout)
    assert answer == expected
    assert experts == 1
    assert module.startswith("transformers_modules.")


@pytest.mark.parametrize("chosen", [[1], [2, 0]])
def test_chosen_experts_download_their_files_only(hub, pushed, chosen):
    loaded = ECLForImageClassification.from_pretrained(REPO, experts=chosen)
    assert torch.equal(logits(loaded), logits(pushed)[:, chosen])
    weights = {name: n for name, n in hub.downloaded(REPO).items() if name.endswith(".safetensors")}
    assert weights.keys() == {f"model-{k + 1:05}-of-00003.safetensors" for k in chosen}
    whole = sum(parameter.nbytes for parameter in (*pushed.parameters(), *pushed.buffers()))
    assert sum(weights.values()) / whole == pytest.approx(len(chosen) / 3, rel=0.02)


def test_the_second_load_downloads_nothing(hub, pushed):
    ECLForImageClassification.from_pretrained(REPO)
    before = hub.downloaded(REPO)
    again = ECLForImageClassification.from_pretrained(REPO, experts=[0])
    offline = ECLForImageClassification.from_pretrained(REPO, local_files_only=True)
    assert hub.downloaded(REPO) == before
    assert torch.equal(logits(offline)[:, :1], logits(again))


def test_cache_directory_is_respected(hub, pushed, tmp_path):
    ECLForImageClassification.from_pretrained(REPO, experts=[0], cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").glob("models--owner--foxes/snapshots/*/model-00001-of-00003.safetensors"))
    with pytest.raises(OSError, match=r"connect|find"):
        ECLForImageClassification.from_pretrained(REPO, experts=[0], local_files_only=True)


def test_subfolder(hub, pushed, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    HfApi().upload_folder(repo_id=REPO, folder_path=tmp_path / "model", path_in_repo="inner/second")
    for choice in (None, [1]):
        loaded = ECLForImageClassification.from_pretrained(REPO, subfolder="inner/second", experts=choice)
        assert torch.equal(logits(loaded), logits(model)[:, choice or [0, 1, 2]])


# --- revisions ---


def test_two_pushes_are_two_revisions_and_the_older_one_still_loads(hub, pushed):
    first = HfApi().model_info(REPO).sha
    second = build(num_experts=1, seed=7)
    commit = second.push_to_hub(REPO, commit_message="one expert")
    names = {name for name in HfApi().list_repo_files(REPO) if "safetensors" in name}
    assert names == {"model.safetensors"}  # else loaders would mix two models
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO)), logits(second))
    for choice in (None, [2]):
        old = ECLForImageClassification.from_pretrained(REPO, revision=first, experts=choice)
        assert torch.equal(logits(old), logits(pushed)[:, choice or [0, 1, 2]])
    assert commit.oid != first
    third = build(num_experts=2, seed=8)
    third.push_to_hub(REPO)
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO)), logits(third))


def test_branches(hub, pushed):
    other = build(seed=5)
    other.push_to_hub(REPO, revision="next")
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO, revision="next")), logits(other))
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO)), logits(pushed))


def push_own_card():
    content = b"---\nlicense: mit\n---\nmy own words\n"
    HfApi().upload_file(path_or_fileobj=content, path_in_repo="README.md", repo_id=REPO)


def test_unchanged_push_makes_no_revision_and_the_repositorys_card_stays(hub, pushed):
    first = HfApi().model_info(REPO).sha
    pushed.push_to_hub(REPO)
    assert HfApi().model_info(REPO).sha == first
    push_own_card()
    build(seed=2).push_to_hub(REPO)
    assert "my own words" in ModelCard.load(REPO).text


def test_saving_with_push(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "foxes", push_to_hub=True, private=True)
    assert HfApi().model_info(REPO).private
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO)), logits(model))


def test_saving_with_push_to_a_branch_keeps_the_repositorys_card(hub, pushed, tmp_path):
    push_own_card()
    other = build(seed=4)
    other.save_pretrained(tmp_path / "foxes", push_to_hub=True, repo_id=REPO, revision="next")
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO)), logits(pushed))
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO, revision="next")), logits(other))
    other.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id=REPO)
    assert "my own words" in ModelCard.load(REPO).text
    (tmp_path / "again" / "README.md").write_text("---\nlicense: mit\n---\nnew words\n")
    other.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id=REPO)
    assert "new words" in ModelCard.load(REPO).text


def test_the_short_card_names_its_repository(hub, pushed):
    assert f'model="{REPO}"' in ModelCard.load(REPO).text
    assert f'from_pretrained("{REPO}", experts=[0])' in ModelCard.load(REPO).text


# --- who may read ---


def test_private_repository_needs_the_token(hub, model, tmp_path):
    model.push_to_hub(REPO, private=True)
    assert len(ECLForImageClassification.from_pretrained(REPO, experts=[0]).experts) == 1
    with pytest.raises(OSError, match="private repository, make sure to pass a token"):
        ECLForImageClassification.from_pretrained(REPO, token="hf_guest", cache_dir=tmp_path)


def test_gated_repository_says_where_to_ask(hub, pushed, tmp_path):
    HfApi().update_repo_settings(REPO, gated="manual")
    with pytest.raises(OSError, match="gated repo"):
        ECLForImageClassification.from_pretrained(REPO, token="hf_guest", cache_dir=tmp_path)


def test_a_repository_that_is_not_there_is_named(hub):
    with pytest.raises(OSError, match="owner/nothing is not a local folder"):
        ECLForImageClassification.from_pretrained("owner/nothing", experts=[0])


# --- faults ---


def test_interrupted_upload_is_repeated(hub, model):
    hub.cut("PUT", "^/upload/", times=2)
    hub.fail("PUT", "^/upload/", status=500)
    model.push_to_hub(REPO)
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO)), logits(model))


def test_interrupted_push_leaves_the_old_model(hub, pushed):
    hub.cut("PUT", "^/upload/", times=100)
    with pytest.raises(ConnectionError, match=rf"connection to the Hub failed \({REPO}\)"):
        build(seed=3).push_to_hub(REPO)
    hub.faults.clear()
    assert torch.equal(logits(ECLForImageClassification.from_pretrained(REPO)), logits(pushed))


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "hf auth login"),
        (403, "write permission"),
        (404, "check the repository's name"),
        (429, "wait some minutes"),
        (500, "try again later"),
        (503, "try again later"),
    ],
)
@pytest.mark.parametrize("path", ["/api/repos/create", "/commit/"])
def test_a_refused_push_says_what_to_do(hub, model, status, advice, path):
    hub.fail("POST", path, status=status, times=100)
    with pytest.raises(HfHubHTTPError, match=rf"{status}[\s\S]*Can't write to {REPO}: .*{advice}"):
        model.push_to_hub(REPO)


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "hf auth login"), (403, "access conditions"), (404, "name"), (429, "wait some"), (503, "try again later")],
)
@pytest.mark.parametrize("path", ["config.json", "model.safetensors.index.json", "model-00002"])
def test_a_refused_download_says_what_to_do(hub, pushed, status, advice, path):
    hub.fail("HEAD", path, status=status, times=100)
    with pytest.raises(OSError, match=rf"Can't read {REPO}: .*{advice}.* \(the Hub answered {status}\)"):
        ECLForImageClassification.from_pretrained(REPO, experts=[1])


@pytest.mark.parametrize("status", [429, 500])
def test_a_passing_refusal_of_a_download_is_waited_for(hub, pushed, status):
    hub.fail("HEAD", "model-00002", status=status)
    loaded = ECLForImageClassification.from_pretrained(REPO, experts=[1])
    assert torch.equal(logits(loaded), logits(pushed)[:, [1]])


def test_truncated_download_is_not_loaded(hub, pushed):
    hub.cut("GET", "model-00002", times=100)
    hub.cut("GET", "^/objects/", times=100)
    with pytest.raises(ConnectionError, match=rf"connection to the Hub failed \({REPO}\)"):
        ECLForImageClassification.from_pretrained(REPO, experts=[1])
    hub.faults.clear()
    loaded = ECLForImageClassification.from_pretrained(REPO, experts=[1])
    assert torch.equal(logits(loaded), logits(pushed)[:, [1]])


def test_no_connection_is_an_error_that_names_the_repository(hub, model, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("All connection attempts failed")  # stands for what the HTTP library raises

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ConnectionError, match=rf"connection to the Hub failed \({REPO}\): All connection"):
        model.push_to_hub(REPO)


# --- one expert for timm, and timm models as a start ---


def test_timm_repository(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--timm", "--expert", "1"]
    export.main([*flags, "--push", "--repo_id", "owner/one-fox", "--private"])
    assert HfApi().model_info("owner/one-fox").private
    plain = timm.create_model("hf-hub:owner/one-fox", pretrained=True).eval()
    stock = AutoModelForImageClassification.from_pretrained("owner/one-fox")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = model(x).expert_logits[:, 1]
        assert torch.equal(plain(x), expected)
        assert torch.equal(stock(x).logits, expected)
    assert type(stock).__name__ == "TimmWrapperForImageClassification"
    answer = pipeline(model="owner/one-fox")(picture())
    ours = pipeline(
        "image-classification",
        model=ECLForImageClassification.from_pretrained(tmp_path / "model", experts=[1]),
        image_processor=str(tmp_path / "model"),
    )
    assert answer == ours(picture())
    assert "timm" in ModelCard.load("owner/one-fox").data.tags


def test_experts_start_from_a_timm_repository(hub):
    published = timm.create_model("test_resnet", num_classes=7)
    timm.models.push_to_hf_hub(published, "start", private=True)
    config = ModelConfig(architecture="test_resnet", pretrained="owner/start", num_experts=2)
    started = initialise_model(config, METHODS["bc_ensemble"], [5, 3], ["a", "b"])
    for expert in started.experts:
        weights = published.state_dict()
        own = expert.backbone.state_dict()
        assert own.keys() < weights.keys()  # all but the classifier
        assert all(torch.equal(own[name], weights[name]) for name in own)


# --- the scripts ---

TINY = [
    *("--recipe", str(ROOT / "training" / "recipes" / "quickstart.yaml"), "--method", "bc_ensemble"),
    *("--model.num_experts", "2", "--model.architecture", "resnet20_cifar", "--model.image_size", "8"),
    *("--data.max_count", "70", "--data.imbalance_factor", "10", "--epochs", "3", "--hub.repo_id", REPO),
]


@pytest.mark.slow
def test_training_uploads_at_the_end_and_on_the_way(hub, tmp_path, capsys):
    run = train.main([*TINY, "--output_dir", str(tmp_path / "run"), "--hub.push", "true", "--hub.every", "1"])
    titles = [commit.title for commit in HfApi().list_repo_commits(REPO)]
    assert titles[0] == "3 epochs"
    assert {"Epoch 1", "Epoch 2"} & set(titles)  # one of them may have been skipped
    assert "Epoch 3" not in titles
    assert f"uploaded to {hub.url}/{REPO}, revision" in "".join(capsys.readouterr())
    results = json.loads((run / "results.json").read_text())
    card = ModelCard.load(REPO)
    reported = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    assert reported["Top-1 accuracy"] == round(results["test"]["plain"]["ensemble"]["top1"], 4)
    saved = ECLForImageClassification.from_pretrained(run / "model")
    loaded = ECLForImageClassification.from_pretrained(REPO)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    middle = next(commit for commit in HfApi().list_repo_commits(REPO) if commit.title.startswith("Epoch"))
    assert "Not measured." in ModelCard.load(HfApi().hf_hub_download(REPO, "README.md", revision=middle.commit_id)).text


def test_a_copy_that_cannot_be_written_does_not_stop_training(hub, model):
    def full(directory):
        (directory / "README.md").write_text("half")
        raise OSError(28, "No space left on device")

    reports = []
    upload = BackgroundUpload(REPO, reports.append)
    upload.offer(model, full, "Epoch 1")
    upload.wait()
    assert len(reports) == 1
    assert "Epoch 1: [Errno 28] No space left on device" in reports[0]
    assert hub.requests() == []


@pytest.mark.slow
def test_a_failed_upload_does_not_lose_the_run(hub, tmp_path, capsys):
    hub.fail("POST", "/preupload/", status=403, times=100)
    flags = [*TINY, "--output_dir", str(tmp_path / "run"), "--hub.push", "true", "--hub.every", "1"]
    run = train.main(flags)
    said = "".join(capsys.readouterr())
    assert "training goes on" in said
    assert "the upload failed, the run is complete; repeat it with" in said
    assert "write permission" in said
    assert json.loads((run / "results.json").read_text())["finished"]
    again = said.split("repeat it with\n")[1].split("\n")[0].split("export.py ")[1].split()
    hub.faults.clear()
    export.main(again)
    card = ModelCard.load(REPO)
    assert card.data.eval_results
    assert len(ECLForImageClassification.from_pretrained(REPO).experts) == 2


@pytest.mark.parametrize(("status", "advice"), [(401, "hf auth login"), (403, "write permission")])
def test_training_does_not_begin_if_the_upload_would_fail(hub, tmp_path, status, advice):
    hub.fail("POST", "/api/repos/create", status=status, times=100)
    with pytest.raises(SystemExit, match=rf"error: [\s\S]*{advice}"):
        train.main([*TINY, "--output_dir", str(tmp_path / "run"), "--hub.push", "true"])
    assert not (tmp_path / "run").exists()


def test_export_reports_a_refusal(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    hub.fail("POST", "/commit/", status=403, times=100)
    with pytest.raises(SystemExit, match=r"error: [\s\S]*write permission"):
        export.main(["--model", str(tmp_path / "model"), "--push", "--repo_id", REPO])
