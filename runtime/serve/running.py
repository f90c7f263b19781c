"""Uvicorn, as this server runs it: how it starts, and how it stops."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from runtime.batching.service import Service
from runtime.engine import Engine
from runtime.serve.address import names, url
from runtime.serve.app import make_app
from runtime.serve.connection import patient
from runtime.serve.guard import Keys, Limits
from runtime.serve.metrics import Metrics
from runtime.serve.served import Served
from runtime.shell.command import say

AFTER = 5.0  # seconds in which clients take the last events of answers that were broken off
TICK = 0.05  # seconds between two looks whether to stop


def make_server(app: ASGIApp, limits: Limits, grace: float) -> uvicorn.Server:
    """A server of one process. When it is told to stop, it waits `grace` seconds for answers under way."""
    config = uvicorn.Config(
        app,
        http=patient(limits),  # type: ignore[arg-type]
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=limits.header,
        timeout_keep_alive=limits.idle_time,  # type: ignore[arg-type]
        timeout_graceful_shutdown=grace + AFTER,  # type: ignore[arg-type]
    )
    return uvicorn.Server(config)


@dataclass(frozen=True)
class Setting:
    """How to serve a model.

    names    what clients may call it, its own first
    keys     that let a client in; None lets everybody in
    origins  of pages elsewhere that may ask
    queue    requests that may wait for a place
    grace    seconds that answers may go on when the server is told to stop
    quiet    say nothing but warnings and errors
    """

    names: Sequence[str]
    keys: Keys | None
    origins: Collection[str]
    queue: int
    grace: float
    quiet: bool


def keep_serving(engine: Engine, listening: socket.socket, setting: Setting) -> None:
    """Serve until SIGTERM or Ctrl-C. Returns after SIGTERM, and raises `KeyboardInterrupt` after Ctrl-C."""
    limits, keys = Limits(), setting.keys
    hosts = names(listening) if keys is None else None
    with Service(engine, setting.queue) as service:
        served = Served(engine, service, setting.names, Metrics(engine, service), limits)
        server = make_server(make_app(served, keys, hosts, setting.origins), limits, setting.grace)
        for caveat in () if setting.quiet else service.batch.caveats:
            say(f"note: {caveat}")
        logger, said = logging.getLogger("uvicorn.error"), Said(logging.ERROR)
        logger.addHandler(said)
        # Uvicorn raises the signal that ended it once more, for whoever handled it before.
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            asyncio.run(serve(server, served, listening, setting.grace, setting.quiet))
        finally:
            signal.signal(signal.SIGTERM, before)
            logger.removeHandler(said)
            served.pool.shutdown(wait=False, cancel_futures=True)


async def serve(
    server: uvicorn.Server, served: Served, listening: socket.socket, grace: float, quiet: bool = True
) -> None:
    """Run the server until it is told to stop, then let the service finish what it has taken on."""
    stopping = asyncio.ensure_future(stop(server, served, grace))
    running = asyncio.ensure_future(server.serve([listening]))
    try:
        while not server.started and not running.done():
            await asyncio.sleep(TICK)
        if server.started and not quiet:
            say(f"serving {served.names[0]} at {url(listening)} (Ctrl-C ends it)")
        await running
    finally:
        stopping.cancel()


async def stop(server: uvicorn.Server, served: Served, grace: float) -> None:
    """Once the server is told to stop, refuse new requests, and end those that do not end in time."""
    while not server.should_exit:
        await asyncio.sleep(TICK)
    served.stopping.set()
    await asyncio.get_running_loop().run_in_executor(None, partial(served.service.close, grace))


class Said(logging.Handler):
    """Passes uvicorn's errors on to stderr. Their tracebacks tell of mistakes in this program."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"error: {record.getMessage().strip()}")
        if record.exc_info:
            print(logging.Formatter().formatException(record.exc_info), file=sys.stderr)
