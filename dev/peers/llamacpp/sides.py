"""Starts both sides and asks them: ours in this environment, llama.cpp's in another one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from runtime.errors import MixtralError

ROOT = Path(__file__).resolve().parent.parent.parent.parent
OURS, THEIRS = "dev.peers.llamacpp.ours", "dev.peers.llamacpp.theirs"
OUR_SERVICE, OUR_SERVER = "dev.peers.llamacpp.our_service", "dev.peers.llamacpp.our_server"
THEIR_SERVER = "dev.peers.llamacpp.their_server"
NEEDED = "pip install llama-cpp-python gguf"


class SideError(MixtralError):
    """A side could not do what it was asked."""


class Side:
    """A process that answers questions (`serving`), as a context manager that ends it and what it started."""

    def __init__(self, module: str, python: str = sys.executable, prefix: Sequence[str] = ()) -> None:
        """`module` is run by the interpreter `python`, and the command that `prefix` begins, if there is
        one, starts it.

        Raises `MixtralError` if the process cannot be started.
        """
        self.about = f"{python} -m {module}"
        words = [*prefix, python, "-m", module]
        try:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                start_new_session=True,  # Ctrl-C is for the command, which ends its sides
            )  # fmt: skip
        except OSError as error:
            raise MixtralError(f"{python} cannot be started ({error.strerror})") from error

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """Return the answer. Raises `SideError` if it is an error, or if the process has ended."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do} | given) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"{self.about}: ended with status {self.process.wait()}, asked to {do}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise SideError(f"{self.about}: {found['error']}")
        return found

    def __enter__(self) -> "Side":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with the processes that it has started
        self.process.communicate()


def our_side(prefix: Sequence[str] = ()) -> Side:
    return Side(OURS, prefix=prefix)


def their_side(python: str, prefix: Sequence[str] = ()) -> Side:
    """llama.cpp in the environment of the interpreter `python`."""
    side = Side(THEIRS, python, prefix)
    try:
        side.ask("check")
    except SideError as error:
        side.__exit__(None, None, None)
        raise SideError(f"{error}; {NEEDED} in the environment of --python") from error
    return side
