"""Write a file that is there completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def written_aside(path: Path) -> Iterator[TextIO]:
    """Open a text file beside `path`, which takes the place of `path` on leaving. An error removes it.

    A link at `path` is replaced, and not followed. A pipe or device at `path` is written directly. Raises
    `OSError` at once if nothing can be written there.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    part = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}.part")
    try:
        file = part.open("x", encoding="utf-8")  # "x" follows no link
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Check in advance, as far as possible, that a file at `path` can be written. Raises `OSError`."""
    if path.is_file() or path.is_dir():
        path.open("ab").close()
    elif not path.exists():
        with written_aside(path):
            pass
        path.unlink()
