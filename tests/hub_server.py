"""A Hugging Face Hub on 127.0.0.1 for tests: the real client talks to it (hub_client.py), nothing is mocked.

`with HubServer(root) as hub` serves each dataset folder root/<owner>/<name> and makes the faults that a test scripts.
By hand: `python -m tests.hub_server ROOT`. It isn't a hub for work: no uploads, no accounts, whole files in memory.
"""

import argparse
import hashlib
import json
import posixpath
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

Kind = Literal["status", "reset", "drop", "truncate", "wrong_length", "slow", "html", "json"]

ADDRESS = re.compile(  # the repository, what is asked of it, the revision, the path
    r"/(?:api/)?datasets/(\w[\w.-]*/\w[\w.-]*)(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?"
)
LOGIN_PAGE = b"<!DOCTYPE html><html><title>Sign in to the network</title><form>Room number?</form></html>"


@dataclass
class Request:
    """What came and what went back: `status` is 0 where the connection was reset, `sent` is bytes of the body."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    fault: Kind | None


@dataclass
class Fault:
    """What `times` requests get whose "METHOD /path?query" holds the regex `match`, after `skip` that are spared.

    status: `code` and `headers`. reset: no answer, the connection is reset. drop: the same after that many bytes of
    the body (None: half). truncate: an orderly close there. wrong_length: a well-formed answer that ends there.
    slow: the right answer, `delay` seconds late. html: status 200 and a login page. json: status 200 and JSON
    of `body`.
    """

    match: str
    kind: Kind | None
    times: float = 1
    skip: int = 0
    code: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int | None = None
    delay: float = 0.0
    body: Any = None


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]


class Refusal(Exception):
    """Holds a refusing answer; the client reads the reason from its headers."""

    def __init__(self, status: int, code: str, reason: str) -> None:
        self.answer = as_json({"error": reason}, status, {"X-Error-Code": code, "X-Error-Message": reason})


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class Commit:
    """A copy of a repository's files; the sha is a function of their names, sizes and modification times."""

    def __init__(self, repo: str, folder: Path, copies: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        self.folders = {str(parent) for name in self.sizes for parent in Path(name).parents} - {"."}
        state = repr((repo, self.sizes, [path.stat().st_mtime_ns for path in files]))
        self.sha = hashlib.sha1(state.encode()).hexdigest()
        self.copy = copies / self.sha
        if not self.copy.exists():
            shutil.copytree(folder, self.copy)

    def entry(self, path: str) -> dict[str, Any]:
        """Return what the API says of a file or folder."""
        oid, size = hashlib.sha256(f"{self.sha}/{path}".encode()).hexdigest(), self.sizes.get(path, 0)
        entry = {"type": "file" if path in self.sizes else "directory", "path": path, "size": size, "oid": oid[:40]}
        return entry | ({"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if path.endswith(".parquet") else {})

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Return what the API says of all that is in a folder, or below it."""
        below = [path for path in sorted({*self.sizes, *self.folders}) if not folder or path.startswith(folder + "/")]
        if folder and not below:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {self.sha}")
        return [self.entry(path) for path in below if recursive or posixpath.dirname(path) == folder]

    def read(self, path: str, span: str | None) -> Answer:
        """Return a file, or the span of it that a Range header names."""
        if path not in self.sizes:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {self.sha}")
        size, tag = self.sizes[path], f'"{self.entry(path)["oid"]}"'
        headers = {"ETag": tag, "X-Linked-Etag": tag, "X-Linked-Size": str(size), "X-Repo-Commit": self.sha}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        data = (self.copy / path).read_bytes()
        if not (match := re.fullmatch(r"bytes=(\d+)-(\d*)", span or "")):
            return Answer(200, data, headers)
        start, end = int(match[1]), int(match[2] or size) + 1
        if start >= size:
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        return Answer(206, data[start:end], headers | {"Content-Range": f"bytes {start}-{min(end, size) - 1}/{size}"})


class HubServer:
    """Serves at `url` while it is entered. `main` is a folder as it is now; a sha once announced stays what it was.

    `requests` holds what was asked so far, `faults` all that were scripted; `page_size` is entries a page of a listing.
    """

    def __init__(self, root: Path, port: int = 0, page_size: int = 1000) -> None:
        self.root, self.port, self.page_size = root, port, page_size
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self._commits: dict[tuple[str, str], Commit] = {}

    def __enter__(self) -> Self:
        self._copies = tempfile.TemporaryDirectory(prefix="hub-")
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.hub, self.port = self, self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self.lock:
            for connection in self.connections:  # which clients keep open: a stopped hub answers nobody
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._copies.cleanup()

    def fail(self, match: str, kind: Kind, times: float = 1, skip: int = 0, **options: Any) -> Fault:
        """Return the Fault, now scripted; where several match a request, the oldest fires."""
        fault = Fault(match, kind, times, skip, **options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def faults_left(self) -> list[Fault]:
        """Return the faults that haven't fired as often as they should."""
        with self.lock:
            return [fault for fault in self.faults if fault.times > 0]

    def clear(self) -> None:
        """Forget the requests so far, not the faults to come."""
        with self.lock:
            self.requests.clear()

    def next_fault(self, request: str) -> Fault:
        """Return the fault that this request gets, one of no kind where none is due."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    if fault.skip == 0:
                        fault.times -= 1
                        return fault
                    fault.skip -= 1
        return Fault("", None)

    def commit(self, repo: str, revision: str = "main") -> Commit:
        """Return what a revision, `main` or a sha, of a repository is; raise Refusal where there is none."""
        if not (self.root / repo).is_dir():
            raise Refusal(401, "RepoNotFound", "Repository not found")
        with self.lock:
            if revision == "main" or (repo, revision) not in self._commits:  # it may be one of an earlier server's
                commit = Commit(repo, self.root / repo, Path(self._copies.name))
                commit = self._commits.setdefault((repo, commit.sha), commit)
                if revision == "main":
                    return commit
            if (repo, revision) not in self._commits:
                raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return self._commits[repo, revision]

    def answer(self, target: str, span: str | None, form: bytes) -> Answer:
        """Return what an undisturbed hub answers; raise Refusal."""
        url = urlsplit(target)
        if not (match := ADDRESS.fullmatch(url.path)):
            raise Refusal(404, "EntryNotFound", f"{url.path} is no address here")
        repo, verb, revision, path = (unquote(part or "") for part in match.groups())
        commit = self.commit(repo, revision or "main")
        if verb == "resolve":
            return commit.read(path, span)
        if verb == "paths-info":
            paths = parse_qs(form.decode()).get("paths", [])
            return as_json([commit.entry(path) for path in paths if path in {*commit.sizes, *commit.folders}])
        if verb == "tree":
            query = dict(parse_qsl(url.query))
            entries = commit.tree(path, query.get("recursive") == "true")
            start, end = (int(query.get("cursor", 0)) + extra for extra in (0, self.page_size))
            link = f'<{self.url}{url.path}?{urlencode(query | {"cursor": end})}>; rel="next"'
            return as_json(entries[start:end], headers={"Link": link} if end < len(entries) else {})
        siblings = [{"rfilename": name} for name in commit.sizes]
        return as_json({"id": repo, "sha": commit.sha, "private": False, "tags": [], "siblings": siblings})


class _Server(ThreadingHTTPServer):
    hub: HubServer
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that hangs up is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.hub = cast(_Server, self.server).hub
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, span = unquote(self.path), self.headers.get("Range")
        fault = self.hub.next_fault(f"{self.command} {path}")
        try:
            status, body, headers = self.hub.answer(self.path, span, form)
        except Refusal as refusal:
            status, body, headers = refusal.answer
        if fault.kind == "status":
            status, body, headers = fault.code, b"a fault that a test scripted", fault.headers
        elif fault.kind == "html":
            status, body, headers = 200, LOGIN_PAGE, {"Content-Type": "text/html"}
        elif fault.kind == "json":
            status, body, headers = as_json(fault.body)
        cut = body
        if fault.kind in ("drop", "truncate", "wrong_length"):
            cut = body[: len(body) // 2 if fault.after is None else fault.after]
        length = len(cut if fault.kind == "wrong_length" else body)
        if fault.kind == "reset":
            status, cut = 0, b""
        elif self.command == "HEAD":
            cut = b""
        with self.hub.lock:  # before the answer, so that it's there once a client has that
            self.hub.requests.append(Request(self.command, path, span, status, len(cut), fault.kind))
        time.sleep(fault.delay)
        if fault.kind != "reset":
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(cut)
        if fault.kind in ("reset", "drop"):  # closed without lingering, the connection ends with a RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection |= fault.kind in ("reset", "drop", "truncate")

    do_HEAD = do_POST = do_GET


def main() -> None:
    from tests.hub_client import hub_environment
    from tests.zyda import make_zyda, zyda_documents

    parser = argparse.ArgumentParser(description="Serve the dataset folders ROOT/OWNER/NAME as a Hugging Face Hub.")
    parser.add_argument("root", type=Path, help="gets a small Zyda-2 where it holds no dataset")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    if not any(arguments.root.glob("*/*/")):
        make_zyda(arguments.root, zyda_documents(4000))
    with tempfile.TemporaryDirectory() as home, HubServer(arguments.root, arguments.port) as hub:
        variables = " ".join(f"{name}={value}" for name, value in hub_environment(hub, Path(home)).items())
        print(hub.url, variables, sep="\n", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
