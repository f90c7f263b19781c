"""A server in a thread of the tests."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from runtime import Engine
from runtime.batching.service import Service
from runtime.serve.app import make_app
from runtime.serve.guard import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.running import make_server, serve
from runtime.serve.served import Served


@dataclass(frozen=True)
class Running:
    served: Served
    port: int
    server: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **words: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **words)

    def post(self, path: str, body: object = None, **words: Any) -> httpx.Response:
        given = {"json": body} if body is not None else {}
        return httpx.post(self.url + path, timeout=60, **given, **words)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def running(
    engine: Engine,
    limits: Limits = Limits(),  # noqa: B008
    names: tuple[str, ...] = ("demo",),
    queue: int = 16,
    grace: float = 5.0,
    **words: Any,
) -> Iterator[Running]:
    """Serve on a free port of the loopback, until told to stop or the end. `words` are for `make_app`."""
    with Service(engine, queue) as service, socket.create_server(("127.0.0.1", 0)) as listening:
        served = Served(engine, service, names, Metrics(engine, service), limits)
        server = make_server(make_app(served, **words), limits, grace)
        thread = threading.Thread(target=lambda: asyncio.run(serve(server, served, listening, grace)))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Running(served, listening.getsockname()[1], server)
        finally:
            server.should_exit = True
            thread.join()
            served.pool.shutdown()
