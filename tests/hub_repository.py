"""Repositories of the tests' Hub: files, commits, branches and tags, in memory."""

import hashlib
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import PurePosixPath

import yaml


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_oid(self) -> str:
        stored = self.content
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(stored)}\n"
            stored = pointer.encode()
        return hashlib.sha1(b"blob %d\0%s" % (len(stored), stored)).hexdigest()

    @property
    def etag(self) -> str:
        """What clients compare their own file with, and name it by in their cache."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: "Commit | None"
    files: dict[str, Blob]
    title: str
    message: str
    date: str

    @property
    def card(self) -> dict:
        return front_matter(self.files["README.md"].content.decode()) if "README.md" in self.files else {}

    @property
    def folders(self) -> set[str]:
        return {str(folder) for path in self.files for folder in PurePosixPath(path).parents} - {"."}

    @property
    def history(self) -> list["Commit"]:
        return [self, *(self.parent.history if self.parent else [])]

    def entry(self, path: str, expand: bool = False) -> dict:
        """A file or folder as the tree listing describes it; with `expand`, a file's last change too."""
        if path not in self.files:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        blob = self.files[path]
        entry = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content)}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "sha256": blob.sha256, "size": entry["size"], "pointerSize": 130}
        if expand:
            commit = self
            while commit.parent and commit.parent.files.get(path) == blob:
                commit = commit.parent
            entry["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
        return entry


@dataclass
class Repository:
    kind: str
    id: str
    private: bool
    gated: bool | str = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def url(self) -> str:
        """The path of its page."""
        return f"/datasets/{self.id}" if self.kind == "dataset" else f"/{self.id}"

    def commit(self, branch: str, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        """Put `files` on a branch; the same files as before make no new commit."""
        parent = self.branches.get(branch)
        if parent is None or files != parent.files:
            tree = sorted((path, blob.git_oid) for path, blob in files.items())
            oid = hashlib.sha1(repr((self.kind, self.id, len(self.commits), title, tree)).encode()).hexdigest()
            date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            self.commits[oid] = self.branches[branch] = Commit(oid, parent, files, title, message, date)
        return self.branches[branch]

    def resolve(self, revision: str) -> Commit | None:
        """A branch, a tag, or a commit by at least seven digits of its id."""
        named = self.branches.get(revision) or self.tags.get(revision)
        by_id = [commit for oid, commit in self.commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        return named or (by_id[0] if len(by_id) == 1 else None)


def front_matter(card: str) -> dict:
    """The metadata of a README, {} if it has none.

    Raises:
        ValueError: if they are not a YAML mapping.
    """
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---(?:\r?\n|$)", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata are not YAML: {error}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError("the metadata are not a mapping")
    return metadata or {}
