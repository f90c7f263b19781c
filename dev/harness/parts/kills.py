"""A process that quantizes is killed at any moment, up to three times. The next run takes up its work, and in
every byte the result equals an undisturbed run's."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from dev.harness.command import DONE, Main
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.processes import forked
from dev.harness.quantizing import check_left, contents, finish
from dev.harness.subject import FORMATS, Subject
from model.checkpoint.writer import Writer
from tools.quantize import command as quantize

KILLED = 9  # the status of a process that ends itself where it is told to


@contextmanager
def open_kills(subject: Subject) -> Iterator[Case]:
    work = subject.work("kills")
    out, log, count = work / "out", work / "log", work / "count"
    argv = [str(subject.hf), str(out), *FORMATS, "--threads", "1", "--quiet"]
    expected = contents(subject.native)
    began = time.monotonic()
    if (ended := forked(counting_changes(count), argv, log).ended()).status != DONE:
        raise Wrong(f"undisturbed, it ends with {ended.status}: {ended.said}")
    seconds, changes = time.monotonic() - began, len(count.read_bytes())

    def kill(chance: Random) -> int:
        """Run it, and kill it: before a change to the disk, or after some time. Returns its status."""
        if chance.random() < 0.5:
            return forked(dying_before(chance.randint(1, changes)), argv, log).ended().status
        running = forked(quantize.main, argv, log)
        time.sleep(chance.uniform(0, seconds))
        os.kill(running.child, signal.SIGKILL)
        return running.ended().status

    def case(chance: Random) -> Verdict:
        shutil.rmtree(out, ignore_errors=True)
        verdict = Verdict.ACCEPTED
        for _ in range(chance.randint(1, 3)):
            if (status := kill(chance)) == DONE:
                break
            if status not in (KILLED, -signal.SIGKILL):
                raise Wrong(f"status {status} of a process that was to be killed: {log.read_text()[-500:]}")
            verdict = Verdict.REFUSED
            if out.is_dir():
                check_left(out, expected)
                if contents(out) == expected:  # killed with all done
                    break
        finish(subject, out, expected)
        return verdict

    yield case


def counting_changes(file: Path) -> Main:
    """The command, which writes a byte to a file for each change to the disk."""

    def count() -> None:
        with file.open("ab") as counted:
            counted.write(b".")

    return before_changes(count)


def dying_before(number: int) -> Main:
    """The command, which ends its process just before that change to the disk."""
    left = number

    def die() -> None:
        nonlocal left
        left -= 1
        if not left:
            os._exit(KILLED)

    return before_changes(die)


def before_changes(act: Callable[[], None]) -> Main:
    """The command, in a process that calls `act` before it writes, renames or removes a file."""

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            act()
            return function(*args, **kwargs)

        return call

    def main(argv: Sequence[str]) -> int:
        os.replace, os.fsync, os.unlink = guarded(os.replace), guarded(os.fsync), guarded(os.unlink)
        Path.unlink = guarded(Path.unlink)  # type: ignore[method-assign]
        Writer.write = guarded(Writer.write)  # type: ignore[method-assign]
        return quantize.main(list(argv))

    return main
