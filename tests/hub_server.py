"""A Hugging Face Hub on 127.0.0.1, for tests over the wire with the real client libraries.

It has two origins, as the real one: `hub.url` answers the API and serves small files, and redirects to `hub.cdn` for
the bytes of large (LFS) ones. The fixture `hub` of conftest.py starts it and sends the clients of this process there:

    HfApi().create_repo("owner/model")                  # the token in use is that of "owner"; "hf_guest" is another
    hub.fail(method="PUT", status=500, times=2)         # refuse the next two uploads; `hub.cut` breaks them off
    hub.requests("GET", "/resolve/")                    # the log; `hub.downloaded("owner/model")`: bytes by file
    subprocess.run(command, env=hub.environment())      # another process, with an empty cache

`hub.problems` lists what must not happen: requests that no route answers, a token sent to the CDN, a connection to
another host (the server is the clients' proxy), an error in the server. The fixture fails the test if there are any.
"""

import os
import re
import threading
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repository import Repository
from tests.hub_routes import HubError, Request, Response, dispatch


@dataclass(frozen=True)
class Record:
    """One request and its answer. `status` is 0 if the connection was cut before there was one."""

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
    response: Response | None  # None: cut the connection


class HubServer:
    """A Hub and its CDN, each on a port of its own while the context is open.

    Args:
        directory: under which `environment` puts the caches of clients.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.log: list[Record] = []
        self.problems: list[str] = []
        self.waits: list[float] = []
        self.faults: list[Fault] = []
        self.environments = 0
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(self, origin)) for origin in ("hub", "cdn")]
        hub, cdn = (server.server_port for server in self.servers)
        self.url, self.cdn = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"  # older clients compare hosts only
        for server in self.servers:
            server.daemon_threads = False  # closing waits for the requests in progress
        self.threads = [threading.Thread(target=server.serve_forever, args=[0.01]) for server in self.servers]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server, thread in zip(self.servers, self.threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()

    # ---- for tests

    def fail(self, method=None, path_regex="", status=500, times=1, headers=None) -> None:
        """Refuse the next `times` requests of a method and path, to either origin."""
        refusal = Response.of({"error": f"refused with {status} by the test"}, status, headers)
        self.faults.append(Fault(method, path_regex, times, refusal))

    def cut(self, method=None, path_regex="", times=1) -> None:
        """Close the connection when half of the body has arrived (uploads) or has been sent (downloads).

        A request and an answer without a body are cut before the answer.
        """
        self.faults.append(Fault(method, path_regex, times, None))

    def requests(self, method=None, path_regex="") -> list[Record]:
        """The log, or what it has of a method and path."""
        with self.lock:
            return [record for record in self.log if matches(record, method, path_regex)]

    def downloaded(self, repo_id: str) -> Counter[str]:
        """Bytes sent of each file of a repository."""
        total = Counter()
        for record in self.requests("GET"):
            if record.served and record.served[0] == repo_id:
                total[record.served[1]] += record.response_bytes
        return total

    def uploaded(self) -> int:
        """Bytes of large files that arrived; small files travel inside the commit."""
        return sum(record.request_bytes for record in self.requests("PUT", "^/upload/"))

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[kind, repo_id]

    def environment(self, token: str | None = "hf_owner") -> dict[str, str]:
        """The environment of a process that knows this Hub only and has an empty cache, a new one in each call."""
        self.environments += 1
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.directory / f"home{self.environments}"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # with hf_xet installed, clients do not use LFS otherwise
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts on another host
            "http_proxy": self.url,  # what is meant for other hosts arrives here and is noticed
            "https_proxy": self.url,
            "no_proxy": "127.0.0.1,localhost",
        } | ({"HF_TOKEN": token} if token else {})
        foreign = re.compile("HF_|HUGGING|TRANSFORMERS_|.*_PROXY", re.IGNORECASE)
        return {name: value for name, value in os.environ.items() if not foreign.match(name)} | ours

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and matches(request, fault.method, fault.path_regex):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Response:
        try:
            with self.lock:
                return dispatch(request)
        except HubError as error:
            return error.response
        except Exception:
            self.problems.append(f"{request.method} {request.url}: {traceback.format_exc()}")
            return Response.of({"error": "the tests' Hub is broken"}, 500)


def matches(request: Request | Record, method: str | None, path_regex: str) -> bool:
    return method in (None, request.method) and re.search(path_regex, unquote(request.path)) is not None


def handler(hub: HubServer, origin: str) -> type[BaseHTTPRequestHandler]:
    """One connection per request (HTTP/1.0), so that no thread stays to wait for a client's next one."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds; for a client that stops in the middle

        def log_message(self, *args: object) -> None:
            """Say nothing on stderr."""

        def handle_request(self) -> None:
            address = urlsplit(f"//{self.path}" if self.command == "CONNECT" else self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            target = (self.command, address.netloc, address.path, parse_qs(address.query))
            request = Request(hub, origin, *target, headers, b"")
            length, fault = int(headers.get("content-length", 0)), hub.fault(request)
            cut = fault is not None and fault.response is None
            request.body = self.rfile.read(length // 2 if cut else length)
            if cut:
                response = Response(status=0) if length else hub.answer(request)
            else:
                response = fault.response if fault else hub.answer(request)
            body = b"" if self.command == "HEAD" else response.body
            if cut:
                body = body[: len(body) // 2]
                response.status = response.status if body else 0
            with_token = "authorization" in headers
            counts = (response.status, len(request.body), len(body), with_token)
            with hub.lock:  # before the client can go on
                hub.log.append(Record(origin, self.command, request.url, *counts, response.served))
                if with_token and origin == "cdn":
                    hub.problems.append(f"token sent to the CDN: {self.command} {request.url}")
            with suppress(ConnectionError):  # a client may leave early
                if response.status:
                    self.send_response(response.status)
                    for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = handle_request

    return Handler
