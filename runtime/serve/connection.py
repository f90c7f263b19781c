"""Slow clients. Uvicorn waits for a header, and for a client to read, for as long as the client likes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serve.errors import Refusal
from runtime.serve.guard import Limits, header_too_large


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
        inner.send_400_response = self.refuse  # type: ignore[method-assign]

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

    def refuse(self, msg: str) -> None:
        """Answer what is no request of HTTP, and end the connection. Uvicorn would answer in plain text. It
        calls this while it handles the error that says what is wrong."""
        assert self.transport is not None
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) == 431:
            refusal = header_too_large(self.limits.header)
        else:
            refusal = Refusal(400, f"this is no request of HTTP/1.1: {str(error or msg).partition(':')[0]}")
        response = refusal.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        with suppress(h11.LocalProtocolError):  # another response has begun
            for event in (
                h11.Response(status_code=response.status_code, headers=headers),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.inner.conn.send(event) or b"")
        self.transport.close()

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
