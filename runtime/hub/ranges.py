"""Download parts of a file: a sparse file that has some ranges of bytes where the whole file has them.

Beside it lies a record of the ranges, and of how many of their bytes have come. So a run that was killed goes
on where it was. After a crash of the whole system, a record may know of bytes that the disk has not. So it
counts only for as long as the system has run, and not at all where the system (macOS) has no name for that.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.hub.fetching import Advance, receive_all
from runtime.hub.remote import Remote

RECORD = ".ranges"
BOOT = Path("/proc/sys/kernel/random/boot_id")
DIGITS = 20  # of the count at the record's beginning

Range = tuple[int, int]  # the first byte, and the one after the last


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as will do, in order.

    >>> merged([(6, 8), (0, 2), (2, 5), (3, 4)])
    [(0, 5), (6, 8)]
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif stop > start:
            found.append((start, stop))
    return found


def record_of(path: Path) -> Path:
    return path.with_name(path.name + RECORD)


def remove(path: Path) -> None:
    """Remove a file of ranges, and its record."""
    path.unlink(missing_ok=True)
    record_of(path).unlink(missing_ok=True)


def fetch_ranges(remote: Remote, file: str, path: Path, ranges: Sequence[Range], advance: Advance) -> None:
    """Have these ranges of a model's file in `path`, and no others. They are in order, and do not touch.
    `advance` is called with each number of bytes that has come, first with those of earlier runs. Only one
    process may do this for a path.

    Raises what `errors.explained` explains.
    """
    total = sum(stop - start for start, stop in ranges)
    done = count(path, ranges)
    advance(done or 0)
    if done == total:
        return
    if done is None:
        remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        record_of(path).write_text(f"{0:0{DIGITS}}\n{about(ranges)}")
        with path.open("xb") as made:
            made.truncate(remote.files[file].bytes)
    came = done or 0
    with record_of(path).open("r+b", buffering=0) as record, path.open("r+b", buffering=0) as out:

        def note(size: int) -> None:
            nonlocal came
            came += size
            record.seek(0)
            record.write(f"{came:0{DIGITS}}".encode())
            advance(size)

        before = 0
        for start, stop in ranges:
            out.seek(min(start + max(came - before, 0), stop))
            receive_all(remote, file, out, stop, note)
            before += stop - start
        os.fsync(out.fileno())


def count(path: Path, ranges: Sequence[Range]) -> int | None:
    """How many bytes of these ranges have come; None if the file has others, or none, or if
    the record does not count."""
    try:
        number, _, rest = record_of(path).read_text().partition("\n")
        return int(number) if BOOT.is_file() and path.is_file() and rest == about(ranges) else None
    except (OSError, ValueError):
        return None


def about(ranges: Sequence[Range]) -> str:
    boot = BOOT.read_text().strip() if BOOT.is_file() else ""
    return json.dumps({"boot": boot, "ranges": [list(each) for each in ranges]})
