"""One of the other ranks, as the watch sees it: a connection, and lines of JSON in both directions."""

import json
import socket
from contextlib import suppress
from typing import Any

LONGEST = 1 << 20  # bytes of a line; plans and offers have kilobytes
BEAT = b"\n"  # an empty line


class Peer:
    """A connection that never blocks. One thread uses it."""

    def __init__(self, rank: int, name: str, connection: socket.socket, now: float) -> None:
        """`name` is how messages call the rank. Times are of `time.monotonic()`."""
        self.rank, self.name, self.connection = rank, name, connection
        self.heard = now  # when the last byte came
        self.open = True
        self.leaving = False  # it has said that it closes, so its silence is no loss
        self.out, self.into = bytearray(), bytearray()

    def tell(self, line: bytes) -> None:
        """Send a line, or what of it the system takes; `flush` sends the rest."""
        if self.open:
            self.out += line
            self.flush()

    def flush(self) -> None:
        """Send what is waiting. A broken connection is found by reading."""
        try:
            while self.out:
                del self.out[: self.connection.send(self.out)]
        except BlockingIOError:
            pass
        except OSError:
            self.out.clear()

    def read(self, now: float) -> list[dict[str, Any]]:
        """The messages that have come. At the connection's end `open` becomes False."""
        try:
            while self.open:
                if got := self.connection.recv(1 << 16):
                    self.into += got
                    self.heard = now
                else:
                    self.open = False
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        *lines, rest = self.into.split(b"\n")
        self.into = rest
        if len(rest) > LONGEST:
            self.open = False
        return [message for line in lines if line and isinstance(message := decoded(line), dict)]

    def finish(self) -> None:
        """Send no more, and let the other side know."""
        with suppress(OSError):  # broken already
            self.connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.open = False
        self.connection.close()


def encoded(message: dict[str, Any]) -> bytes:
    """A message as one line.

    >>> encoded({"value": "two\\nlines"})
    b'{"value": "two\\\\nlines"}\\n'
    """
    return json.dumps(message).encode() + b"\n"


def decoded(line: bytes | bytearray) -> Any:
    """What a line holds; None if that is no JSON, or nested too deeply to be a message.

    >>> decoded(b"[" * 100_000) is None
    True
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
