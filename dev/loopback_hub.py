"""A small Hugging Face hub on the loopback interface, for tests and measurements.

It speaks as much HTTP as a download needs: what the hub says of a model, redirects to where contents are,
ranges, ETags, errors. It counts every byte that it serves, and can break connections off.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

LARGE = 1 << 10  # bytes from which a file is served from another place, as the hub does
PIECE = 1 << 14  # bytes of a write


@dataclass
class Model:
    """A model of the hub: `revisions` are names of commits, and `commits` are folders with the files.

    access  "open", "private" (needs `token`) or "gated" (needs terms to be accepted)
    """

    commits: dict[str, Path]
    revisions: dict[str, str]
    access: str = "open"
    token: str = "hf_secret"


@dataclass
class Request:
    """What was asked, and the bytes of the file that were sent."""

    method: str
    path: str
    file: str = ""
    start: int = 0
    sent: int = 0


@dataclass
class LoopbackHub:
    """The server, as a context manager. `url` is its address.

    breaks  is asked for every answer with contents, with the file and the bytes to send, and may say after
            how many of them the connection breaks
    """

    models: dict[str, Model] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    breaks: Callable[[str, int], int | None] = lambda file, size: None
    status: int | None = None  # the answer to everything, if it is given
    page: str | None = (
        None  # what everything is answered with instead, as a network does that asks for a login
    )
    ranges: bool = True  # whether parts of a file can be asked for
    pause: Callable[[str], None] = lambda file: None  # is called before each piece

    def add(self, name: str, folder: Path, revision: str = "main", **options: str) -> str:
        """Let a revision of a model be the files of a folder. Returns the commit."""
        contents = "".join(f"{path}{path.stat().st_size}" for path in sorted(folder.rglob("*")))
        commit = hashlib.sha1(f"{name}{contents}".encode()).hexdigest()
        model = self.models.setdefault(name, Model({}, {}, **options))
        model.commits[commit], model.revisions[revision] = folder, commit
        return commit

    def served(self, file: str) -> list[tuple[int, int]]:
        """Where each answer with contents of a file began, and how many bytes were sent."""
        return [
            (each.start, each.sent) for each in self.requests if each.file == file and each.method == "GET"
        ]

    def __enter__(self) -> "LoopbackHub":
        hub = self

        class Handler(Answers):
            def setup(self) -> None:
                self.hub = hub
                super().setup()

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class QuietServer(ThreadingHTTPServer):
    """Says nothing of connections that the other side broke off."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class Answers(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        request = Request(method, path)
        self.hub.requests.append(request)
        if self.hub.status is not None:
            return self.refuse(self.hub.status)
        if self.hub.page is not None:
            return self.send_body(self.hub.page.encode(), "text/html")
        if (signed := self.headers.get("Authorization")) and signed not in self.known():
            return self.refuse(401, message="Invalid credentials in Authorization header")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            of_files = parts[4:5] == ["tree"]
            return self.describe("/".join(parts[2:4]), "/".join(parts[5:]) or "main", of_files)
        if parts[0] == "contents":  # where large files are
            name, commit, file = "/".join(parts[1:3]), parts[3], "/".join(parts[4:])
            return self.send_file(request, self.hub.models[name].commits[commit] / file, commit, file)
        if len(parts) >= 5 and parts[2] == "resolve":
            return self.resolve(request, "/".join(parts[:2]), parts[3:])
        return self.refuse(404)

    def known(self) -> set[str]:
        """What a request may sign with."""
        return {f"Bearer {model.token}" for model in self.hub.models.values()}

    def model(self, name: str, contents: bool = True) -> Model | None:
        """The model, unless it or its contents must not be seen. Then an error has been sent. The list of a
        gated model's files is open to all."""
        model = self.hub.models.get(name)
        signed = model is not None and self.headers.get("Authorization") == f"Bearer {model.token}"
        if model is None or (model.access == "private" and not signed):
            self.refuse(401 if not self.headers.get("Authorization") else 404, "RepoNotFound")
            return None
        if model.access == "gated" and contents and not signed:
            self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return None
        return model

    def describe(self, name: str, revision: str, of_files: bool) -> None:
        """Say what there is of a model, or list its files in the other of two ways."""
        model = self.model(name, contents=False)
        if model is None:
            return
        commit = revision if revision in model.commits else model.revisions.get(revision, "")
        if not commit:
            return self.refuse(404, "RevisionNotFound")
        folder = model.commits[commit]
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): (path.stat().st_size, etag(path)) for path in paths}
        about: object
        if of_files:
            about = [
                {"type": "file", "path": file, "size": size, "oid": tag} | in_lfs("oid", size, tag)
                for file, (size, tag) in files.items()
            ]
        else:
            siblings = [
                {"rfilename": file, "size": size, "blobId": tag} | in_lfs("sha256", size, tag)
                for file, (size, tag) in files.items()
            ]
            about = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        return self.send_body(json.dumps(about).encode(), "application/json")

    def send_body(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def resolve(self, request: Request, name: str, rest: list[str]) -> None:
        model = self.model(name)
        if model is None:
            return
        commit = rest[0] if rest[0] in model.commits else model.revisions.get(rest[0], "")
        file = "/".join(rest[1:])
        if not commit:
            return self.refuse(404, "RevisionNotFound")
        path = model.commits[commit] / file
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        if path.stat().st_size < LARGE:
            return self.send_file(request, path, commit, file)
        self.send_response(302)
        self.send_header("Location", f"{self.hub.url}/contents/{name}/{commit}/{file}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        self.send_header("X-Linked-ETag", f'"{etag(path)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send_file(self, request: Request, path: Path, commit: str, file: str) -> None:
        """Send a file, or the range of it that was asked for."""
        size = path.stat().st_size
        start, stop = 0, size
        asked = self.headers.get("Range") if self.hub.ranges else None
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, size) if last else size
            if start >= size:
                return self.refuse(416)
        request.file, request.start = file, start
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{etag(path)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if request.method == "GET":
            self.send_bytes(request, path, start, stop)
        return None

    def send_bytes(self, request: Request, path: Path, start: int, stop: int) -> None:
        cut = self.hub.breaks(request.file, stop - start)
        end = stop if cut is None else start + min(cut, stop - start)
        with path.open("rb") as source:
            source.seek(start)
            while start + request.sent < end:
                self.hub.pause(request.file)
                data = source.read(min(PIECE, end - start - request.sent))
                try:
                    self.wfile.write(data)
                except OSError:  # the other side has gone
                    self.close_connection = True
                    return
                request.sent += len(data)
        if cut is not None and end < stop:
            self.close_connection = True

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send_response(status)
        if message:
            self.send_header("X-Error-Message", message)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def in_lfs(key: str, size: int, tag: str) -> dict[str, object]:
    """What a list of files says of a large one besides."""
    return {"lfs": {key: tag, "size": size, "pointerSize": 130}} if size >= LARGE else {}


def etag(path: Path) -> str:
    """The name of a file's contents: the SHA-256 of a large file, as the hub has it, and another digest of
    others."""
    about = path.stat()
    return digest(path, about.st_size, about.st_mtime_ns)


@cache
def digest(path: Path, size: int, changed: int) -> str:
    found = hashlib.new("sha256" if size >= LARGE else "sha1")
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            found.update(data)
    return found.hexdigest()
