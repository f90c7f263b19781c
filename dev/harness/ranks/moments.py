"""Random moments in the life of ranks: waits for one, and says which it was."""

import contextlib
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from dev.harness.outcome import Wrong
from dev.harness.ranks.asked import PROMPT, Asked
from dev.harness.ranks.launching import Ranks

STARTING, LOADING, READING, WRITING, IDLE, ENDING = (
    "starting", "loading", "reading the prompt", "writing", "idle in a chat", "at the end",
)  # fmt: skip
MOMENTS = (STARTING, LOADING, READING, WRITING, ENDING)
PATIENCE = 90.0  # seconds for ranks to come as far as they should


@dataclass
class Pace:
    """How many seconds ranks took from one moment to the next when nothing befell them."""

    starting: float = 4.0
    loading: float = 1.0
    reading: float = 0.5


class Terminal:
    """A terminal for rank 0, and all that was shown on it."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.openpty()
        self.path = os.ttyname(self.theirs)
        self.seen = b""

    def look(self) -> str:
        while select.select([self.ours], [], [], 0)[0]:
            self.seen += os.read(self.ours, 1 << 16)
        return self.seen.decode("utf-8", "replace")

    def write(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)


@dataclass
class Scene:
    """Ranks at work. Where rank 0 has a `terminal`, `shown` says whether it writes to it as well."""

    ranks: Ranks
    asked: Asked
    pace: Pace
    terminal: Terminal | None = None
    shown: bool = False
    typed: int = field(default=0, init=False)  # messages
    closed: bool = field(default=False, init=False)  # whether it was told that no more messages come

    def text(self) -> str:
        """What rank 0 has written."""
        if self.terminal and self.shown:
            return self.asked.shown(self.terminal.look())
        return self.ranks.out(0)

    def whole(self) -> bool:
        return self.text() == self.asked.text

    def planned(self) -> bool:
        """Whether rank 0 says that all is loaded."""
        return bool(self.ranks.err(0))

    def opened(self) -> bool:
        """Whether a rank has opened the weights."""
        pids = filter(None, map(self.ranks.pid, range(self.ranks.size)))
        return self.planned() or any(maps_weights(pid) for pid in pids)

    def asks(self) -> bool:
        """Whether rank 0 waits for another message."""
        assert self.terminal
        said = self.terminal.look() if self.shown else self.ranks.err(0)
        return said.endswith(PROMPT) and said.count(PROMPT) > self.typed

    def now(self) -> str:
        """The moment, as far as it can be seen."""
        if not self.opened():
            return STARTING
        if not self.planned() and not self.text():
            return LOADING
        if self.terminal and self.asks() and not self.closed:
            return IDLE
        if not self.text():
            return READING
        return ENDING if self.whole() else WRITING

    def come_to(self, moment: str, chance: Random) -> None:
        """Wait for a random moment of this kind. Raises `Wrong` if the ranks do not come so far."""
        if moment == STARTING:
            self.until(lambda: all(self.ranks.pid(rank) is not None for rank in range(self.ranks.size)))
            time.sleep(chance.random() * self.pace.starting)
        elif moment == LOADING:
            self.until(self.opened)
            time.sleep(chance.random() * self.pace.loading)
        elif moment == READING:
            self.begin()
            time.sleep(chance.random() * self.pace.reading)
        elif moment == WRITING:
            self.begin()
            share = chance.randint(1, max(1, len(self.asked.text) - 1))
            self.until(lambda: len(self.text()) >= share or bool(self.terminal and self.asks()))
        elif moment == IDLE:
            for message in self.asked.messages[: chance.randint(0, len(self.asked.messages))]:
                self.type(message)
            self.until(self.asks)
            time.sleep(chance.random())
        else:
            self.finish()
            time.sleep(chance.random() * 0.1)

    def begin(self) -> None:
        if self.terminal:
            self.type(self.asked.messages[0])
        else:
            self.until(self.planned)

    def type(self, message: str) -> None:
        assert self.terminal
        self.until(self.asks)
        self.typed += 1
        self.terminal.write(message + "\n")

    def finish(self) -> None:
        """Wait for the whole text. A conversation is told that it is over."""
        if self.terminal:
            for message in self.asked.messages[self.typed :]:
                self.type(message)
            self.until(self.asks)
            self.closed = True
            self.terminal.write("\x04")
        self.until(self.whole)

    def until(self, done: Callable[[], bool]) -> None:
        if not self.ranks.wait(lambda: done() or self.ranks.status(0) is not None, PATIENCE):
            raise Wrong(f"nothing befell them, and they do not go on: {self.told()}")

    def told(self) -> str:
        """All that was printed, for the report of a failure."""
        lines = [f"{self.ranks.way.name}, {self.ranks.size} ranks, {self.now()}, text {self.text()[-80:]!r}"]
        if self.terminal:
            lines.append(f"after {self.typed} messages the terminal shows {self.terminal.look()[-300:]!r}")
        for rank in range(self.ranks.size):
            lines.append(f"rank {rank}, status {self.ranks.status(rank)}: {self.ranks.err(rank)[-3000:]}")
        with contextlib.suppress(FileNotFoundError):
            lines.append(f"launchers: {(self.ranks.folder / 'launchers').read_text()[-1500:]}")
        return "\n".join(lines)


def maps_weights(pid: int) -> bool:
    """Whether the process has a file of weights in its memory, or open."""
    with contextlib.suppress(OSError):
        if ".safetensors" in Path(f"/proc/{pid}/maps").read_text():
            return True
        folder = f"/proc/{pid}/fd"
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{name}").endswith(".safetensors"):
                    return True
    return False
