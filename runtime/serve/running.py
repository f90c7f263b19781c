"""Uvicorn, as this server runs it."""

from __future__ import annotations

import uvicorn
from starlette.types import ASGIApp

from runtime.serve.connection import patient
from runtime.serve.guard import Limits

AFTER = 5.0  # seconds in which clients take the last events of answers that were broken off


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
