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
    """Keep a folder to this process. Where the system cannot lock, trust that no other process uses it.

    The lock is on a file that is open for writing, because NFS locks neither other files nor folders. Raises
    `MixtralError` if another process has the folder.
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
            (folder / NAME).unlink(missing_ok=True)  # while it is locked, so it is not another process's
        finally:
            os.close(handle)  # otherwise no later run of this process could take it


def take(folder: Path) -> int:
    """Open and lock the lock file. Returns its handle. Raises `MixtralError` if another process has it."""
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
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
