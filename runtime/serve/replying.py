"""From a text that is being written to a response: at once or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from runtime.serve.errors import GONE
from runtime.serve.stream import EventStream, Gone, unless_gone
from runtime.serve.writing import Text, Writing


class Form(Protocol):
    """The JSON of one kind of answer."""

    def whole(self, texts: list[Text], writing: Writing) -> dict[str, Any]:
        """All of it, when the texts are complete."""
        ...

    def stream(self, writing: Writing) -> AsyncIterator[Mapping[str, Any] | None]:
        """Its parts as they come, and None for a sign of life."""
        ...


async def reply(request: Request, form: Form, writing: Writing, stream: bool) -> ASGIApp:
    """The response. The texts are given up if the client goes away."""
    if stream:
        return EventStream(form.stream(writing), writing.cancel)
    try:
        return JSONResponse(form.whole(await unless_gone(request.receive, writing.all()), writing))
    except Gone:
        return Response(status_code=GONE)
    finally:
        writing.cancel()
