"""The HTTP protocol of the Hugging Face Hub, spoken on 127.0.0.1 for tests with the real client libraries.

`HubServer` opens two origins, as the Hub does: `hub.url` answers the API and hands out small files, and redirects to `hub.cdn`
for the bytes of large (LFS) files. The `hub` fixture of conftest.py starts one and points the clients at it:

    HfApi().create_repo("owner/model")                      # the token in use belongs to "owner"; `TOKENS` has others
    hub.fail(method="PUT", path_regex="", status=500)       # the next matching request is refused; `hub.cut(...)` breaks it off
    hub.requests("GET", "/resolve/"), hub.downloaded("owner/model")["model.safetensors"], hub.repository("owner/model")

`hub.problems` lists what should never happen: requests that no route answers, a token sent to the CDN, a connection to
anywhere else, an exception in this file. The fixture fails the test if there is any.
"""

import base64
import hashlib
import importlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml

TOKENS = {"hf_owner": "owner", "hf_guest": "guest"}
LFS_PATTERNS = ["*.safetensors", "*.bin", "*.pt", "*.onnx", "*.npz", "*.parquet", "*.arrow", "*.zip"]
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
REGULAR_LIMIT = 10 * 2**20  # bytes; larger files and binary ones are LFS whatever their name


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
            stored = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(),
                len(stored),
            )
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
    author: str
    date: str


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

    def commit(self, branch: str, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        """Put `files` on a branch; the same files as before make no new commit."""
        parent = self.branches.get(branch)
        if parent is None or files != parent.files:
            tree = sorted((path, blob.git_oid) for path, blob in files.items())
            oid = hashlib.sha1(repr((self.kind, self.id, len(self.commits), title, tree)).encode()).hexdigest()
            date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            self.commits[oid] = self.branches[branch] = Commit(oid, parent, files, title, message, self.owner, date)
        return self.branches[branch]

    def resolve(self, revision: str) -> Commit:
        """A branch, a tag, or a commit by at least seven digits of its id."""
        named = self.branches.get(revision) or self.tags.get(revision)
        by_id = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        if named is None and len(by_id) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return named or self.commits[by_id[0]]


@dataclass(frozen=True)
class Request:
    origin: str
    method: str
    path: str  # still percent-encoded: a revision or a folder may contain "/"
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def url(self) -> str:
        return unquote(self.path)

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Response:
    """`served` names the repository and the file whose bytes are the body."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    served: tuple[str, str] | None = None

    @classmethod
    def of(cls, value, status=200, headers=None) -> "Response":
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """An error in the Hub's form: clients choose their exception by `X-Error-Code`, not by the status."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"X-Error-Message": message}
        self.response = Response.of({"error": message}, status, headers | ({"X-Error-Code": code} if code else {}))


@dataclass(frozen=True)
class Record:
    """One answered request. `status` is 0 if the connection was cut before an answer."""

    origin: str
    method: str
    path: str
    status: int
    request_bytes: int
    response_bytes: int
    with_token: bool
    served: tuple[str, str] | None


@dataclass
class Fault:
    method: str | None
    path_regex: str
    times: int
    response: Response | None  # None: the connection is cut half-way through the body


REPO = r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+(?:/[^/]+)?)"
FILES = r"/(?:(?P<kind>dataset)s/)?(?P<id>[^/]+(?:/[^/]+)?)"
ROUTES = []


def route(method: str, pattern: str, write: bool = False):
    """Answer requests of one origin and path by a method of `HubServer`.

    The groups `kind` and `id` arrive as `repo`, after a check that the user may read (or write) it; `revision` as `commit`.
    """

    def register(function):
        ROUTES.append((method, re.compile(pattern), write, function))
        return function

    return register


class HubServer:
    """See the module's docstring. Caches of the clients live under `directory`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.log: list[Record] = []
        self.problems: list[str] = []
        self.waits: list[float] = []  # seconds that clients meant to wait before trying again
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.homes = 0

    def __enter__(self) -> "HubServer":
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(self, origin)) for origin in ("hub", "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            server.daemon_threads = False  # `server_close` waits for requests in flight
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *exception) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    # --- what tests use

    def fail(self, method=None, path_regex="", status=500, times=1, headers=None) -> None:
        """Refuse the next `times` requests of this method and path, on either origin."""
        response = Response.of({"error": f"Refused with {status} by the test"}, status, headers)
        self.faults.append(Fault(method, path_regex, times, response))

    def cut(self, method=None, path_regex="", times=1) -> None:
        """Break the connection half-way through an upload's body, or a download's."""
        self.faults.append(Fault(method, path_regex, times, None))

    def requests(self, method=None, path_regex="") -> list[Record]:
        """The log, of one method and path."""
        with self.lock:
            return [r for r in self.log if method in (None, r.method) and re.search(path_regex, r.path)]

    def downloaded(self, repo_id: str) -> Counter[str]:
        """Bytes of each file of a repository that left the server, by path in the repository."""
        total = Counter()
        for record in self.requests("GET"):
            if record.served is not None and record.served[0] == repo_id:
                total[record.served[1]] += record.response_bytes
        return total

    def uploaded(self) -> int:
        """Bytes of large files that reached the CDN; files of a few kilobytes travel inside the commit."""
        return sum(record.request_bytes for record in self.requests("PUT", "^/upload/"))

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, repo_id]

    def environment(self, token: str | None = "hf_owner") -> dict[str, str]:
        """The environment of a process that sees this Hub and nothing else, its cache empty."""
        self.homes += 1
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
        }
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.directory / f"home{self.homes}"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # with hf_xet installed, clients do not use LFS otherwise
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts on another host
        }
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    # --- access

    def user(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def allow(self, request: Request, kind: str, repo_id: str, write: bool) -> Repository:
        """A private repository looks to strangers as if it did not exist."""
        user, repo = self.user(request), self.repositories.get((kind, repo_id))
        if repo is None or (repo.private and user != repo.owner):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and user != repo.owner:
            if user is None:
                raise HubError(401, "Invalid username or password.")
            raise HubError(403, f"You don't have the rights to write to {repo_id}")
        return repo

    def answer(self, request: Request) -> Response:
        try:
            with self.lock:
                return self.dispatch(request)
        except HubError as error:
            return error.response
        except Exception:
            self.problems.append(f"{request.method} {request.url}: {traceback.format_exc()}")
            return Response.of({"error": "the test's server is broken"}, 500)

    def dispatch(self, request: Request) -> Response:
        for method, pattern, write, function in ROUTES:
            match = pattern.fullmatch(request.path if request.origin == "hub" else f"cdn:{request.path}")
            if match and method == request.method.replace("HEAD", "GET"):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                if "id" in match.re.groupindex:
                    kind, repo_id = groups.pop("kind", "model"), groups.pop("id")
                    groups["repo"] = self.allow(request, kind, repo_id, write)
                if "revision" in match.re.groupindex:
                    groups["commit"] = groups["repo"].resolve(groups.pop("revision", "main"))
                return function(self, request, **groups)
        self.problems.append(f"no route: {request.origin} {request.method} {request.url}")
        return Response.of({"error": "Not found"}, 404)

    # --- accounts and repositories

    @route("GET", "/api/agent-harnesses")  # every library, once per HF_HOME, for its User-Agent
    def harnesses(self, request):
        return Response.of({"standardEnvVars": [], "harnesses": {}})

    @route("GET", "/api/whoami-v2")  # HfApi.whoami; transformers' push_to_hub of a name without owner
    def whoami(self, request):
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return Response.of({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})

    @route("POST", "/api/repos/create")  # HfApi.create_repo
    def create(self, request):
        user, wanted = self.user(request), request.json()
        owner, kind = wanted.get("organization") or user, wanted.get("type") or "model"
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != owner:
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.repositories:
            return Response.of({"error": f"You already created this {kind} repo", "url": url}, 409)
        repo = Repository(kind, repo_id, private=wanted.get("visibility") == "private")
        repo.commit("main", {".gitattributes": Blob(GITATTRIBUTES, lfs=False)}, "initial commit")
        self.repositories[kind, repo_id] = repo
        return Response.of({"url": url, "name": repo_id, "id": repo_id})

    @route("DELETE", "/api/repos/delete")  # HfApi.delete_repo
    def delete(self, request):
        named = request.json()
        kind, owner = named.get("type") or "model", named.get("organization") or self.user(request)
        repo = self.allow(request, kind, f"{owner}/{named['name']}", write=True)
        del self.repositories[kind, repo.id]
        return Response.of({})

    @route("PUT", REPO + "/settings", write=True)  # HfApi.update_repo_settings(private=, gated=)
    def settings(self, request, repo):
        wanted = request.json()
        repo.gated = wanted.get("gated", repo.gated)
        repo.private = wanted.get("visibility", "private" if repo.private else "public") == "private"
        return Response.of({"private": repo.private, "gated": repo.gated})

    # --- what a repository holds

    @route(
        "GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?"
    )  # model_info, dataset_info, repo_exists; from_pretrained
    def info(self, request, repo, commit):
        card = front_matter(commit.files["README.md"].content.decode()) if "README.md" in commit.files else {}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in request.query:
            for sibling in siblings:
                entry = self.entry(sibling["rfilename"], commit.files[sibling["rfilename"]])
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
        tags = [*card.get("tags", []), *(card[key] for key in ("library_name", "pipeline_tag") if key in card)]
        known = {
            "author": repo.owner,
            "sha": commit.oid,
            "lastModified": commit.date,
            "createdAt": next(iter(repo.commits.values())).date,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "cardData": card,
            "siblings": siblings,
            **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card and repo.kind == "model"},
        }
        wanted = request.query.get("expand", known)
        return Response.of({"id": repo.id, **{key: known[key] for key in known if key in wanted}})

    @route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")  # list_repo_tree, snapshot_download, hf://
    def tree(self, request, repo, commit, folder=""):
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
        if not inside and folder:
            raise HubError(404, f"{folder} does not exist on {commit.oid}", "EntryNotFound")
        entries = {}
        for path, blob in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "oid": self.folder_oid(name), "size": 0}
            entries[path] = self.entry(path, blob)
        if request.query.get("recursive") != ["true"]:
            entries = {name: entry for name, entry in entries.items() if "/" not in name.removeprefix(prefix)}
        return Response.of(self.expanded(request.query, entries.values(), commit))

    @route("POST", REPO + r"/paths-info/(?P<revision>[^/]+)")  # HfApi.get_paths_info; hf:// of datasets
    def paths_info(self, request, repo, commit):
        form = parse_qs(request.body.decode())
        entries = []
        for path in form.get("paths", []):
            if path in commit.files:
                entries.append(self.entry(path, commit.files[path]))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                entries.append({"type": "directory", "path": path, "oid": self.folder_oid(path), "size": 0})
        return Response.of(self.expanded(form, entries, commit))

    @staticmethod
    def entry(path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content)}
        return entry | (
            {"lfs": {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}} if blob.lfs else {}
        )

    @staticmethod
    def folder_oid(path: str) -> str:
        return hashlib.sha1(path.encode()).hexdigest()

    @staticmethod
    def expanded(options: dict, entries, commit: Commit) -> list[dict]:
        """With `expand=True`, when each entry changed. (Here: when its whole revision did.)"""
        last = {"lastCommit": {"id": commit.oid, "title": commit.title, "date": commit.date}}
        return [entry | (last if options.get("expand", [""])[0].lower() == "true" else {}) for entry in entries]

    @route("GET", REPO + "/refs")  # HfApi.list_repo_refs
    def refs(self, request, repo):
        def listed(commits, folder):
            return [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": c.oid} for name, c in commits.items()
            ]

        branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        return Response.of({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("GET", REPO + r"/commits/(?P<revision>[^/]+)")  # HfApi.list_repo_commits
    def history(self, request, repo, commit):
        commits = []
        while commit is not None:
            head = {"id": commit.oid, "title": commit.title, "message": commit.message, "date": commit.date}
            commits.append(head | {"authors": [{"user": commit.author}]})
            commit = commit.parent
        return Response.of(commits)

    @route("POST", REPO + r"/branch/(?P<branch>[^/]+)", write=True)  # HfApi.create_branch
    def create_branch(self, request, repo, branch):
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(request.json().get("startingPoint", "main"))
        return Response.of({})

    @route("POST", REPO + r"/tag/(?P<revision>[^/]+)", write=True)  # HfApi.create_tag
    def create_tag(self, request, repo, commit):
        tag = request.json()["tag"]
        if tag in repo.tags:
            raise HubError(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = commit
        return Response.of({})

    @route("DELETE", REPO + r"/(?P<kind_of_ref>branch|tag)/(?P<name>[^/]+)", write=True)  # delete_branch, delete_tag
    def delete_ref(self, request, repo, kind_of_ref, name):
        refs = repo.branches if kind_of_ref == "branch" else repo.tags
        if name == "main" or refs.pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return Response.of({})

    # --- upload: every push_to_hub, upload_file, upload_folder and create_commit goes through these in this order

    @route("POST", "/api/validate-yaml")
    def validate_card(self, request):
        try:
            card = front_matter(request.json()["content"])
        except ValueError as error:
            return Response.of({"errors": [{"message": str(error)}], "warnings": []}, 400)
        missing = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return Response.of({"errors": [], "warnings": missing})

    @route("POST", REPO + r"/preupload/(?P<revision>[^/]+)", write=True)
    def preupload(self, request, repo, commit):
        patterns = [line.split()[0] for line in commit.files[".gitattributes"].content.decode().splitlines()]
        files = []
        for file in request.json()["files"]:
            by_name = any(fnmatch(Path(file["path"]).name, pattern) for pattern in patterns)
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            mode = "lfs" if by_name or binary or file["size"] > REGULAR_LIMIT else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in commit.files:  # lets the client leave out what has not changed
                files[-1]["oid"] = commit.files[file["path"]].etag
        return Response.of({"files": files, "commitOid": commit.oid})

    @route("POST", FILES + r"\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, request, repo):
        objects = []
        for wanted in request.json()["objects"]:
            upload = {"href": f"{self.cdn}/upload/{wanted['oid']}"}
            verify = {
                "href": f"{self.url}/{'datasets/' * (repo.kind == 'dataset')}{repo.id}.git/info/lfs/objects/verify"
            }
            known = wanted["oid"] in self.objects
            objects.append(wanted | ({} if known else {"actions": {"upload": upload, "verify": verify}}))
        return Response.of({"transfer": "basic", "objects": objects})

    @route("PUT", "cdn:/upload/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        self.objects[oid] = request.body
        return Response()

    @route("POST", FILES + r"\.git/info/lfs/objects/verify", write=True)
    def lfs_verify(self, request, repo):
        wanted = request.json()
        if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, f"Object {wanted['oid']} was not uploaded")
        return Response.of({})

    @route("POST", REPO + r"/commit/(?P<branch>[^/]+)", write=True)
    def commit(self, request, repo, branch):
        if branch not in repo.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head, *operations = (json.loads(line) for line in request.body.splitlines())
        parent, files = repo.branches[branch], dict(repo.branches[branch].files)
        if not parent.oid.startswith(head["value"].get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for key, value in ((operation["key"], operation["value"]) for operation in operations):
            path = value["path"]
            if key == "file":
                files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = Blob(self.objects[value["oid"]], lfs=True)
            else:
                gone = [name for name in files if name == path or f"{name}/".startswith(f"{path.rstrip('/')}/")]
                gone = [name for name in gone if key == "deletedFolder" or name == path]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
        made = repo.commit(branch, files, head["value"]["summary"], head["value"].get("description", ""))
        url = f"{self.url}/{'datasets/' * (repo.kind == 'dataset')}{repo.id}/commit/{made.oid}"
        return Response.of({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    # --- download

    @route(
        "GET", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
    )  # hf_hub_download: HEAD, then GET; hf:// by ranges
    def resolve(self, request, repo, commit, path):
        user = self.user(request)
        if repo.gated and user != repo.owner:
            reason = "is restricted" if user is None else "is restricted and you are not in the authorized list"
            raise HubError(401 if user is None else 403, f"Access to {repo.kind} {repo.id} {reason}.", "GatedRepo")
        if path not in commit.files:  # with the commit, so that clients remember the absence
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            return ranged(request, blob.content, headers, (repo.id, path))
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        location = f"{self.cdn}/{repo.id}/{blob.sha256}/{quote(path)}"
        return Response(b"", 302, headers | {"Location": location})

    @route("GET", "cdn:/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/(?P<path>.+)")
    def lfs_download(self, request, name, oid, path):
        return ranged(request, self.objects[oid], {"ETag": f'"{oid}"'}, (name, path))


def ranged(request: Request, content: bytes, headers: dict[str, str], served: tuple[str, str]) -> Response:
    """The whole file, or the part that the `Range` header asks for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None:
        return Response(content, 200, headers, served)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        return Response(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return Response(content[start:stop], 206, headers, served)


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


def handler(hub: HubServer, origin: str) -> type[BaseHTTPRequestHandler]:
    """One connection per request (HTTP/1.0), so that no thread waits for a client's next one."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def log_message(self, *args):
            pass

        def answer(self):
            address, length = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with hub.lock:
                fault = next(
                    (
                        fault
                        for fault in hub.faults
                        if fault.times > 0
                        and fault.method in (None, self.command)
                        and re.search(fault.path_regex, unquote(address.path))
                    ),
                    None,
                )
                if fault:
                    fault.times -= 1
            cut = fault is not None and fault.response is None
            body = self.rfile.read(length // 2 if cut else length)
            request = Request(origin, self.command, address.path, parse_qs(address.query), headers, body)
            if cut and length:
                response = Response(status=0)
            else:
                response = fault.response if fault and not cut else hub.answer(request)
            content = b"" if self.command == "HEAD" else response.body
            sent = content[: len(content) // 2] if cut else content
            with_token = "authorization" in headers
            with hub.lock:
                hub.log.append(
                    Record(
                        origin,
                        self.command,
                        request.url,
                        response.status,
                        len(body),
                        len(sent),
                        with_token,
                        response.served,
                    )
                )
                if with_token and origin == "cdn":
                    hub.problems.append(f"token sent to the CDN: {self.command} {request.url}")
            if response.status == 0:
                return
            with suppress(ConnectionError):  # a client may leave early
                self.send_response(response.status)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(response.body)))
                self.end_headers()
                self.wfile.write(sent)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    return Handler


@contextmanager
def connected(hub: HubServer):
    """Point the client libraries of this process at the server, with an empty cache and without waits, and back again.

    They read the environment when they are imported, so their constants are computed anew from the changed environment.
    """
    import datasets.config
    import transformers.dynamic_module_utils
    from huggingface_hub import HfFileSystem, constants, hf_api
    from huggingface_hub.utils import _detect_agent, _http, close_session

    def anew():
        close_session()
        importlib.reload(constants)
        importlib.reload(datasets.config)
        HfFileSystem.clear_instance_cache()

    def only_here(host, *args, resolve=socket.getaddrinfo, **kwargs):
        if host not in ("127.0.0.1", "localhost"):
            hub.problems.append(f"connection to {host}")
            raise socket.gaierror(f"{host} is not part of the test")
        return resolve(host, *args, **kwargs)

    modules, clock = set(sys.modules), SimpleNamespace(**{**vars(time), "sleep": hub.waits.append})
    with pytest.MonkeyPatch.context() as patch:
        environment = hub.environment()
        for name in os.environ.keys() - environment.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        anew()
        patch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # asks another host
        patch.setattr(hf_api.api, "endpoint", hub.url)
        patch.setattr(hf_api.api, "_whoami_cache", {})
        patch.setattr(_detect_agent, "_registry", None)
        for module in (_http, importlib.import_module("huggingface_hub.file_download")):
            patch.setattr(module, "time", clock)
        cache = str(Path(environment["HF_HOME"]) / "modules")
        for module in (transformers.utils, transformers.utils.hub, transformers.dynamic_module_utils):
            patch.setattr(module, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(socket, "getaddrinfo", only_here)
        yield
    for name in sys.modules.keys() - modules:
        if name.startswith("transformers_modules"):
            del sys.modules[name]
    anew()
