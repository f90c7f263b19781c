"""The server as a process, and what it holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESS = re.compile(r"serving \S+ at http://\S+:(\d+) ")


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes of memory, threads, open files."""

    memory: int
    threads: int
    files: int

    @classmethod
    def of(cls, process: int) -> Held:
        folder = Path(f"/proc/{process}")
        lines = [line.split() for line in folder.joinpath("status").read_text().splitlines()]
        fields = {words[0]: words[1] for words in lines if len(words) > 1}
        memory, threads = int(fields["VmRSS:"]) << 10, int(fields["Threads:"])
        return cls(memory, threads, len(os.listdir(folder / "fd")))


@contextmanager
def serving(words: Sequence[str], secret: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The running server and its port. It takes one key."""
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write(secret)
        keys.flush()
        command = (sys.executable, "-m", "runtime.serve", "--port", "0", "--api-key-file", keys.name, *words)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                for line in process.stderr:
                    if found := ADDRESS.match(line):
                        break
                    sys.stderr.write(line)
                else:
                    raise RuntimeError(f"the server ended with status {process.wait()}")
                yield process, int(found[1])
            finally:
                process.terminate()
                process.wait()


def figure(port: int, secret: str, name: str) -> float:
    """A figure of the server's metrics."""
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"authorization": f"Bearer {secret}"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines()]
    return next(float(words[1]) for words in lines if words[0] == name)
