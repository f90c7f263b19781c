"""A Chromium without a window, driven over a pipe, to test and to picture the server's page.

It speaks the DevTools protocol: JSON messages that end with a zero byte, on the browser's file descriptors 3
and 4. So nothing listens on a port, and no other program is needed.
"""

import fcntl
import json
import os
import selectors
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check",
    "--disable-gpu", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--force-color-profile=srgb",
    "--lang=en-US",
)  # fmt: skip
SECONDS = 30.0  # that an answer of the browser's may take on a busy machine
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowUp": (38, ""), "ArrowDown": (40, ""),
        "ArrowLeft": (37, ""), "ArrowRight": (39, "")}  # fmt: skip
ALT, CONTROL, SHIFT = 1, 2, 8


class BrowserError(Exception):
    """The browser, or a script in it, failed."""


def find_chromium() -> str | None:
    """Where a Chromium is installed, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser as a context manager. Raises BrowserError if there is none, or if it stops answering."""

    def __init__(self) -> None:
        path = find_chromium()
        if path is None:
            raise BrowserError("no Chromium is installed; on Debian: apt-get install chromium")
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        # Its own sandbox does not work for root, nor in most containers.
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        arguments = (path, *FLAGS, *root, f"--user-data-dir={self._profile.name}", "about:blank")
        (theirs_in, self._out), (self._in, theirs_out) = high_pipe(), high_pipe()
        self._pid = os.posix_spawn(
            path,
            arguments,
            os.environ | {"HOME": self._profile.name},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            ],
            setpgroup=0,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._buffer = 0, b""
        self._messages: deque[dict[str, Any]] = deque()
        self._listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._in, selectors.EVENT_READ)

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(BrowserError, OSError):
            self.call("Browser.close")
        self._selector.close()
        os.close(self._out)
        os.close(self._in)
        end = time.monotonic() + 5
        while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        self._profile.cleanup()

    def new_page(self) -> tuple[str, str]:
        """An empty page with storage of its own: its session and its target."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        return self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"], target

    def listen(self, session: str, hear: Callable[[str, dict[str, Any]], None]) -> None:
        """Call `hear(method, params)` for each event of a session's, while something is waited for."""
        self._listeners[session] = hear

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        try:
            write_all(self._out, json.dumps(message).encode() + b"\0")
        except OSError as e:
            raise BrowserError(f"the browser has gone: {e}") from None
        answer = self._answer(self._number, method)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def _answer(self, number: int, method: str) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while True:
            while self._messages:
                message = self._messages.popleft()
                if message.get("id") == number:
                    return message
                if hear := self._listeners.get(message.get("sessionId", "")):
                    hear(message.get("method", ""), message.get("params", {}))
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise BrowserError(f"{method}: no answer within {SECONDS:.0f} s")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise BrowserError(f"{method}: the browser has ended")
            *whole, self._buffer = (self._buffer + data).split(b"\0")
            self._messages.extend(json.loads(each) for each in whole)


def high_pipe() -> tuple[int, int]:
    """A pipe whose ends are neither 3 nor 4, so that dup2 in the child never meets itself."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


def write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
