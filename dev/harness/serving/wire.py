"""One request over a socket, by a client that may be slow, or go away at any moment."""

import json
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any

PATIENCE = 90.0  # seconds for a response
PIECE = 4096  # bytes read at once


@dataclass(frozen=True)
class Manners:
    """How a client behaves. Times are in seconds.

    late      before it connects
    drip      between two pieces of what it sends
    sip       between two reads, each of a few bytes
    unsent    bytes of the request after which it goes away; None sends all of them
    patience  after which it goes away, counted from the end of the request
    taken     bytes of the response's body after which it goes away
    rude      whether it goes away by a reset
    stays     whether it has asked for something else before, over the same connection
    """

    late: float = 0.0
    drip: float = 0.0
    sip: float = 0.0
    unsent: int | None = None
    patience: float | None = None
    taken: int | None = None
    rude: bool = False
    stays: bool = False

    @property
    def goes_away(self) -> bool:
        return (self.unsent, self.patience, self.taken) != (None, None, None)


@dataclass
class Reply:
    """What came back. Its status is 0 if nothing did."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False  # the response came to its end
    times: list[tuple[float, int]] = field(default_factory=list)  # seconds, and bytes of the body by then


def post(path: str, body: object, key: str | None, **headers: str) -> bytes:
    """A request with a body, which is JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(data))}
    return head("POST", path, key, given | headers) + data


def head(method: str, path: str, key: str | None, headers: dict[str, str]) -> bytes:
    if key is not None:
        headers = {"authorization": f"Bearer {key}"} | headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def ask(port: int, request: bytes, manners: Manners) -> Reply:
    """Send a request, and read what comes back until its end, or until the client goes away."""
    time.sleep(manners.late)
    reply = Reply()
    with socket.socket() as connection:
        connection.settimeout(PATIENCE)
        if manners.sip:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        if manners.stays:
            connection.sendall(head("GET", "/health", None, {"host": "127.0.0.1"}))
            read(connection, Reply(), Manners())
        with suppress(OSError):  # the server has closed it, and its response may be there already
            send(connection, request, manners)
        if manners.unsent is None:
            with suppress(OSError, HTTPException):  # as before, or the client's patience is over
                read(connection, reply, manners)
        if manners.rude:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return reply


def send(connection: socket.socket, request: bytes, manners: Manners) -> None:
    data = request[: manners.unsent]
    step = max(len(data) // 8, 1) if manners.drip else len(data) or 1
    for start in range(0, len(data), step):
        connection.sendall(data[start : start + step])
        time.sleep(manners.drip)


def read(connection: socket.socket, reply: Reply, manners: Manners) -> None:
    began = time.monotonic()
    end = began + (PATIENCE if manners.patience is None else manners.patience)
    response = HTTPResponse(connection, method="POST")
    try:
        connection.settimeout(max(end - time.monotonic(), 0.001))
        response.begin()
        reply.status, reply.headers = response.status, {k.lower(): v for k, v in response.getheaders()}
        while manners.taken is None or len(reply.body) < manners.taken:
            connection.settimeout(max(end - time.monotonic(), 0.001))
            more = response.read1(64 if manners.sip else PIECE)
            if not more:
                reply.whole = True
                return
            reply.body += more
            reply.times.append((time.monotonic() - began, len(reply.body)))
            time.sleep(manners.sip)
    finally:
        response.close()


def value(reply: Reply) -> Any:
    """The JSON of a whole reply. Raises `ValueError` if it is none."""
    return json.loads(reply.body)
