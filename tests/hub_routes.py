"""What the tests' Hub answers: each route of the protocol, with the client call that needs it."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote

from tests.hub_repository import Blob, Commit, Repository, front_matter

if TYPE_CHECKING:
    from tests.hub_server import HubServer

TOKENS = {"hf_owner": "owner", "hf_guest": "guest"}
LFS = ["*.safetensors", "*.bin", "*.pt", "*.onnx", "*.npz", "*.parquet", "*.arrow", "*.zip"]
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS)
REGULAR_LIMIT = 10 * 2**20  # bytes; larger files are LFS whatever their name, and so are binary ones


@dataclass
class Request:
    hub: "HubServer"
    origin: str
    method: str
    host: str  # "" unless the server is used as a proxy
    path: str  # still percent-encoded: revisions and folders may contain "/"
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    user: str | None = None
    repo: Repository | None = None
    commit: Commit | None = None

    @property
    def url(self) -> str:
        return unquote(self.path)

    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    served: tuple[str, str] | None = None  # repository and file that the body is of

    @classmethod
    def of(cls, value: object, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """An error in the Hub's form: clients choose their exception by `X-Error-Code` more than by the status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        headers = {"X-Error-Message": message, **(headers or {})} | ({"X-Error-Code": code} if code else {})
        self.response = Response.of({"error": message}, status, headers)


REPO = r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+(?:/[^/]+)?)"
FILES = r"/(?:(?P<kind>dataset)s/)?(?P<id>[^/]+(?:/[^/]+)?)"
ROUTES = []


def route(method: str, pattern: str, write: bool = False):
    """Answer requests by a function, which gets the request, and the groups of the pattern by name.

    Three groups become attributes of the request: `kind` and `id` its `repo`, after the user's right to read it (or to
    `write`) was checked, and `revision` its `commit`.
    """

    def register(function):
        ROUTES.append((method, re.compile(pattern), write, function))
        return function

    return register


def dispatch(request: Request) -> Response:
    if request.host and not request.host.startswith("datasets-server."):
        request.hub.problems.append(f"connection to {request.host}")
        raise HubError(403, f"{request.host} is not part of the test")
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token and token not in TOKENS:
        raise HubError(401, "Invalid credentials in Authorization header")
    request.user = TOKENS.get(token)
    path = request.path if request.origin == "hub" else f"cdn:{request.path}"
    for method, pattern, write, function in ROUTES:
        match = pattern.fullmatch(path)
        if match and method == request.method.replace("HEAD", "GET"):
            groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            if "id" in pattern.groupindex:
                request.repo = allowed(request, groups.pop("kind", "model"), groups.pop("id"), write)
            if "revision" in pattern.groupindex:
                revision = groups.pop("revision", "main")
                request.commit = request.repo.resolve(revision)
                if request.commit is None:
                    raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return function(request, **groups)
    request.hub.problems.append(f"no route: {request.origin} {request.method} {request.url}")
    return Response.of({"error": "Not found"}, 404)


def allowed(request: Request, kind: str, repo_id: str, write: bool) -> Repository:
    """The repository. A private one looks to strangers as if it did not exist."""
    repo = request.hub.repositories.get((kind, repo_id))
    if repo is None or (repo.private and request.user != repo.owner):
        if request.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    if write:
        check_owner(request, repo.owner)
    return repo


def check_owner(request: Request, owner: str) -> None:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if request.user != owner:
        raise HubError(403, f'You don\'t have the rights to write under the namespace "{owner}"')


# ---- accounts and repositories


@route("GET", "/api/agent-harnesses")  # every library, once per HF_HOME, for its User-Agent
def harnesses(_request):
    return Response.of({"standardEnvVars": [], "harnesses": {}})


@route("GET", "/api/whoami-v2")  # HfApi.whoami
def whoami(request):
    check_owner(request, request.user)
    token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
    return Response.of({"type": "user", "name": request.user, "fullname": "", "orgs": [], "auth": token})


@route("GET", "/info")  # load_dataset, of the data set viewer; without an answer it reads the card
def viewer(_request):
    raise HubError(404, "The data set has not been processed")


@route("POST", "/api/repos/create")  # HfApi.create_repo
def create(request):
    wanted = request.json()
    kind, owner = wanted.get("type") or "model", wanted.get("organization") or request.user
    check_owner(request, owner)
    repo = Repository(kind, f"{owner}/{wanted['name']}", private=wanted.get("visibility") == "private")
    if (kind, repo.id) in request.hub.repositories:
        return Response.of({"error": f"You already created this {kind} repo", "url": request.hub.url + repo.url}, 409)
    repo.commit("main", {".gitattributes": Blob(GITATTRIBUTES.encode(), lfs=False)}, "initial commit")
    request.hub.repositories[kind, repo.id] = repo
    return Response.of({"url": request.hub.url + repo.url, "name": repo.id})


@route("DELETE", "/api/repos/delete")  # HfApi.delete_repo
def delete(request):
    named = request.json()
    repo_id = f"{named.get('organization') or request.user}/{named['name']}"
    repo = allowed(request, named.get("type") or "model", repo_id, write=True)
    del request.hub.repositories[repo.kind, repo.id]
    return Response()


@route("PUT", REPO + "/settings", write=True)  # HfApi.update_repo_settings(private=, gated=)
def settings(request):
    request.repo.gated = request.json().get("gated", request.repo.gated)
    if "visibility" in request.json():
        request.repo.private = request.json()["visibility"] == "private"
    return Response()


# ---- what a repository holds


# HfApi.model_info, dataset_info, repo_exists; transformers, to turn a branch into a commit; pipeline(model=id)
@route("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?")
def info(request):
    repo, commit = request.repo, request.commit
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in request.query:
        entries = [commit.entry(file["rfilename"]) for file in siblings]
        siblings = [{**e, "rfilename": e["path"], "blobId": e["oid"]} for e in entries]
    named = {key: commit.card[key] for key in ("library_name", "pipeline_tag") if key in commit.card}
    known = {
        "author": repo.owner,
        "sha": commit.oid,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "tags": [*(commit.card.get("tags") or []), *named.values()],
        "cardData": commit.card,
        "siblings": siblings,
        **named,
    }
    wanted = request.query.get("expand", known)
    return Response.of({"id": repo.id, **{key: value for key, value in known.items() if key in wanted}})


# HfApi.list_repo_tree, snapshot_download; the hf:// paths of datasets
@route("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(request, folder=""):
    prefix = f"{folder}/" if folder else ""
    inside = [path for path in sorted({*request.commit.files, *request.commit.folders}) if path.startswith(prefix)]
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist on {request.commit.oid}", "EntryNotFound")
    if request.query.get("recursive") != ["true"]:
        inside = [path for path in inside if "/" not in path.removeprefix(prefix)]
    return Response.of([request.commit.entry(path, request.query.get("expand") == ["true"]) for path in inside])


@route("POST", REPO + r"/paths-info/(?P<revision>[^/]+)")  # HfApi.get_paths_info; the hf:// paths of datasets
def paths_info(request):
    form, known = parse_qs(request.body.decode()), {*request.commit.files, *request.commit.folders}
    asked = [path for path in form.get("paths", []) if path in known]
    return Response.of([request.commit.entry(path, form.get("expand") == ["true"]) for path in asked])


@route("GET", REPO + "/refs")  # HfApi.list_repo_refs
def refs(request):
    def listed(commits, folder):
        return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.oid} for n, c in commits.items()]

    branches, tags = listed(request.repo.branches, "heads"), listed(request.repo.tags, "tags")
    return Response.of({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@route("GET", REPO + r"/commits/(?P<revision>[^/]+)")  # HfApi.list_repo_commits
def commits(request):
    authors = [{"user": request.repo.owner}]
    history = [(c.oid, c.title, c.message, c.date, authors) for c in request.commit.history]
    names = ("id", "title", "message", "date", "authors")
    return Response.of([dict(zip(names, values, strict=True)) for values in history])


@route("POST", REPO + r"/branch/(?P<branch>[^/]+)", write=True)  # HfApi.create_branch
def create_branch(request, branch):
    start = request.repo.resolve(request.json().get("startingPoint", "main"))
    if start is None:
        raise HubError(404, "Invalid rev id", "RevisionNotFound")
    if branch in request.repo.branches:
        raise HubError(409, f"Reference already exists: {branch}")
    request.repo.branches[branch] = start
    return Response()


@route("POST", REPO + r"/tag/(?P<revision>[^/]+)", write=True)  # HfApi.create_tag
def create_tag(request):
    tag = request.json()["tag"]
    if tag in request.repo.tags:
        raise HubError(409, f"Tag reference exists already: {tag}")
    request.repo.tags[tag] = request.commit
    return Response()


# ---- upload: HfApi.create_commit, and with it each upload_... and push_to_hub, calls these in this order


@route("POST", "/api/validate-yaml")
def validate_card(request):
    try:
        card = front_matter(request.json()["content"])
    except ValueError as error:
        return Response.of({"errors": [{"message": str(error)}], "warnings": []}, 400)
    missing = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
    return Response.of({"errors": [], "warnings": missing})


@route("POST", REPO + r"/preupload/(?P<revision>[^/]+)", write=True)
def preupload(request):
    patterns = [line.split()[0] for line in request.commit.files[".gitattributes"].content.decode().splitlines()]
    files = []
    for file in request.json()["files"]:
        large = any(fnmatch(PurePosixPath(file["path"]).name, pattern) for pattern in patterns)
        large = large or file["size"] > REGULAR_LIMIT or b"\0" in base64.b64decode(file["sample"])
        files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        if file["path"] in request.commit.files:  # lets the client leave out what has not changed
            files[-1]["oid"] = request.commit.files[file["path"]].etag
    return Response.of({"files": files})


@route("POST", FILES + r"\.git/info/lfs/objects/batch", write=True)
def lfs_batch(request):
    objects = request.json()["objects"]
    for missing in (wanted for wanted in objects if wanted["oid"] not in request.hub.objects):
        verify = f"{request.hub.url}{request.repo.url}.git/info/lfs/objects/verify"
        upload = f"{request.hub.cdn}/upload/{missing['oid']}"
        missing["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
    return Response.of({"transfer": "basic", "objects": objects})


@route("PUT", "cdn:/upload/(?P<oid>[0-9a-f]{64})")
def lfs_upload(request, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the sha256 announced for it")
    request.hub.objects[oid] = request.body
    return Response()


@route("POST", FILES + r"\.git/info/lfs/objects/verify", write=True)
def lfs_verify(request):
    wanted = request.json()
    if len(request.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise HubError(404, f"Object {wanted['oid']} was not uploaded")
    return Response()


@route("POST", REPO + r"/commit/(?P<branch>[^/]+)", write=True)
def commit(request, branch):
    head, *operations = (json.loads(line) for line in request.body.splitlines())
    parent = request.repo.branches.get(branch)
    if parent is None:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    if not parent.oid.startswith(head["value"].get("parentCommit", "")):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for operation in operations:
        key, value, path = operation["key"], operation["value"], operation["value"]["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in request.hub.objects:
                raise HubError(400, f"{path} points to an LFS object that was not uploaded")
            files[path] = Blob(request.hub.objects[value["oid"]], lfs=True)
        else:
            folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
            gone = [name for name in files if (name.startswith(folder) if folder else name == path)]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            files = {name: blob for name, blob in files.items() if name not in gone}
    made = request.repo.commit(branch, files, head["value"]["summary"], head["value"].get("description", ""))
    return Response.of({"commitOid": made.oid, "commitUrl": f"{request.hub.url}{request.repo.url}/commit/{made.oid}"})


# ---- download: hf_hub_download asks by HEAD for the headers, then by GET; the hf:// paths of datasets by ranges


@route("GET", FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(request, path):
    repo, commit = request.repo, request.commit
    if repo.gated and request.user != repo.owner:
        status, reason = (403, " and you are not in the authorized list") if request.user else (401, "")
        raise HubError(status, f"Access to {repo.kind} {repo.id} is restricted{reason}.", "GatedRepo")
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:  # with the commit, so that clients can remember the absence
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    blob = commit.files[path]
    headers["ETag"] = f'"{blob.etag}"'
    if not blob.lfs:
        return ranged(request, blob.content, headers, (repo.id, path))
    headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
    return Response(b"", 302, headers | {"Location": f"{request.hub.cdn}/{repo.id}/{blob.sha256}/{quote(path)}"})


@route("GET", "cdn:/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/(?P<path>.+)")
def lfs_download(request, repo_id, oid, path):
    return ranged(request, request.hub.objects[oid], {"ETag": f'"{oid}"'}, (repo_id, path))


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
