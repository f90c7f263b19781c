"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, with the status that fits."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from runtime.batching.service import MISTAKE, STOPPING
from runtime.errors import MixtralError, PromptTooLong, RequestError
from tokenizer import TokenizerError

INVALID = "invalid_request_error"
GONE = 499  # of a response that nobody reads
SHOWN = 5  # mistakes of one request that its answer names
LISTED = 1000  # mistakes that are listed at all: each of them takes some 10 us


class Refusal(Exception):
    """A request that is answered with an error.

    status   HTTP's number
    kind     OpenAI's `type`
    param    the field that is wrong, if one is
    code     a word for programs, if there is one
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def refusal(error: Exception, late: bool = False) -> Refusal:
    """What an error is for a client. `late` says that the request had been taken on before it failed.

    A request that failed late was well formed, so its status is 500. No client should send it again by
    itself, and `x-should-retry` says so to OpenAI's.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValidationError):
        return invalid(error)
    if isinstance(error, PromptTooLong):
        return Refusal(400, str(error), code="context_length_exceeded")
    if str(error) == STOPPING:
        return stopping(STOPPING)
    if isinstance(error, RequestError) and late:
        return Refusal(500, str(error), "server_error", headers={"x-should-retry": "false"})
    if isinstance(error, (MixtralError, TokenizerError)):
        return Refusal(400, str(error), param=named(str(error)))
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return Refusal(500, MISTAKE, "server_error")


def stopping(message: str) -> Refusal:
    return Refusal(503, message, "server_error", code="stopping", headers={"retry-after": "5"})


def named(message: str) -> str | None:
    """The field that a message of `OptionError`, or of a schema's, begins with.

    >>> named("top_p is 2, and must be above 0 and at most 1"), named("the engine is closed")
    ('top_p', None)
    >>> named("json_schema: Unknown type: x")
    'json_schema'
    """
    found = re.match(r"(\w+)(?: is |: )", message)
    return found[1] if found else None


def invalid(error: ValidationError) -> Refusal:
    """The mistakes of a request, each with its place."""
    if (count := error.error_count()) > LISTED:
        return Refusal(
            400, f"the body has {count} mistakes, most of them fields that are unknown; correct them"
        )
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [line(place(one["loc"]), one["type"], one["msg"]) for one in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more")
    return Refusal(400, "; ".join(lines), param=place(found[0]["loc"]) or None)


def line(where: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"unknown or unsupported field {where!r}; leave it out"
    text = message.removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def place(parts: tuple[int | str, ...]) -> str:
    """Where in a request, as `messages.0.content`. Names in angle brackets are those of alternatives.

    >>> place(("messages", 0, "<user>", "content")), place(("logit_bias", "x", "[key]"))
    ('messages.0.content', 'logit_bias.x')
    """
    return ".".join(str(part) for part in parts if not str(part).startswith(("<", "[")))


async def answer(request: Request, error: Exception) -> Response:
    """The response to a request whose handler raised."""
    if isinstance(error, ClientDisconnect):  # in the middle of its body
        return Response(status_code=GONE)
    return refusal(error).response()
