"""The tests' own Hub, used through the real client libraries."""

import importlib
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from huggingface_hub import CommitOperationDelete, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from PIL import Image as PILImage
from safetensors.torch import save
from transformers import AutoModelForImageClassification

from ecl_hf import ECLConfig, ECLForImageClassification
from tests.hub_server import HubServer

httpx = importlib.import_module(type(get_session()).__module__)  # `httpx2` of newer versions of huggingface_hub
WEIGHTS = save({"weight": torch.arange(20_000.0)})
CARD = "---\nlicense: mit\ntags: [ecl]\n---\nPush number {}\n"


@pytest.fixture
def folder(tmp_path):
    """What is pushed: a large file and small ones."""
    (tmp_path / "folder" / "data").mkdir(parents=True)
    (tmp_path / "folder" / "data" / "a name.txt").write_text("always the same\n")
    (tmp_path / "folder" / "model.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "folder"


@pytest.fixture
def repo(hub, folder):
    """Two pushes of the folder, with different cards."""
    HfApi().create_repo("owner/model")
    for number in (1, 2):
        (folder / "README.md").write_text(CARD.format(number))
        HfApi().upload_folder(repo_id="owner/model", folder_path=folder, commit_message=f"push {number}")
    assert hub.uploaded() == len(WEIGHTS)  # once
    return "owner/model"


def content(repo_id, filename, **kwargs):
    return Path(hf_hub_download(repo_id, filename, **kwargs)).read_bytes()


def test_what_was_pushed_is_listed_and_downloaded(hub, repo):
    api, files = HfApi(), [".gitattributes", "README.md", "data/a name.txt", "model.safetensors"]
    assert api.list_repo_files(repo) == files
    assert [entry.path for entry in api.list_repo_tree(repo)] == [".gitattributes", "README.md", "data", files[3]]
    (entry,) = api.list_repo_tree(repo, "data", recursive=True, expand=True)
    assert (entry.path, entry.last_commit.title) == (files[2], "push 1")
    (info,) = api.get_paths_info(repo, ["model.safetensors", "none"])
    assert info.size == info.lfs.size == len(WEIGHTS)
    assert api.model_info(repo, files_metadata=True).siblings[3].lfs.sha256 == info.lfs.sha256
    assert api.model_info(repo, expand=["cardData"]).card_data.license == "mit"
    assert api.file_exists(repo, "data/a name.txt")
    assert not api.file_exists(repo, "no.txt")
    assert content(repo, "model.safetensors") == content(repo, "model.safetensors") == WEIGHTS
    assert hub.downloaded(repo) == {"model.safetensors": len(WEIGHTS)}
    assert {record.origin for record in hub.requests("GET", r"model\.safetensors")} == {"cdn"}
    assert api.whoami()["name"] == "owner"


def test_each_push_is_a_revision_and_an_unchanged_one_is_none(hub, repo, folder):
    api = HfApi()
    second, first, created = api.list_repo_commits(repo)
    assert [second.title, first.title, created.title] == ["push 2", "push 1", "initial commit"]
    again = api.upload_folder(repo_id=repo, folder_path=folder)
    assert again.oid == second.commit_id == api.model_info(repo).sha
    assert len(hub.requests("POST", "/commit/")) == 2
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id=repo, parent_commit=first.commit_id)

    api.create_branch(repo, branch="stable/1", revision=first.commit_id)
    api.create_tag(repo, tag="v1", revision="stable/1")
    for create, name in ((api.create_branch, {"branch": "stable/1"}), (api.create_tag, {"tag": "v1"})):
        with pytest.raises(HfHubHTTPError, match="409"):
            create(repo, revision=first.commit_id, **name)
    assert {ref.name for ref in api.list_repo_refs(repo).branches} == {"main", "stable/1"}
    for revision in (first.commit_id, first.commit_id[:8], "stable/1", "v1"):
        assert content(repo, "README.md", revision=revision).decode() == CARD.format(1)
    assert content(repo, "README.md").decode() == CARD.format(2)
    with pytest.raises(RevisionNotFoundError):
        content(repo, "README.md", revision="v2")


def test_deleted_files_stay_in_old_revisions(repo):
    api = HfApi()
    pushed = api.model_info(repo).sha
    api.delete_file("README.md", repo)
    api.create_commit(repo, [CommitOperationDelete("data/")], commit_message="no data")
    assert api.list_repo_files(repo) == [".gitattributes", "model.safetensors"]
    assert len(api.list_repo_files(repo, revision=pushed)) == 4
    with pytest.raises(EntryNotFoundError):
        content(repo, "README.md")
    with pytest.raises(EntryNotFoundError):
        api.delete_file("README.md", repo)
    api.delete_repo(repo)
    assert not api.repo_exists(repo)


def test_snapshot_downloads_the_chosen_files_once(hub, repo):
    path = snapshot_download(repo, allow_patterns=["*.md", "data/*"])
    assert hub.downloaded(repo) == {"README.md": len(CARD.format(2)), "data/a name.txt": len("always the same\n")}
    before = len(hub.log)
    assert snapshot_download(repo, allow_patterns=["*.md", "data/*"]) == path
    assert len(hub.log) - before == 1


def test_private_and_missing_repositories_look_the_same(hub):
    api = HfApi()
    api.create_repo("owner/secret", private=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="owner/secret")
    for token, status in ((False, 401), ("hf_guest", 404)):
        for name in ("owner/secret", "owner/none", "none"):
            with pytest.raises(RepositoryNotFoundError, match=str(status)):
                content(name, "x.txt", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        content("owner/secret", "x.txt", token="hf_wrong")
    assert content("owner/secret", "x.txt") == b"x"
    assert hub.downloaded("owner/secret") == {"x.txt": 1}


def test_only_the_owner_writes(repo):
    api = HfApi()
    for token, status in ((False, "401"), ("hf_guest", "403")):
        with pytest.raises(HfHubHTTPError, match=status):
            api.create_repo("owner/other", token=token)
        with pytest.raises(HfHubHTTPError, match=status):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo, token=token)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    assert api.create_repo(repo, exist_ok=True).repo_id == repo


def test_gated_repositories_show_their_page_only(repo):
    api = HfApi()
    api.update_repo_settings(repo, gated="manual")
    assert api.model_info(repo, token=False).gated == "manual"
    for token, status in ((False, 401), ("hf_guest", 403)):
        with pytest.raises(GatedRepoError, match=str(status)):
            content(repo, "README.md", token=token)
    assert content(repo, "README.md")


@pytest.mark.parametrize("status", [429, 500])
def test_refused_uploads_are_repeated_where_the_client_does(hub, repo, status):
    hub.fail(method="POST", path_regex="/preupload/", status=status, times=2, headers={"Retry-After": "3"})
    hub.fail(method="PUT", status=status)
    api, before = HfApi(), len(hub.requests("PUT"))
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="other.safetensors", repo_id=repo)
    assert hub.waits == [4, 4, 1]
    assert [record.status for record in hub.requests("PUT")][before:] == [status, 200]
    hub.fail(method="POST", path_regex="/commit/", status=status)
    with pytest.raises(HfHubHTTPError, match=str(status)):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="one.txt", repo_id=repo)
    assert not api.file_exists(repo, "one.txt")


def test_refused_downloads_are_repeated_or_named(hub, repo):
    hub.fail(method="GET", path_regex="README", status=429)
    assert content(repo, "README.md")
    assert hub.waits == [1]
    hub.fail(method="HEAD", status=500, times=100)
    with pytest.raises(LocalEntryNotFoundError):
        content(repo, "model.safetensors")
    hub.faults.clear()
    assert content(repo, "model.safetensors") == WEIGHTS


def test_a_broken_upload_starts_again(hub):
    api = HfApi()
    api.create_repo("owner/model")
    hub.cut(method="PUT", times=2)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id="owner/model")
    half, whole = (0, len(WEIGHTS) // 2), (200, len(WEIGHTS))
    assert [(record.status, record.request_bytes) for record in hub.requests("PUT")] == [half, half, whole]
    assert content("owner/model", "model.safetensors") == WEIGHTS
    hub.cut(method="PUT", times=100)
    with pytest.raises(RuntimeError, match=re.escape("other.safetensors")):
        api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="other.safetensors", repo_id="owner/model")
    assert not api.file_exists("owner/model", "other.safetensors")


def test_a_broken_download_goes_on_where_it_broke(hub, repo, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1001)  # what is written at once; else 10 MB
    hub.cut(method="HEAD")
    with pytest.raises(httpx.RemoteProtocolError):
        get_session().head(f"{hub.url}/{repo}/resolve/main/README.md")
    hub.cut(method="GET")
    assert content(repo, "model.safetensors") == WEIGHTS
    assert hub.downloaded(repo) == {"model.safetensors": len(WEIGHTS)}
    assert [record.status for record in hub.requests("GET", r"model\.safetensors")] == [200, 206]


def test_ranges(hub, repo):
    url = f"{hub.url}/{repo}/resolve/main/model.safetensors"
    for asked, part in (("5-9", WEIGHTS[5:10]), ("-7", WEIGHTS[-7:]), (f"{len(WEIGHTS) - 2}-", WEIGHTS[-2:])):
        answer = get_session().get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, part)
    assert get_session().get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416


def images(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    features = Features({"img": Image(), "label": ClassLabel(names=["oak", "ash"])})
    return Dataset.from_dict({"img": [PILImage.fromarray(p) for p in pixels], "label": [0, 1] * (count // 2)}, features)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets(streaming):
    pushed = DatasetDict(train=images(6, seed=0), test=images(2, seed=1))
    pushed.push_to_hub("owner/trees", private=True)
    loaded = load_dataset("owner/trees", streaming=streaming)
    assert loaded.keys() == pushed.keys()
    for split, expected in pushed.items():
        assert loaded[split].features == expected.features
        rows = list(loaded[split])
        assert [row["label"] for row in rows] == expected["label"]
        assert all(np.array_equal(row["img"], image) for row, image in zip(rows, expected["img"], strict=True))


@pytest.mark.usefixtures("hub")
def test_timm():
    model, names = timm.create_model("test_resnet", num_classes=3).eval(), ["oak", "ash", "elm"]
    timm.models.push_to_hf_hub(model, "owner/timm", model_config={"label_names": names}, safe_serialization=True)
    loaded = timm.create_model("hf-hub:owner/timm", pretrained=True).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert torch.equal(loaded(x), model(x))
    assert loaded.pretrained_cfg["label_names"] == names


@pytest.mark.parametrize("server", ["first", "second"])  # the library keeps a client of its own
def test_transformers(hub, server):
    model = ECLForImageClassification(ECLConfig(architecture="resnet20_cifar", num_experts=2, num_labels=4)).eval()
    model.push_to_hub("owner/ecl", private=True, commit_message=server)
    assert HfApi().list_repo_commits("owner/ecl")[0].title == server
    loaded = AutoModelForImageClassification.from_pretrained("owner/ecl").eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x).logits, model(x).logits)
    before = len(hub.log)
    AutoModelForImageClassification.from_pretrained("owner/ecl")
    assert len(hub.log) - before == 1
    head = HfApi().model_info("owner/ecl").sha
    model.push_to_hub("owner/ecl")
    assert HfApi().model_info("owner/ecl").sha == head


def test_another_process(hub, repo):
    script = f"import huggingface_hub as h; print(open(h.hf_hub_download('{repo}', 'README.md')).read())"
    result = subprocess.run([sys.executable, "-c", script], env=hub.environment(), capture_output=True, text=True)
    assert "Push number 2" in result.stdout, result.stderr


def test_problems_are_noticed(hub):
    with pytest.raises(HfHubHTTPError):
        HfApi().get_model_tags()
    assert get_session().get("http://huggingface.example").status_code == 403
    with pytest.raises(httpx.ProxyError):
        get_session().get("https://huggingface.example")
    get_session().get(f"{hub.cdn}/upload/{0:064}", headers={"Authorization": "Bearer hf_owner"})
    get_session().post(f"{hub.url}/api/repos/create", content=b"not JSON")
    starts = [
        "no route: hub",
        "connection to",
        "connection to",
        "no route: cdn",
        "token sent",
        "POST /api/repos/create",
    ]
    for problem, start in zip(hub.problems, starts, strict=True):
        assert problem.startswith(start)
    hub.problems.clear()


def test_nothing_is_left(tmp_path):
    before, endpoint = set(threading.enumerate()), constants.ENDPOINT
    with HubServer(tmp_path):
        assert len(set(threading.enumerate()) - before) == 2
    assert set(threading.enumerate()) == before
    assert endpoint == HfApi().endpoint == constants._HF_DEFAULT_ENDPOINT
    assert constants.HF_HUB_OFFLINE
