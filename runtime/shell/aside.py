"""A file that is there completely or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def written_aside(path: Path) -> Iterator[TextIO]:
    """A text file beside `path`, which takes its place on leaving; after an error it is removed.

    A link at `path` is replaced, not followed. What is neither a file nor missing, like a pipe, is written
    directly. Raises `OSError` at once if nothing can be written there.
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
    """Raise `OSError` if a file at `path` could not be written, as far as that can be known beforehand."""
    if path.is_file() or path.is_dir():
        path.open("ab").close()
    elif not path.exists():
        with written_aside(path):
            pass
        path.unlink()
