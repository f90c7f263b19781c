"""The threads, handles and memory of this process. What the system does not tell is not counted."""

import contextlib
import ctypes
import gc
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SELF = Path("/proc/self")
PATIENCE = 5.0  # seconds for a thread to end


@dataclass(frozen=True)
class Holdings:
    """The names of threads and the targets of handles, one entry for each."""

    threads: tuple[str, ...]
    handles: tuple[str, ...]

    @staticmethod
    def now() -> "Holdings":
        return Holdings(tuple(sorted(t.name for t in threading.enumerate())), handles())

    def more_than(self, before: "Holdings") -> str:
        """The surplus over `before`, in words."""
        words = []
        if extra := surplus(self.threads, before.threads):
            words.append(f"{len(extra)} threads ({', '.join(extra)[:80]})")
        if extra := surplus(self.handles, before.handles):
            words.append(f"{len(extra)} handles ({', '.join(extra)[:160]})")
        return " and ".join(words)


def surplus(now: tuple[str, ...], before: tuple[str, ...]) -> list[str]:
    """
    >>> surplus(("a", "a", "b"), ("a", "c"))
    ['a', 'b']
    """
    rest, extra = list(before), []
    for item in now:
        if item in rest:
            rest.remove(item)
        else:
            extra.append(item)
    return extra if len(now) > len(before) else []


def handles() -> tuple[str, ...]:
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(SELF / "fd"):
            with contextlib.suppress(OSError):  # the handle that lists the folder
                found.append(os.readlink(SELF / "fd" / name))
    return tuple(sorted(found))


def settled(before: Holdings) -> str:
    """The surplus over `before`, after garbage is collected and threads have had time to end."""
    extra = Holdings.now().more_than(before)
    end = time.monotonic() + PATIENCE
    while extra and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
        extra = Holdings.now().more_than(before)
    return extra


def resident_bytes() -> int:
    """Memory of this process; 0 if the system does not tell."""
    return status_bytes("VmRSS")


def settled_bytes() -> int:
    """The same after garbage is collected and free memory is returned."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def peak_bytes() -> int:
    """The most memory since `reset_peak`."""
    return status_bytes("VmHWM")


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        (SELF / "clear_refs").write_text("5")


def status_bytes(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in (SELF / "status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0
