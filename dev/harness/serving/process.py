"""The server as a process: how it is started, what it holds, how it ends."""

import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dev.harness.outcome import Wrong
from dev.harness.processes import started
from dev.harness.serving.wire import Manners, ask, head

ADDRESS = re.compile(r"serving \S+ at http://127\.0\.0\.1:(\d+) ")
START = 90.0  # seconds
SETTLE = 10.0  # seconds in which everything that was given up has to be gone


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    memory: int  # bytes, resident
    threads: int
    handles: int


class Server:
    """A running server."""

    def __init__(self, argv: Sequence[str], log: Path, key: str) -> None:
        """Raises `Wrong` if it does not start."""
        self.running, self.key = started("runtime.serve", ["--port", "0", *argv], log), key
        end, self.ended = time.monotonic() + START, False
        while not (found := ADDRESS.search(self.said())):
            if self.gone() or time.monotonic() > end:
                self.kill()
                raise Wrong(f"the server does not start: {self.said()[-1500:]}")
            time.sleep(0.05)
        self.port, self.heard = int(found[1]), self.said()

    def said(self) -> str:
        """All that it has said on stderr."""
        return self.running.said()

    def gone(self) -> bool:
        """Whether the process has ended, of its own or because it was told to."""
        return self.ended or bool(
            os.waitid(os.P_PID, self.running.child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        )

    def held(self) -> Held:
        folder = Path(f"/proc/{self.running.child}")
        words = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        memory, threads = int(words["VmRSS"].split()[0]) << 10, int(words["Threads"])
        return Held(memory, threads, len(os.listdir(folder / "fd")))

    def metrics(self) -> dict[str, float]:
        """The figures without labels, by name."""
        request = head("GET", "/metrics", self.key, {"host": "127.0.0.1", "connection": "close"})
        lines = ask(self.port, request, Manners()).body.decode().splitlines()
        pairs = [line.split() for line in lines if line and line[0] != "#" and "{" not in line]
        return {name.removeprefix("mixtral_"): float(number) for name, number in pairs}

    def settle(self) -> None:
        """Wait until nobody is served. Raises `Wrong` if somebody is for ever, or if the server has something
        to say, since it should not."""
        end = time.monotonic() + SETTLE
        while (found := self.metrics())["requests_running"] or found["requests_queued"]:
            if time.monotonic() > end:
                raise Wrong(f"{found['requests_running']:g} requests run, and nobody waits for them")
            time.sleep(0.01)
        if more := self.said()[len(self.heard) :]:
            self.heard += more
            raise Wrong(f"the server says: {more[-1500:]}")

    def terminate(self) -> None:
        os.kill(self.running.child, signal.SIGTERM)

    def check_ended(self) -> None:
        """Wait for the end that it was told to come to. Raises `Wrong` for any other."""
        ended = self.running.ended()
        self.ended = True
        if ended.status or ended.err != self.heard:
            raise Wrong(f"the server ends with {ended.status}: {ended.err[-1500:]}")

    def kill(self) -> None:
        """End it in any case."""
        if not self.ended:
            os.kill(self.running.child, signal.SIGKILL)
            os.waitpid(self.running.child, 0)
            self.ended = True
