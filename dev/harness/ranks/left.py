"""Finds what ended ranks have left: processes, namespaces, temporary folders."""

import contextlib
import os
import signal
import time
from pathlib import Path

from dev.harness.outcome import Leaked
from dev.harness.ranks.namespaces import PREFIX, present

TORCHRUN = "torchelastic_"  # its folder for logs, which stays if it is killed
SHARED = Path("/dev/shm")


def left_processes(temporary: Path) -> list[int]:
    """The processes whose temporary folder is this one: those started with it, and all below them."""
    mark = b"TMPDIR=" + os.fsencode(temporary)
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                found.append(int(name))
    return found


def check_left(temporary: Path, shared: set[str], patience: float) -> None:
    """Raises `Leaked` if a process with this temporary folder is left after some seconds, which is killed
    then, or if the folder is not empty, or if there are namespaces of this process, or if there is shared
    memory that is not in `shared`."""
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
    if names := sorted(in_shared_memory() - shared):
        raise Leaked(f"left in shared memory: {', '.join(names)[:300]}")


def in_shared_memory() -> set[str]:
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        )
    return str(pid)
