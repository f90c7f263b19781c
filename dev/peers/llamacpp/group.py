"""A control group of Linux's that limits memory, page cache included."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.errors import DeviceError
from runtime.planning.cgroups import ROOT, groups
from runtime.units import format_bytes

LIMITS = {"memory": "memory.limit_in_bytes", None: "memory.max"}  # by a hierarchy of `cgroups.groups`
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
SECONDS = 5.0  # to wait until the kernel lets go of an empty group


@contextmanager
def memory_group(limit: int) -> Iterator[tuple[str, ...]]:
    """A group inside this process's own. Gives the words that, put before a command, start it in there.

    Processes in the group must have ended when the block does. Raises `DeviceError` if this process may not
    make one.
    """
    folder = make_group(limit)
    try:
        yield "sh", "-c", ENTER, str(folder)
    finally:
        remove(folder)


def make_group(limit: int) -> Path:
    reasons = []
    for hierarchy, name in LIMITS.items():
        own = next(groups(ROOT, hierarchy), None)
        if own is None:
            continue
        folder = own / f"mixtral-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / name).open("r+").close()  # it is there, where the group above passes the controller on
            (folder / name).write_text(str(limit))
        except OSError as error:
            with suppress(OSError):
                folder.rmdir()
            reasons.append(f"{folder}: {error.strerror}")
        else:
            return folder
    raise DeviceError(
        f"no group of {format_bytes(limit)} can be made ({'; '.join(reasons) or 'no hierarchy is mounted'}); "
        "run this as root, where control groups can be written"
    )


def remove(folder: Path) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
