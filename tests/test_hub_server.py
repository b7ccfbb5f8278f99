"""The tests' own Hub, used through the real client libraries."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from huggingface_hub import CommitOperationDelete, HfApi, constants, hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx
from PIL import Image as PILImage
from safetensors.torch import save
from transformers import AutoModelForImageClassification

from ecl_hf import ECLConfig, ECLForImageClassification
from tests.hub_server import HubServer

WEIGHTS = save({"weight": torch.arange(20_000.0)})


@pytest.fixture
def repo(hub):
    """A repository with one large file, some small ones and two revisions."""
    api = HfApi()
    api.create_repo("owner/model")
    for number in (1, 2):
        (hub.directory / "folder" / "data").mkdir(parents=True, exist_ok=True)
        (hub.directory / "folder" / "README.md").write_text(f"---\nlicense: mit\ntags: [ecl]\n---\nNumber {number}\n")
        (hub.directory / "folder" / "data" / "a name.txt").write_text("same in both\n")
        (hub.directory / "folder" / "model.safetensors").write_bytes(WEIGHTS)
        api.upload_folder(repo_id="owner/model", folder_path=hub.directory / "folder", commit_message=f"push {number}")
    return "owner/model"


def test_what_was_uploaded_is_listed_and_downloaded(hub, repo):
    api = HfApi()
    files = [".gitattributes", "README.md", "data/a name.txt", "model.safetensors"]
    assert sorted(api.list_repo_files(repo)) == files
    assert [entry.path for entry in api.list_repo_tree(repo)] == [".gitattributes", "README.md", "data", files[3]]
    assert [entry.path for entry in api.list_repo_tree(repo, "data", recursive=True, expand=True)] == files[2:3]
    (info,) = api.get_paths_info(repo, "model.safetensors")
    assert info.size == info.lfs.size == len(WEIGHTS)
    assert model_info(repo, files_metadata=True).siblings[3].lfs.size == len(WEIGHTS)
    assert api.model_info(repo, expand=["cardData"]).card_data.license == "mit"
    with open(hf_hub_download(repo, "model.safetensors"), "rb") as file:
        assert file.read() == WEIGHTS
    assert hub.downloaded(repo) == {"model.safetensors": len(WEIGHTS)}
    assert api.file_exists(repo, "data/a name.txt")
    assert not api.file_exists(repo, "no.txt")
    assert api.whoami()["name"] == "owner"


def test_each_push_is_a_revision_and_an_unchanged_one_is_none(hub, repo):
    api = HfApi()
    second, first, created = api.list_repo_commits(repo)
    assert [second.title, first.title, created.title] == ["push 2", "push 1", "initial commit"]
    assert hub.uploaded() == len(WEIGHTS)
    again = api.upload_folder(repo_id=repo, folder_path=hub.directory / "folder")
    assert again.oid == second.commit_id == api.model_info(repo).sha
    assert len(hub.requests("POST", "/commit/")) == 2
    api.create_branch(repo, branch="stable/1", revision=first.commit_id)
    api.create_tag(repo, tag="v1", revision="stable/1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v1")
    assert {ref.name for ref in api.list_repo_refs(repo).branches} == {"main", "stable/1"}
    for revision in (first.commit_id, "stable/1", "v1"):
        with open(hf_hub_download(repo, "README.md", revision=revision)) as file:
            assert "Number 1" in file.read()
    with open(hf_hub_download(repo, "README.md")) as file:
        assert "Number 2" in file.read()
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "README.md", revision="v2")


def test_delete(hub, repo):
    api = HfApi()
    api.delete_file("README.md", repo)
    api.create_commit(repo, [CommitOperationDelete("data/")], commit_message="no data")
    assert sorted(api.list_repo_files(repo)) == [".gitattributes", "model.safetensors"]
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "README.md")
    with pytest.raises(EntryNotFoundError):
        api.delete_file("README.md", repo)
    api.delete_repo(repo)
    assert not api.repo_exists(repo)


def test_snapshot_of_some_files(hub, repo):
    path = snapshot_download(repo, allow_patterns=["*.md", "data/*"])
    assert hub.downloaded(repo).keys() == {"README.md", "data/a name.txt"}
    assert path.endswith(model_info(repo).sha)
    before = len(hub.log)
    assert snapshot_download(repo, allow_patterns=["*.md", "data/*"]) == path
    assert len(hub.log) - before <= 2


def test_private_and_missing_repositories_look_the_same(hub):
    api = HfApi()
    api.create_repo("owner/secret", private=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="owner/secret")
    hf_hub_download("owner/secret", "x.txt", cache_dir=hub.directory / "mine")
    for token, status in ((False, 401), ("hf_guest", 404)):
        for name in ("owner/secret", "owner/none", "none"):
            with pytest.raises(RepositoryNotFoundError, match=str(status)):
                hf_hub_download(name, "x.txt", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        hf_hub_download("owner/secret", "x.txt", token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("someone/else")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("owner/secret")
    assert api.create_repo("owner/secret", exist_ok=True).repo_id == "owner/secret"


def test_gated_repository(hub, repo):
    HfApi().update_repo_settings(repo, gated="manual")
    assert model_info(repo, token=False).gated == "manual"
    for token, status in ((False, 401), ("hf_guest", 403)):
        with pytest.raises(GatedRepoError, match=str(status)):
            hf_hub_download(repo, "README.md", token=token)
    hf_hub_download(repo, "README.md")


@pytest.mark.parametrize("status", [429, 500])
def test_refused_uploads_are_repeated_where_the_client_repeats_them(hub, repo, status):
    hub.fail(method="POST", path_regex="/preupload/", status=status, times=2, headers={"Retry-After": "3"})
    hub.fail(method="PUT", status=status)
    api = HfApi()
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="other.safetensors", repo_id=repo)
    assert hub.waits == [4, 4, 1]
    assert [record.status for record in hub.requests("PUT")][1:] == [status, 200]
    hub.fail(method="POST", path_regex="/commit/", status=status)
    with pytest.raises(HfHubHTTPError, match=str(status)):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="one.txt", repo_id=repo)
    assert api.list_repo_commits(repo)[0].title == "Upload other.safetensors with huggingface_hub"


def test_refused_downloads(hub, repo):
    hub.fail(method="GET", path_regex="README", status=429)
    hf_hub_download(repo, "README.md")
    assert hub.waits == [1]
    hub.fail(method="HEAD", path_regex="safetensors", status=500, times=100)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(repo, "model.safetensors")
    hub.faults.clear()
    hf_hub_download(repo, "model.safetensors")


def test_a_broken_upload_is_repeated(hub):
    api = HfApi()
    api.create_repo("owner/model")
    hub.cut(method="PUT", times=2)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="owner/model")
    assert [(r.status, r.request_bytes) for r in hub.requests("PUT")] == [(0, len(WEIGHTS) // 2)] * 2 + [
        (200, len(WEIGHTS))
    ]
    hub.cut(method="PUT", times=10)
    with pytest.raises(RuntimeError, match="other.safetensors"):
        api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="other.safetensors", repo_id="owner/model")
    assert not api.file_exists("owner/model", "other.safetensors")


def test_a_broken_download_goes_on_where_it_broke(hub, repo, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1001)  # 10 MB: smaller files start again
    hub.cut(method="GET", path_regex="model.safetensors")
    with open(hf_hub_download(repo, "model.safetensors"), "rb") as file:
        assert file.read() == WEIGHTS
    assert hub.downloaded(repo) == {"model.safetensors": len(WEIGHTS)}
    assert [record.status for record in hub.requests("GET", "model.safetensors")] == [200, 206]


def images(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    features = Features({"img": Image(), "label": ClassLabel(names=["oak", "ash"])})
    return Dataset.from_dict({"img": [PILImage.fromarray(p) for p in pixels], "label": [0, 1] * (count // 2)}, features)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(hub, streaming):
    pushed = DatasetDict(train=images(6, seed=0), test=images(2, seed=1))
    pushed.push_to_hub("owner/trees", private=True)
    loaded = load_dataset("owner/trees", streaming=streaming)
    for split, expected in pushed.items():
        assert loaded[split].features == expected.features
        rows = list(loaded[split])
        assert [row["label"] for row in rows] == expected["label"]
        assert all(np.array_equal(row["img"], image) for row, image in zip(rows, expected["img"], strict=True))


def test_timm(hub):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.push_to_hf_hub(
        model, "owner/timm", model_config={"label_names": ["a", "b", "c"]}, safe_serialization=True
    )
    loaded = timm.create_model("hf-hub:owner/timm", pretrained=True).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert torch.equal(loaded(x), model(x))
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_transformers(hub):
    model = ECLForImageClassification(ECLConfig(architecture="resnet20_cifar", num_experts=2, num_labels=4)).eval()
    model.push_to_hub("owner/ecl")
    loaded = AutoModelForImageClassification.from_pretrained("owner/ecl").eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x).logits, model(x).logits)
    commits, before = len(HfApi().list_repo_commits("owner/ecl")), len(hub.log)
    AutoModelForImageClassification.from_pretrained("owner/ecl")
    assert len(hub.log) - before <= 2
    model.push_to_hub("owner/ecl")
    assert len(HfApi().list_repo_commits("owner/ecl")) == commits


def test_another_process(hub, repo):
    script = "import huggingface_hub as h; print(open(h.hf_hub_download('owner/model', 'README.md')).read())"
    result = subprocess.run([sys.executable, "-c", script], env=hub.environment(), capture_output=True, text=True)
    assert "Number 2" in result.stdout, result.stderr


def test_problems_are_noticed(hub, repo):
    with pytest.raises(HfHubHTTPError):
        HfApi().get_model_tags()
    with pytest.raises(httpx.ConnectError, match="not part"):
        get_session().get("http://huggingface.example")
    assert [problem.split()[0] for problem in hub.problems] == ["no", "connection"]
    hub.problems.clear()


def test_nothing_is_left_running(tmp_path):
    before = set(threading.enumerate())
    with HubServer(tmp_path) as hub:
        assert len(set(threading.enumerate()) - before) == 2
    assert set(threading.enumerate()) == before
