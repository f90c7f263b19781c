"""Finds what ended ranks have left: processes, namespaces, temporary folders."""

import contextlib
import os
import signal
import time
from pathlib import Path

from dev.harness.outcome import Leaked
from dev.harness.ranks.namespaces import PREFIX, present

TORCHRUN = "torchelastic_"  # its folder for logs, which stays if it is killed


def left_processes(temporary: Path) -> list[int]:
    """The processes whose temporary folder is this one: those started with it, and all below them."""
    mark = b"TMPDIR=" + os.fsencode(temporary)
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


def check_left(temporary: Path, patience: float) -> None:
    """Raises `Leaked` if a process with this temporary folder is left after some seconds, which is killed
    then, or if the folder is not empty, or if there are namespaces of this process."""
    end = time.monotonic() + patience
    while (left := left_processes(temporary)) and time.monotonic() < end:
        time.sleep(0.01)
    words = [command_line(pid) for pid in left]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if words:
        raise Leaked(f"left {len(words)} processes: {'; '.join(words)[:300]}")
    if names := present(f"{PREFIX}{os.getpid()}-"):
        raise Leaked(f"left namespaces: {', '.join(names)}")
    files = [str(file.relative_to(temporary)) for file in temporary.rglob("*")]
    if files := [name for name in files if not name.startswith(TORCHRUN)]:
        raise Leaked(f"left in the temporary folder: {', '.join(files)[:300]}")


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        )
    return str(pid)
