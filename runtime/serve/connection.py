"""Slow clients. Uvicorn waits for a header, and for a client to read, for as long as the client likes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serve.guard import Limits


class Patient:
    """A connection as asyncio calls it. Uvicorn's `H11Protocol` serves it, and this one ends it if the client
    is slow.

    The connection is cut (`abort`) where a header takes too long, and where the client does not read: a plain
    close would wait until everything has been sent.
    """

    def __init__(self, inner: H11Protocol, limits: Limits) -> None:
        self.inner, self.limits = inner, limits
        self.transport: asyncio.Transport | None = None
        self.header: asyncio.TimerHandle | None = None  # runs while a header is awaited or on its way
        self.stalled: asyncio.TimerHandle | None = None  # runs while the client does not read

    def connection_made(self, transport: asyncio.Transport) -> None:
        if len(self.inner.server_state.connections) >= self.limits.connections:
            transport.abort()
            return
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # so `pause_writing` tells of whatever has not been sent
        self.inner.connection_made(transport)
        self.header = self.inner.loop.call_later(self.limits.header_time, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self.transport is None:
            return
        self.inner.data_received(data)
        cycle = self.inner.cycle
        if cycle is not None and not cycle.response_complete:
            stop(self.header)
            self.header = None
        elif self.header is None:  # the next request has begun
            self.header = self.inner.loop.call_later(self.limits.header_time, self.transport.abort)

    def pause_writing(self) -> None:
        assert self.transport is not None
        self.stalled = self.inner.loop.call_later(self.limits.write_time, self.transport.abort)
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        stop(self.stalled)
        self.inner.resume_writing()

    def eof_received(self) -> None:
        if self.transport is not None:
            self.inner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        stop(self.header)
        stop(self.stalled)
        if self.transport is not None:
            self.inner.connection_lost(error)


def stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def patient(limits: Limits) -> Callable[..., Patient]:
    """What uvicorn takes as its `http`: makes the protocol of each connection."""
    return partial(make, limits)


def make(limits: Limits, **given: Any) -> Patient:
    return Patient(H11Protocol(**given), limits)
