"""What this process holds: threads, handles, memory. Where the system does not tell, nothing is counted."""

import contextlib
import ctypes
import gc
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

SELF = Path("/proc/self")
PATIENCE = 5.0  # seconds that a thread may take to end


@dataclass(frozen=True)
class Holdings:
    """Names of threads and targets of handles, each once for each that there is."""

    threads: tuple[str, ...]
    handles: tuple[str, ...]

    @staticmethod
    def now() -> "Holdings":
        return Holdings(tuple(sorted(t.name for t in threading.enumerate())), handles())

    def more_than(self, before: "Holdings") -> str:
        """What there is more of than before, in words."""
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
            with contextlib.suppress(OSError):  # the one that lists the folder
                found.append(os.readlink(SELF / "fd" / name))
    return tuple(sorted(found))


def settled(before: Holdings) -> str:
    """What is held beyond `before`, after garbage has been collected and threads have had time to end."""
    extra = Holdings.now().more_than(before)
    end = time.monotonic() + PATIENCE
    while extra and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
        extra = Holdings.now().more_than(before)
    return extra


def resident_bytes() -> int:
    """Memory of this process; 0 where that cannot be told."""
    return status_bytes("VmRSS")


def settled_bytes() -> int:
    """The same after garbage has been collected and free memory given back."""
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
