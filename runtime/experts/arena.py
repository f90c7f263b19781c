"""Host memory for experts, in berths: one reservation, page-locked where a GPU reads it.

PyTorch's own pinned allocator may round each block up to a power of two (94 MB becomes 134). So the arena is
one anonymous mapping, which begins on a page and is registered with the driver run by run. The source of a
copy has to lie in one registration, so each berth begins on a page of its own, and runs end where berths do.

The driver may refuse a run, because too little memory is free or WSL2's share is used up. Then the memory
that it has locked so far stays locked, and the rest is ordinary memory. Experts there are copied through
small pinned buffers.

The mapping is private, because only private memory can have huge pages, and the driver locks those with 512
times less work.
"""

import contextlib
import mmap
import os
import platform
import sys
import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from runtime.errors import DeviceError
from runtime.units import format_bytes

PIN_BYTES = 1 << 30  # registered in one call, about: a refusal shows early, and no call takes seconds
WIPE_ON_FORK = 18  # Linux's MADV_WIPEONFORK, which Python's `mmap` does not name
PORTABLE = 1  # cudaHostRegisterPortable: locked for every device, not only the current one
DIRECT = 4096  # direct reads begin and end on multiples of this, in a file and in memory


class Arena:
    """Berths [count, distance] uint8, each with room for one expert's blob."""

    def __init__(
        self,
        count: int,
        blob_bytes: int,
        pin: bool = False,
        device: torch.device | None = None,
        tiered: bool = False,
    ) -> None:
        """Reserve the memory. `pin` asks the driver to lock it for `device`, by default the current device.
        Afterwards `pinned` says whether the driver locked all of it, and `locked` says so of each berth.
        `tiered` berths are filled by direct reads, too: see `pitch`.

        Raises `DeviceError` if the host cannot give that much memory.
        """
        self.device, self.process = device, os.getpid()
        distance = pitch(blob_bytes, pin, tiered)
        size = count * distance
        try:
            memory = private_memory(max(size, 1), huge=pin)
        except OSError as error:
            raise DeviceError(
                f"cannot reserve {format_bytes(size)} of host memory for {count} experts ({error.strerror}); "
                "free some, or quantize them to fewer bits"
            ) from error
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.total_bytes, self.start = size, flat.data_ptr()
        self.berths = flat[:size].view(count, distance)
        self.registered: list[int] = []  # addresses
        # An arena that is never closed is unlocked, too.
        weakref.finalize(self, unregister, self.registered, device, self.process).atexit = False
        self.locked_bytes = self.register(flat[:size], distance) if pin else 0  # from the start of the arena

    @property
    def pinned(self) -> bool:
        """Whether the whole arena is page-locked."""
        return self.locked_bytes == self.total_bytes

    def locked(self, source: Tensor) -> bool:
        """Whether these bytes, of one berth, are page-locked."""
        return 0 <= source.data_ptr() - self.start < self.locked_bytes

    def berth(self, number: int) -> Tensor:  # [distance] uint8
        return self.berths[number]

    def register(self, flat: Tensor, distance: int) -> int:
        """Lock runs of whole berths until the driver refuses one. Returns the number of bytes locked."""
        run = max(PIN_BYTES // distance, 1) * distance
        with current(self.device):
            runtime = torch.cuda.cudart()
            for start in range(0, flat.numel(), run):
                address = flat.data_ptr() + start
                if int(runtime.cudaHostRegister(address, min(run, flat.numel() - start), PORTABLE)) != 0:
                    clear_last_error()
                    return start
                self.registered.append(address)
        return flat.numel()

    def close(self) -> None:
        """Unlock the pages. The memory is freed with the last tensor that views it."""
        unregister(self.registered, self.device, self.process)
        self.locked_bytes = 0
        self.__dict__.pop("berths", None)


def pitch(blob_bytes: int, pin: bool, tiered: bool) -> int:
    """The bytes from one berth to the next.

    Berths that are page-locked begin on pages. If there are files below the arena (`tiered`), a direct read
    puts a blob's bytes at the offset from a multiple of `DIRECT` that they have in the file, with the rest of
    a block before and after them.

    >>> pitch(5120, pin=False, tiered=False), pitch(5120, pin=False, tiered=True)
    (5120, 16384)
    """
    size, unit = (blob_bytes + 2 * DIRECT, DIRECT) if tiered else (blob_bytes, 1)
    unit = max(unit, mmap.PAGESIZE) if pin else unit
    return -(-size // unit) * unit


def private_memory(size: int, huge: bool) -> mmap.mmap:
    """A mapping of `size` zero bytes. A fork sees zeros there and copies nothing: no engine computes in a
    fork, and the system would copy locked pages at once.

    With `huge`, it asks for huge pages, which a driver locks sooner. Where the machine's memory is
    fragmented, finding huge pages takes longer than filling small ones. Raises `OSError`.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        for advice in (mmap.MADV_HUGEPAGE, WIPE_ON_FORK) if huge else (WIPE_ON_FORK,):
            with contextlib.suppress(OSError):  # an older system knows no such advice
                memory.madvise(advice)
    return memory


def unlocked_remedy() -> str:
    """What the user can do if the driver does not lock all of an arena."""
    if "microsoft" in platform.release().lower():  # WSL2
        return "raise `memory` under [wsl2] in .wslconfig, or quantize experts to fewer bits"
    return "free some host memory, or quantize experts to fewer bits"


def current(device: torch.device | None) -> AbstractContextManager[object]:
    """Send this thread's calls of the driver to `device` while inside. Sent to another device, they would
    create a context there, which takes some 500 MB."""
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


def unregister(addresses: list[int], device: torch.device | None, process: int) -> None:
    """Unlock the pages of every address, and empty the list. In a fork of the `process` that locked them,
    nothing is locked, and the driver is not called."""
    if os.getpid() != process:
        addresses.clear()
    with current(device) if addresses else contextlib.nullcontext():
        while addresses:
            torch.cuda.cudart().cudaHostUnregister(addresses.pop())


def clear_last_error() -> None:
    """Launch a kernel that takes the blame. The driver reports a refusal again at the next call that asks for
    errors, which would be an unrelated launch."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
