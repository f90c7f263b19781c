"""Server-sent events, and clients that go away while their answer is being written."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from runtime.serve.errors import Refusal

Result = TypeVar("Result")

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy in between passes each event on at once
]
BEAT = b": nothing new\n\n"  # a comment, by which proxies and both ends see that the connection lives
DONE = b"data: [DONE]\n\n"


class Gone(Exception):
    """The client has closed the connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do `work` while the client is there. The request's body has been read.

    Raises `Gone` as soon as the client is gone, and ends `work` then.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(leave(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of events: JSON objects, and None for a sign of life.

    `close` is called at the end, however it comes. An error ends the stream with an event in OpenAI's form,
    and then there is no `[DONE]`.
    """

    def __init__(
        self,
        events: AsyncIterator[Mapping[str, Any] | None],
        close: Callable[[], None] = lambda: None,
        last: bytes = DONE,
    ) -> None:
        self.events, self.close, self.last = events, close, last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.pump(send))
        except Gone:
            pass
        finally:
            self.close()

    async def pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            async for event in self.events:
                await put(send, BEAT if event is None else line(event))
        except Refusal as error:
            await put(send, line(error.body()))
        else:
            await put(send, self.last)
        await put(send, b"", more=False)


async def put(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def line(event: Mapping[str, Any]) -> bytes:
    """
    >>> line({"text": "é\\n"})
    b'data: {"text":"\\xc3\\xa9\\\\n"}\\n\\n'
    """
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
