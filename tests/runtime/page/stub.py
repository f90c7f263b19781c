"""A server that answers the page as it is told to: what the real one does only seldom, it does at once."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "runtime" / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
SNAPSHOT: dict[str, Any] = {
    "layers": 3,
    "experts": 4,
    "resident": False,
    "places": ["sslb", "sgbf", "bssf"],
    "last": [{"hit": [0], "miss": [2]}, {"hit": [0], "miss": []}, {"hit": [], "miss": []}],
    "tokens_per_second": 12.5,
    "hit_ratio": 0.75,
    "running": 1,
    "queued": 2,
    "link": {"bytes_per_second": 3 * 1024**3, "waited_share": 0.25},
    "copied_bytes": 5 * 1024**2,
    "wasted_bytes": 1024**2,
}


@dataclass
class Refusal:
    """An answer that is none."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None


# A piece of an answer: text, seconds to wait, an event as it is, a reason to finish, or None to break off.
Part = str | float | dict[str, Any] | tuple[str, str] | None


@dataclass
class Stub:
    """The server, as a context manager. `url` is its address.

    answer    is asked with each request's body
    requests  path and body of all requests that were let in
    snapshot  what the experts' stream sends, each time that it has changed
    gone      is set when a client has left during an answer
    """

    answer: Callable[[dict[str, Any]], Refusal | Iterable[Part]] = lambda body: ["Fine."]
    key: str | None = None
    snapshot: dict[str, Any] = field(default_factory=lambda: dict(SNAPSHOT))
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    closing: bool = False

    def reset(self) -> None:
        """Be as at the start, on the same port."""
        fresh = Stub()
        self.answer, self.key, self.snapshot = fresh.answer, fresh.key, fresh.snapshot
        self.requests, self.gone = fresh.requests, fresh.gone

    def __enter__(self) -> "Stub":
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # an answer ends where the connection does

            def do_GET(self) -> None:
                stub.get(self)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.post(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing = True
        self.server.shutdown()
        self.server.server_close()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        if path == "/v1/models":
            if self.lets_in(handler):
                reply(handler, 200, {"object": "list", "data": [{"id": "demo", "object": "model"}]})
        elif path == "/experts/stream":
            if self.lets_in(handler):
                self.stream_experts(handler)
        else:
            file = PAGE / (path.lstrip("/") or "index.html")
            if file.parent != PAGE or not file.is_file():
                return reply(handler, 404, {"error": {"message": f"no {path}"}})
            head(handler, 200, TYPES[file.suffix])
            handler.wfile.write(file.read_bytes())

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if not self.lets_in(handler):
            return
        self.requests.append((handler.path, body))
        parts = self.answer(body)
        if isinstance(parts, Refusal):
            return reply(
                handler,
                parts.status,
                {"error": {"message": parts.message, "code": parts.code}},
                **parts.headers,
            )
        head(handler, 200, "text/event-stream")
        try:
            self.stream(handler, parts, body)
        except OSError:
            self.gone.set()

    def stream(self, handler: BaseHTTPRequestHandler, parts: Iterable[Part], body: dict[str, Any]) -> None:
        chat = "messages" in body
        count, reason = 0, "stop"
        for part in parts:
            if part is None:
                return
            if isinstance(part, float):
                time.sleep(part)
            elif isinstance(part, dict):
                event(handler, part)
            elif isinstance(part, tuple):
                reason = part[1]
            else:
                count += 1
                event(handler, {"choices": [{"delta": {"content": part}} if chat else {"text": part}]})
        event(handler, {"choices": [{"delta": {}, "finish_reason": reason}]})
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        event(handler, {"choices": [], "usage": usage})
        handler.wfile.write(b"data: [DONE]\n\n")

    def stream_experts(self, handler: BaseHTTPRequestHandler) -> None:
        head(handler, 200, "text/event-stream")
        sent = ""
        try:
            while not self.closing:
                if (now := json.dumps(self.snapshot)) != sent:
                    event(handler, json.loads(now))
                    sent = now
                time.sleep(0.02)
        except OSError:
            pass

    def lets_in(self, handler: BaseHTTPRequestHandler) -> bool:
        if self.key is None or handler.headers.get("Authorization") == f"Bearer {self.key}":
            return True
        reply(handler, 401, {"error": {"message": "wrong key"}})
        return False


def head(handler: BaseHTTPRequestHandler, status: int, kind: str, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": kind, "Content-Security-Policy": POLICY, **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()


def reply(handler: BaseHTTPRequestHandler, status: int, body: dict[str, Any], **headers: str) -> None:
    head(handler, status, "application/json", **headers)
    handler.wfile.write(json.dumps(body).encode())


def event(handler: BaseHTTPRequestHandler, data: dict[str, Any]) -> None:
    handler.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
    handler.wfile.flush()
