"""Runs a part in processes that may hang, crash or be killed, without losing a case."""

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from dev.harness.child import serve
from dev.harness.outcome import Outcome, Tally, Verdict
from dev.harness.part import Part
from dev.harness.subject import Subject

GRACE = 2.0  # seconds for a hanging process to write its stacks


class Hung(Exception):
    """The child has been silent for too long."""


def run_part(part: Part, subject: Subject, seed: int, first: int, most: int | None, seconds: float) -> Tally:
    """Run cases from number `first` on, up to `most` of them, for up to `seconds`."""
    tally = Tally(part.name)
    began = time.monotonic()
    until = began + seconds
    at, last = first, None if most is None else first + most
    while time.monotonic() < until and (last is None or at < last) and not tally.skipped:
        stretch = Stretch(part, subject, seed, at, last, until)
        if stretch.run(tally):
            break
        at = stretch.at
    tally.seconds = time.monotonic() - began
    return tally


class Stretch:
    """The cases that one process survives. `at` is the next case to try."""

    def __init__(
        self, part: Part, subject: Subject, seed: int, first: int, last: int | None, until: float
    ) -> None:
        self.part, self.subject, self.seed, self.until = part, subject, seed, until
        self.at, self.last = first, last
        self.log = subject.folder / f"{part.name}.log"

    def run(self, tally: Tally) -> bool:
        """Returns whether the process ended by itself. If not, the case that killed it is in the tally."""
        reader, child = self.start()
        done = hung = False
        try:
            for message in messages(reader, self.part.patience):
                done = done or "done" in message
                self.hear(message, tally)
        except Hung:
            hung = True
            os.kill(child, signal.SIGUSR1)
            time.sleep(GRACE)
        finally:
            os.close(reader)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and all processes that it started
        _, status = os.waitpid(child, 0)
        if done or tally.skipped:
            return True
        if hung:
            said = f"no end within {self.part.patience:.0f} s"
            tally.add(Outcome(self.at, Verdict.HANG, said, tail(self.log)))
        else:
            tally.add(Outcome(self.at, Verdict.RAW, f"the process died ({ending(status)})", tail(self.log)))
        self.at += 1
        return False

    def start(self) -> tuple[int, int]:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            os.setsid()
            numbers = islice(count(self.at), None if self.last is None else self.last - self.at)
            serve(self.part, self.subject, self.seed, numbers, self.until, writer, self.log)
        os.close(writer)
        return reader, child

    def hear(self, message: dict[str, Any], tally: Tally) -> None:
        if "begin" in message:
            self.at = message["begin"]
        elif "verdict" in message:
            outcome = Outcome(**message | {"verdict": Verdict(message["verdict"])})
            tally.add(outcome)
            self.at = max(self.at, outcome.at + 1)
        elif "figures" in message:
            tally.figures += message["figures"]
        elif "skipped" in message:
            tally.skipped = message["skipped"]


def messages(reader: int, patience: float) -> Iterator[dict[str, Any]]:
    """The child's messages until it ends. Raises `Hung` if there is none for `patience` seconds."""
    rest = b""
    while True:
        if not select.select([reader], [], [], patience)[0]:
            raise Hung
        more = os.read(reader, 1 << 16)
        if not more:
            return
        *lines, rest = (rest + more).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def ending(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"status {os.WEXITSTATUS(status)}"


def tail(log: Path, limit: int = 6000) -> str:
    """The end of what the child printed, with the report of Python's fault handler."""
    try:
        return log.read_bytes()[-limit:].decode("utf-8", "replace")
    except OSError:
        return ""
