"""Files of a model's directory or Hub repository: weights are read expert by expert, a short card is written, uploads.

A repository is untrusted input: what is wrong with it is an error that names the file.
"""

import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import cached_files, extract_commit_hash

from .aggregation import of_experts
from .configuration_ecl import ECLConfig
from .files import CHECKSUMS, check_regular, checksum, read_checksums, read_object, write_checksums

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME)

MAX_HEADER = 1 << 28
"""Bytes of a weight file beside its numbers; safetensors itself reads a header of at most 100 million."""

ADVICE = {
    401: "log in with `hf auth login`, or give a token of an account that has access",
    403: "the token lacks a permission (to publish: write permission), or access conditions must be accepted first",
    404: "check the repository's name and whether the token may see it",
    409: "somebody else is committing to the repository; try again",
    429: "the Hub asks to slow down; wait some minutes and try again",
}


def short_card(config: ECLConfig, repo_id: str | None, tags: Sequence[str] = ()) -> ModelCard:
    """A model card that says what the configuration knows: how to load the model, and that nothing was measured."""
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="image-classification", tags=["ecl", "long-tailed", "timm", *tags]
    )
    repo_id = repo_id or "REPOSITORY"
    ensemble = f"{config.num_experts} x {config.architecture}, {config.num_labels} classes"
    weighted = (
        "The weights of the experts were found on unlabelled pictures (`weighted_on` in config.json): scores on these\n"
        "pictures are transductive.\n\n"
        if config.weighted_on
        else ""
    )
    return ModelCard(
        f"---\n{metadata}\n---\n\n# Long-tailed image classifier\n\n"
        f"An ensemble for long-tailed data ({ensemble}), one safetensors file per expert.\n\n"
        "```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("image-classification", model="{repo_id}", trust_remote_code=True)\n```\n\n'
        f'With the package `ecl_hf`, `ECLForImageClassification.from_pretrained("{repo_id}", experts=[0])` reads one\n'
        f"expert alone, and `trust_remote_code` is not needed.\n\n{weighted}Evaluation: not measured.\n"
    )


def _hub_status(error: BaseException | None) -> int | None:
    """The Hub's answer that led to an error, perhaps by way of another error."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__
    return None


@contextmanager
def explain_hub_errors(repo_id: str | Path, doing: str = "write to") -> Iterator[None]:
    """Let an error of the Hub say what to do; a failed connection is a ConnectionError, whatever library reports it."""
    try:
        yield
    except OSError as error:
        status = _hub_status(error) or 0
        if advice := ADVICE.get(status, "the Hub has trouble; try again later" if status >= 500 else None):
            explanation = f"\nCan't {doing} {repo_id}: {advice} (the Hub answered {status})."
            if not isinstance(error, HfHubHTTPError):  # transformers knows of failed connections only
                raise OSError(f"{error}{explanation}") from error
            error.append_to_message(explanation)
        raise
    except (ValueError, TypeError, RecursionError):  # not of the connection
        raise
    except Exception as error:
        raise ConnectionError(f"the connection to the Hub failed ({repo_id}): {error}; try again") from error


def upload_directory(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Upload a saved model in one commit that also deletes weight files of another layout.

    Args:
        directory: what to upload.
        repo_id: Hub repository, made if it is not there.
        private: whether a new repository is private.
        token: of the Hub; the stored one when None.
        revision: branch, made if it is not there.
        create_pr: open a pull request instead.
        commit_message: title of the commit.
        commit_description: text of the commit.
        keep_card: leave a card that the repository has.

    Raises:
        HfHubHTTPError: the Hub refused; the message says what to do.
    """
    api = HfApi(token=token)
    with explain_hub_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        kept = ["README.md"] if keep_card and api.file_exists(repo_id, "README.md", revision=revision) else None
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            ignore_patterns=kept,
            delete_patterns=[*WEIGHT_FILES, CHECKSUMS],
        )


def positions(experts: Sequence[int], config: ECLConfig, source: str | Path) -> list[int]:
    """The chosen experts as integers, if they name different ones of those that are there."""
    try:
        chosen = [operator.index(k) for k in experts]
    except TypeError:
        chosen = []
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(config.num_experts)):
        raise ValueError(
            f"experts={experts} must be a list of different experts out of 0..{config.num_experts - 1} of {source}"
        )
    return chosen


def join_shared(directory: Path) -> None:
    """Put the weights that experts share into one file, behind theirs: transformers cuts them to an expert's size."""
    file = directory / SAFE_WEIGHTS_INDEX_NAME
    if not file.exists():
        return
    index = read_object(file)
    names = index["weight_map"]
    experts = {int(key.split(".")[1]): name for key, name in names.items() if key.startswith("experts.")}
    shared = sorted(set(names.values()) - set(experts.values()))
    if len(shared) < 2:
        return
    tensors = {key: tensor for name in shared for key, tensor in load_file(directory / name).items()}
    renamed = dict.fromkeys(shared, f"model-{len(experts) + 1:05}-of-{len(experts) + 1:05}.safetensors")
    save_file(tensors, directory / renamed[shared[0]], {"format": "pt"})
    for name in shared:
        (directory / name).unlink()
    for position, k in enumerate(sorted(experts), 1):
        renamed[experts[k]] = f"model-{position:05}-of-{len(experts) + 1:05}.safetensors"
        (directory / experts[k]).rename(directory / renamed[experts[k]])
    index["weight_map"] = {key: renamed[name] for key, name in names.items()}
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def seal_weights(directory: Path) -> None:
    """Write the checksums of a saved model's weights, so that a flipped bit does not load as if nothing were."""
    write_checksums(directory, [file for pattern in WEIGHT_FILES for file in directory.glob(pattern)])


def check_seal(source: str | Path, files: Sequence[str], hub: dict[str, Any], most: int) -> None:
    """Refuse weight files that are not as they were saved; repositories without checksums are taken as they are.

    Args:
        source: directory or Hub repository.
        files: the paths of those that were read.
        hub: what chooses the repository's revision and the cache.
        most: bytes that one of them may have.
    """
    if (listed := _find(source, CHECKSUMS, hub)) is None:
        return
    expected = read_checksums(listed)
    for file in files:
        name = Path(file).name
        if name in expected and checksum(file, most) != expected[name]:
            raise ValueError(
                f"{name} of {source} is not what was saved: its SHA-256 is not that of {CHECKSUMS}. Get it anew, or "
                f"delete {CHECKSUMS} if you changed it"
            )


def _find(source: str | Path, name: str, hub: dict[str, Any]) -> str | None:
    """A file of a repository; None if it is not there, or not in the cache."""
    with explain_hub_errors(source, "read"):
        try:
            return cached_file(source, name, **hub)
        except OSError as error:
            if _hub_status(error):
                raise
            return None


class Saved(NamedTuple):
    """A tensor that was not read yet."""

    file: str
    name: str
    shape: tuple[int, ...]


def find_tensors(
    source: str | Path, config: ECLConfig, experts: Sequence[int], hub: dict[str, Any]
) -> tuple[dict[str, Saved], list[str]]:
    """Tensors of the chosen experts, renumbered from 0, and of what they share, by the headers of their files.

    Other files of weights are not opened. `hub` gets the revision that the index belongs to. The files' paths come
    second.
    """
    parts = {f"experts.{k}.": f"experts.{position}." for position, k in enumerate(experts)}
    if config.share_stages:
        parts["trunk."] = "trunk."
    if config.side_branches:
        parts |= {f"sides.{k}.": f"sides.{position}." for position, k in enumerate(experts)}
    if isinstance(of_experts(config.aggregation, experts, config.num_experts), dict):
        parts["router."] = "router."
    index = _find(source, SAFE_WEIGHTS_INDEX_NAME, hub)  # without it, one file may hold everything
    names = {part: {SAFE_WEIGHTS_NAME} for part in parts}
    if index:
        names = {part: set() for part in parts}
        for key, name in _read_index(index, source).items():
            names.get(_part(key), set()).add(name)
        if pinned := extract_commit_hash(index, None):  # else the files could be those of a later commit
            hub["revision"] = pinned
    if empty := [part for part in parts if not names[part]]:
        raise ValueError(f"{source} has {SAFE_WEIGHTS_INDEX_NAME}, but it names no weights of {empty[0][:-1]}")
    wanted = sorted({name for files in names.values() for name in files})
    with explain_hub_errors(source, "read"):
        paths = dict(zip(wanted, cached_files(source, wanted, **hub), strict=True))
    found = {}
    for name, path in paths.items():
        with _weights(path, source) as file:
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                part = _part(key)
                if name in names.get(part, ()):
                    shape = tuple(file.get_slice(key).get_shape())
                    found[parts[part] + key.removeprefix(part)] = Saved(path, key, shape)
    return found, list(paths.values())


def read_tensors(
    found: Mapping[str, Saved], shapes: Mapping[str, tuple[int, ...]], source: str | Path
) -> dict[str, Tensor]:
    """A state dict of the found tensors; those that don't have one of the expected shapes are zeros without memory."""
    state = {key: torch.zeros(()).expand(saved.shape) for key, saved in found.items()}
    fitting = {key: saved for key, saved in found.items() if shapes.get(key) == saved.shape}
    for path in sorted({saved.file for saved in fitting.values()}):
        with _weights(path, source) as file:
            for key, saved in fitting.items():
                if saved.file == path:
                    state[key] = file.get_tensor(saved.name)
                    _check_numbers(state[key], f"in {saved.name}", f"{Path(path).name} of {source}")
    return state


def _part(key: str) -> str:
    """What a tensor belongs to, `experts.0.` for instance."""
    found = re.match(r"(?:(?:experts|sides)\.\d+|trunk|router)\.", key)
    return found[0] if found else ""


def _read_index(path: str, source: str | Path) -> dict[str, str]:
    """Tensor name -> file name, which must lie beside the index."""
    try:
        weight_map = read_object(path)["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} of {source} is no index of weights: {error!r}") from error
    if strange := [name for name in names if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name))]:
        raise ValueError(
            f"{SAFE_WEIGHTS_INDEX_NAME} of {source} names {strange[0]!r}, which is no weight file beside it"
        )
    return weight_map


@contextmanager
def _weights(path: str, source: str | Path) -> Iterator[safe_open]:
    """An opened safetensors file; ValueError says that it is damaged or none."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, RuntimeError) as error:  # of torch, if the file can't be mapped
        name = Path(path).name
        raise ValueError(f"{name} of {source} is damaged or no safetensors file ({error}); get it anew") from error


def _check_numbers(tensor: Tensor, where: str, name: str) -> None:
    """Refuse numbers that no ECL model holds; ValueError."""
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
        raise ValueError(f"{name} holds {tensor.dtype} {where}, which no ECL model does")
    # What is finite in double precision may not be so in single.
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite, {where}; don't use it")
