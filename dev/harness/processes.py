"""Commands in processes that take signals: forks of this one, which have imported everything, or new ones."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dev.harness.command import DONE, INTERRUPTED, Ended, Main
from dev.harness.isolate import settle_in
from dev.harness.outcome import Verdict, Wrong

PATIENCE = 60.0  # seconds for a process to end


@dataclass
class Running:
    """A running command. What it prints, on both streams, goes to `log`."""

    child: int
    log: Path

    def interrupt(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGINT)

    def ended(self, patience: float = PATIENCE) -> Ended:
        """How the command ended. Raises `Wrong` if it does not end."""
        end = time.monotonic() + patience
        while not (found := os.waitpid(self.child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(self.child, signal.SIGABRT)
                time.sleep(0.5)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.child, signal.SIGKILL)
                os.waitpid(self.child, 0)
                raise Wrong(f"no end within {patience:.0f} s of the signal: {self.said()[-1500:]}")
            time.sleep(0.002)
        return Ended(os.waitstatus_to_exitcode(found[1]), "", self.said())

    def said(self) -> str:
        with contextlib.suppress(OSError):
            return self.log.read_bytes().decode("utf-8", "replace")
        return ""


def forked(main: Main, argv: Sequence[str], log: Path) -> Running:
    """Start the command in a fork. Returns when it has begun."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        os.write(writer, b"x")
        run_and_exit(main, argv)
    os.close(writer)
    select.select([reader], [], [], PATIENCE)
    os.close(reader)
    return Running(child, log)


def run_and_exit(main: Main, argv: Sequence[str]) -> None:
    """Run a command as the child of a shell does. An interrupt before it begins or after it has ended does
    not count."""
    status: int | None = None
    settle_in()
    try:
        try:
            status = main(list(argv))
        except KeyboardInterrupt:
            raise
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        if status is None:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
    finally:
        os._exit(1 if status is None else status)


def started(module: str, argv: Sequence[str], log: Path) -> Running:
    """Start the command as a shell does."""
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *argv], stdin=subprocess.DEVNULL, stdout=written, stderr=written
        )
    process.returncode = 0  # `Running.ended` waits for it
    return Running(process.pid, log)


def judged(ended: Ended) -> Verdict:
    """The verdict on a command that got a Ctrl-C. Raises `Wrong` unless it is done, or was interrupted
    without a traceback of ours."""
    ours = "/runtime/", "/tools/", "/model/", "/tokenizer/"
    if "Traceback" in ended.err and any(place in ended.err for place in ours):
        raise Wrong(f"a traceback: {ended.err[-1500:]}")
    if "Traceback" in ended.err or ended.status == -signal.SIGINT:
        return Verdict.REFUSED  # Python itself had not started yet
    if ended.status not in (DONE, INTERRUPTED):
        raise Wrong(f"status {ended.status}: {ended.err[-500:]}")
    return Verdict.ACCEPTED if ended.status == DONE else Verdict.REFUSED
