"""Experts in a checkpoint's files: where each lies, and how it is read from there.

An expert is one run of bytes in a file, the same as in memory, so reading it is all there is to loading it.
Reads go around the system's cache where the file system can do that (direct I/O). Otherwise the system would
keep a second copy of what is read, in the very memory that was too small.

Direct I/O moves whole blocks, to addresses that are multiples of a block. An expert begins anywhere in its
file. So it is given the same place within a block of its berth (`shift`), and blocks are read to where they
belong. Nothing is copied afterwards.

A file that is deleted, or replaced by another of its name, stays as it was for those who have it open. A file
that was written to or cut short is found by every read, and no expert of it is computed.
"""

import ctypes
import errno
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.checkpoint import Checkpoint
from model.parameters import EXPERT
from model.quant.expert import ExpertFormat
from runtime.errors import LoadError
from runtime.experts.arena import DIRECT
from runtime.experts.link import Pace
from runtime.experts.tickets import ReadError

READERS = 4  # reads under way at a time: more gain little on an SSD
PART = 4 << 20  # bytes of one read
AGAIN = "load the model again"


class OpenFile:
    """One file, opened for reading, and what the system said of it then."""

    def __init__(self, path: Path, direct: bool) -> None:
        """With `direct`, reads go around the system's cache if the file system allows it. Raises
        `LoadError` if the file cannot be opened."""
        self.path = path
        try:
            with ExitStack() as on_error:
                self.descriptor = on_error.enter_context(path.open("rb", buffering=0)).fileno()
                self.opened = self.state()
                self.close = on_error.pop_all().close
        except OSError as error:
            raise LoadError(f"{path}: {error.strerror}") from error
        self.direct = direct and go_direct(self.descriptor)

    def state(self) -> tuple[int, int]:
        """The file's size, and when it was last written to."""
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raises `ReadError` if the file is no longer what it was when it was opened."""
        if self.state() != self.opened:
            raise ReadError(f"{self.path} was written to after it was opened; {AGAIN}")

    def read(self, offset: int, memory: memoryview, least: int) -> None:
        """Fill `memory` from `offset` on. At the file's end, `least` bytes are enough. Raises `ReadError`."""
        done = 0
        while done < least:
            direct = self.direct
            try:
                count = read_at(self, memory[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise ReadError(f"{self.path}: {error.strerror}; try again") from error
                self.direct = go_direct(self.descriptor, False)  # it takes the flag, and then no such read
                continue
            if direct and done + count < least:
                count -= count % DIRECT  # the next read begins with a block, too
            if not count:
                raise ReadError(f"{self.path} ended {least - done} bytes early; {AGAIN}")
            done += count


def go_direct(descriptor: int, wanted: bool = True) -> bool:
    """Have reads of an open file go around the system's cache, or no longer. Returns whether they do."""
    if not hasattr(os, "O_DIRECT") or sys.platform == "win32":
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if wanted else 0))
    except OSError:  # a file system in memory, or of a network
        return False
    return wanted


def read_at(file: OpenFile, memory: memoryview, offset: int) -> int:
    """Read some bytes at an offset, and return how many."""
    if hasattr(os, "preadv"):
        return os.preadv(file.descriptor, [memory], offset)
    with file.path.open("rb", buffering=0) as again:  # Windows, where an open file cannot be replaced
        again.seek(offset)
        return again.readinto(memory) or 0


@dataclass(frozen=True)
class Extent:
    """Bytes of a file that one copy reads: all of an expert, or a part of it that ends where a block does."""

    file: OpenFile
    offset: int  # in the file
    bytes: int

    def numel(self) -> int:
        return self.bytes

    def __getitem__(self, part: slice) -> "Extent":
        """A part, cut back to the last whole block that it has, unless it is the end of the extent.

        >>> whole = Extent(None, 4096 * 7 + 96, 9000)
        >>> whole[0:5000], whole[4000:9000]
        (Extent(file=None, offset=28768, bytes=4000), Extent(file=None, offset=32768, bytes=5000))
        """
        start, end, _ = part.indices(self.bytes)
        if end < self.bytes:
            cut = end - (self.offset + end) % DIRECT
            end = cut if cut > start else end
        return Extent(self.file, self.offset + start, end - start)


class ExpertFiles:
    """The files that hold a model's experts, open for reading."""

    def __init__(self, places: Mapping[tuple[int, int], tuple[Path, int]], size: int, direct: bool) -> None:
        """`places` has each expert's file and offset, by layer and expert. Each has `size` bytes."""
        self.size, self.files = size, dict[Path, OpenFile]()
        self.extents: dict[tuple[int, int], Extent] = {}
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for key, (path, offset) in places.items():
                if path not in self.files:
                    self.files[path] = OpenFile(path, direct)
                self.extents[key] = Extent(self.files[path], offset, size)
            on_error.pop_all()

    @staticmethod
    def of(checkpoint: Checkpoint, form: ExpertFormat, direct: bool = True) -> "ExpertFiles":
        """The files of a checkpoint that keeps experts as memory does. Raises `LoadError` if one cannot be
        opened."""
        places = {}
        for layer in range(checkpoint.config.layers):
            for e in range(checkpoint.config.experts):
                prefix = EXPERT.format(n=layer, e=e)
                first = checkpoint.layout.filling([prefix + field.name for field in form.stored])[0]
                places[layer, e] = first.path, first.offset
        return ExpertFiles(places, form.stored[-1].end, direct)

    def check(self) -> None:
        """Raises `LoadError` if a file is no longer the one of its name, or was written to. What was read by
        that name meanwhile may be of another model."""
        for path, file in self.files.items():
            with suppress(OSError):
                same = os.path.samestat(path.stat(), os.fstat(file.descriptor))
                if same and file.state() == file.opened:
                    continue
            raise LoadError(f"{path} was replaced or written to while the model was loaded; {AGAIN}")

    def extent(self, layer: int, expert: int) -> Extent:
        return self.extents[layer, expert]

    def shift(self, layer: int, expert: int) -> int:
        """Where in a block of memory the expert begins: where it does in a block of its file."""
        return self.extents[layer, expert].offset % DIRECT

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


class DiskLink:
    """Moves bytes from files to host memory, several reads at a time: `runtime.experts.link.Link`."""

    piece = READERS * PART

    def __init__(self, files: ExpertFiles, bytes_per_second: float | None = None) -> None:
        self.files, self.pace = files, Pace(bytes_per_second)
        if bytes_per_second is not None:
            self.piece = min(self.piece, max(int(bytes_per_second / 250), 16 * DIRECT))  # about 4 ms
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="expert-reads")

    def blocks(self, source: Extent) -> bool:
        return True

    def begin(self, free: Any) -> None:
        """Wait until the device has read what the berth held before."""
        if free is not None:
            free.synchronize()

    def prepare(self, source: Extent, demand: bool) -> Extent:
        return source

    def move(self, source: Extent, target: Tensor, demand: bool) -> None:
        """Read one piece. The memory in front of the target, up to a whole block, and after it is
        overwritten, too."""
        began = time.perf_counter()
        source.file.check()
        reads: list[Future[None]] = []
        try:
            for part in parts(source, target):
                reads.append(self.readers.submit(source.file.read, *part))
        finally:
            wait(reads)  # after an error, too: nothing may write to the berth then
        for read in reads:
            read.result()
        source.file.check()
        self.pace.spend(source.bytes, began)

    def reached(self, mark: Any) -> None:
        pass

    def used(self) -> None:
        return None

    def stalled(self) -> float:
        return 0.0

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self.readers.shutdown()
        self.files.close()


def parts(source: Extent, target: Tensor) -> Iterator[tuple[int, memoryview, int]]:
    """The reads that fill `target` with the bytes of `source`: an offset in the file, the memory for whole
    blocks from there on, and how many bytes of it the file must have."""
    head = source.offset % DIRECT
    start, address, rest = source.offset - head, target.data_ptr() - head, head + source.bytes
    while rest > 0:
        size = min(-(-rest // DIRECT) * DIRECT, PART)
        yield start, memoryview((ctypes.c_char * size).from_address(address)).cast("B"), min(rest, size)
        start, address, rest = start + size, address + size, rest - size
