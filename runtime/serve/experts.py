"""`/experts`: where each expert is, and how the machine does, for the page's picture."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from runtime.serve.picture import picture, resident
from runtime.serve.served import Served
from runtime.serve.stream import EventStream

STEP = 0.2  # seconds between two snapshots of a stream


async def experts(request: Request) -> JSONResponse:
    """One snapshot. Its rates are those of the last moments, or of one that begins now."""
    served: Served = request.app.state.served
    if not served.rates.fresh:
        served.rates.read(served.engine.stats())
        await asyncio.sleep(STEP)
    return JSONResponse(snapshot(served))


async def watch(request: Request) -> EventStream:
    """Snapshots as events, as often as they change and at most five times a second."""
    return EventStream(snapshots(request.app.state.served), last=b"")


async def snapshots(served: Served) -> AsyncIterator[Mapping[str, Any] | None]:
    shown: Mapping[str, Any] = {}
    since = time.monotonic()
    while not served.stopping.is_set():
        now = snapshot(served)
        if now != shown:
            yield now
            shown, since = now, time.monotonic()
        elif time.monotonic() - since > served.limits.beat:
            yield None
            since = time.monotonic()
        await asyncio.sleep(STEP)


def snapshot(served: Served) -> dict[str, Any]:
    """What the page shows."""
    engine, counts = served.engine, served.service.counts()
    total = engine.stats()
    recent, seconds = served.rates.read(total)
    found = picture(engine.runner)
    known = recent if recent.hits + recent.misses else total
    return {
        "layers": len(found.places),
        "experts": engine.config.experts,
        "resident": resident(engine.runner),
        "places": found.places,
        "last": found.last,
        "tokens_per_second": round(recent.new_tokens / seconds, 2),
        "hit_ratio": round(known.hit_ratio, 4),
        "running": counts.running,
        "queued": counts.queued,
        "link": {
            "bytes_per_second": round(recent.copied_bytes / seconds),
            "waited_share": round(min(recent.stall_seconds / seconds, 1.0), 4),
        },
        "copied_bytes": total.copied_bytes,
        "wasted_bytes": total.wasted_bytes,
    }
