"""Who may ask, and how much: keys, hosts, kinds and sizes of bodies."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import quoted
from runtime.errors import OptionError
from runtime.serve.errors import Refusal
from runtime.units import format_bytes

OPEN = frozenset({"/health"})  # paths that take no key, besides those of the page


@dataclass(frozen=True)
class Limits:
    """What a client may take. Times are in seconds, sizes in bytes.

    body         the largest body of a request
    header       the largest header
    header_time  for a request's header to arrive
    body_time    for its body
    write_time   for the client to take what was written
    idle_time    that a connection stays open between two requests
    beat         after which a stream without news gives a sign of life
    connections  open at the same time
    """

    body: int = 4 << 20
    header: int = 32 << 10
    header_time: float = 10.0
    body_time: float = 30.0
    write_time: float = 30.0
    idle_time: float = 15.0
    beat: float = 10.0
    connections: int = 512


class Keys:
    """The keys that a client may have. Comparing takes the same time for every key that is wrong."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.digests = [digest(key) for key in keys]

    @classmethod
    def read(cls, file: Path) -> Keys:
        """One key in each line. Empty lines and those that begin with # count as none.

        Raises `OSError` if the file cannot be read, and `OptionError` if there is no key in it or one that
        cannot be sent.
        """
        try:
            lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise OptionError(f"{file}: is not UTF-8; write one key in each line") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise OptionError(f"{file}: holds no key; write one in each line")
        if not all(key.isascii() and key.isprintable() for key in keys):
            raise OptionError(f"{file}: a key has characters that no header carries; take ASCII's")
        return cls(keys)

    def know(self, key: str) -> bool:
        given = digest(key)
        found = [hmac.compare_digest(given, each) for each in self.digests]
        return any(found)


def digest(key: str) -> bytes:
    """Of one length for all keys, so that comparing does not tell how long they are."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Guard:
    """Stands before the app, and refuses what it should not see.

    Without `keys`, everybody may ask. Then `hosts` are the names by which the server may be called, if given:
    a page of the web could have its own name resolve to this machine, and ask in its visitor's browser.
    `open_paths` take no key.
    """

    app: ASGIApp
    limits: Limits
    keys: Keys | None = None
    hosts: Collection[str] | None = None
    open_paths: Collection[str] = OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.check(scope, Headers(scope=scope))
        except Refusal as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, Body(receive, self.limits), send)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raises `Refusal`."""
        if self.hosts is not None and hostname(headers.get("host", "")) not in self.hosts:
            message = f"this server is not called {quoted(headers.get('host', ''))}; ask by its address"
            raise Refusal(421, message, code="wrong_host")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.limits.header:
            raise header_too_large(self.limits.header)
        if self.keys is not None and scope["path"] not in self.open_paths:
            self.check_key(self.keys, headers.get("authorization", ""))
        if "transfer-encoding" in headers and "content-length" in headers:  # a proxy may read another body
            close = {"connection": "close"}
            raise Refusal(400, "the header has content-length and transfer-encoding; send one", headers=close)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # what other pages of a browser may send unasked is never this
                raise Refusal(415, f"the body is {quoted(kind)}; send application/json (content-type)")
            length = headers.get("content-length", "0")
            if length.isdecimal() and int(length) > self.limits.body:
                raise too_large(self.limits.body)

    def check_key(self, keys: Keys, authorization: str) -> None:
        word, _, key = authorization.partition(" ")
        if not key or word.lower() != "bearer" or not keys.know(key.strip()):
            what = "wrong API key" if key else "no API key"
            raise Refusal(
                401, f"{what}; send one as 'Authorization: Bearer KEY'", "authentication_error",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip


class Body:
    """A request's body, as far as it is not too large and not too slow."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self.receive, self.limits = receive, limits
        self.size, self.complete = 0, False
        self.end = time.monotonic() + limits.body_time

    async def __call__(self) -> Message:
        """Raises `Refusal`."""
        if self.complete:  # the app waits for the client to go
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(self.end - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            seconds = self.limits.body_time
            raise Refusal(
                408, f"the body did not arrive in {seconds:g} seconds", headers={"connection": "close"}
            ) from None
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.size > self.limits.body:
            raise too_large(self.limits.body)
        return message


def header_too_large(most: int) -> Refusal:
    return Refusal(431, f"the header is larger than {format_bytes(most)}; send less")


def too_large(most: int) -> Refusal:
    return Refusal(
        413, f"the body is larger than {format_bytes(most)}; send less", headers={"connection": "close"}
    )


def hostname(host: str) -> str:
    """The name in a `Host` header.

    >>> hostname("LocalHost:8080"), hostname("[::1]:8080"), hostname("::1")
    ('localhost', '::1', '::1')
    """
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.lower() if host.count(":") > 1 else host.partition(":")[0].lower()
