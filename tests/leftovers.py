"""What a test has left behind in this process: only what is its own.

Others come and go meanwhile: threads and files of earlier tests end when garbage is collected. So no test
compares numbers of all there are. A thread is a test's own if it was not there before, a file if it is in a
folder that no other test uses.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PATIENCE = 60.0  # seconds for what has to come on a busy machine
WORKERS = ("expert-", "loader", "checkpoint")  # threads of engines, and of those who read their weights


def workers() -> set[threading.Thread]:
    """The threads of all engines. A test's own are those that were not there before."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(WORKERS)}


def handles() -> set[str]:
    """What this process has open: the number of each descriptor, and what it is of. Nothing where the system
    does not tell."""
    found = set()
    for link in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # another thread's, closed meanwhile
            found.add(f"{link.name} {os.readlink(link)}")
    return found


def open_below(folder: Path) -> list[str]:
    """The files below `folder` that this process has open, one for each descriptor. A deleted one is named as
    the system does it, with a word behind. Nothing where the system does not tell."""
    root = f"{os.path.realpath(folder)}{os.sep}"
    names = [handle.partition(" ")[2] for handle in handles()]
    return sorted(name for name in names if name.startswith(root))


def resident_at(address: int) -> int:
    """Bytes of memory that the mapping at that address holds; 0 if there is none. Needs Linux's /proc."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, *rest = line.split()
            if "-" in first and not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                inside = start <= address < end
            elif inside and first == "Rss:":
                return int(rest[0]) * 1024
    return 0


def until(what: Callable[[], bool], about: Callable[[], object] = lambda: "") -> None:
    """Wait for it.

    Raises:
        AssertionError: it did not come; with what `about` says by then.
    """
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, about()
        time.sleep(1e-3)
