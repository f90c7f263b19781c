"""Runs a command's `main` in this process as a shell would, and keeps what it prints and how it ends."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dev.harness.judge import fault_of
from dev.harness.outcome import Verdict, Wrong

Main = Callable[[list[str]], int]
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its last line on stderr."""
        return self.err.rstrip("\n").rpartition("\n")[2]

    def judged(self) -> Verdict:
        """Accepted if the command succeeded, refused if it says why in one line. Raises `Wrong` otherwise."""
        if self.status == DONE:
            return Verdict.ACCEPTED
        if self.status not in (FAILED, USAGE, INTERRUPTED):
            raise Wrong(f"status {self.status}: {self.said[:200]}")
        if "Traceback" in self.err:
            raise Wrong(f"a traceback: {self.err[-1500:]}")
        if fault := fault_of(self.said):
            raise Wrong(f"status {self.status} with {fault}: {self.said[:200]}")
        if self.status == FAILED and not self.said.startswith("error: "):
            raise Wrong(f"status 1 without an error, but {self.said[:200]}")
        return Verdict.REFUSED


def run_main(main: Main, argv: Sequence[str], stdin: bytes = b"") -> Ended:
    """Run the command. Raises the errors that it lets through."""
    out, err = io.BytesIO(), io.BytesIO()
    with streams(stdin, out, err):
        try:
            status = main(list(argv))
        except SystemExit as end:  # argparse
            status = end.code if isinstance(end.code, int) else FAILED
    return Ended(status, *(stream.getvalue().decode("utf-8", "replace") for stream in (out, err)))


@contextmanager
def streams(stdin: bytes, out: io.BytesIO, err: io.BytesIO) -> Iterator[None]:
    kept = sys.stdin, sys.stdout, sys.stderr
    made = [io.TextIOWrapper(stream, "utf-8", write_through=True) for stream in (io.BytesIO(stdin), out, err)]
    sys.stdin, sys.stdout, sys.stderr = made
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = kept
        for stream in made:
            if not stream.closed:
                stream.flush()
                stream.detach()
