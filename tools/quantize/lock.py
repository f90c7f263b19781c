"""One process at a time in a folder."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import MixtralError

NAME = "quantize.lock"
UNKNOWN = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process has; where the system cannot tell, trust that none has.

    What is locked is a file that is open for writing: NFS locks no other, and no folder.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:  # Windows
        yield
        return
    handle = take(folder)
    try:
        yield
    finally:
        try:
            (folder / NAME).unlink(missing_ok=True)  # while it is locked, so it is no one else's
        finally:
            os.close(handle)  # or no later run of this process could take it


def take(folder: Path) -> int:
    """The lock file, open and locked. Raises `MixtralError` if another process has it."""
    while True:
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            lock(handle, folder)
            if is_there(handle, folder / NAME):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the process that had it removed it just now


def lock(handle: int, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise MixtralError(f"{folder}: another process is quantizing into it; wait for its end") from error
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise


def is_there(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
