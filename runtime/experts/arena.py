"""Host memory for every expert's blob: one reservation, page-locked where a GPU is to read it.

PyTorch's own pinned allocator may round each block up to a power of two (94 MB becomes 134), so the arena is
one anonymous mapping, which begins on a page, and is registered with the driver piece by piece. A copy's
source has to lie in one registration, so each blob then begins on a page of its own, and pieces end where
blobs do. Where the driver refuses one (too little memory is free, or WSL2's share is used up), what it has
locked by then stays so, and the rest is ordinary memory: blobs there are copied by way of small pinned
buffers.

The mapping is private, because only such memory can have huge pages, of which 512 times fewer have to be
locked.
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

PIN_PIECE = 1 << 30  # bytes registered in one call, about: a refusal shows early, and no call takes seconds
WIPE_ON_FORK = 18  # MADV_WIPEONFORK of Linux, which Python's `mmap` does not name
PORTABLE = 1  # cudaHostRegisterPortable: locked for every device, not only for the current one


class Arena:
    """Blobs [layers, experts, blob_bytes] uint8. Written while loading, and never again."""

    def __init__(
        self,
        layers: int,
        experts: int,
        blob_bytes: int,
        pin: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """`pin` asks the driver of `device` (None: the current one) for page-locked memory; whether all of it
        was granted says `pinned`, and `locked` of each blob.

        Raises `DeviceError` if the host has no such memory to give.
        """
        self.experts, self.device, self.process = experts, device, os.getpid()
        pitch = -(-blob_bytes // mmap.PAGESIZE) * mmap.PAGESIZE if pin else blob_bytes  # from blob to blob
        size = layers * experts * pitch
        try:
            memory = private_memory(max(size, 1), huge=pin)
        except OSError as error:
            raise DeviceError(
                f"cannot reserve {format_bytes(size)} of host memory for all experts ({error.strerror}); "
                "free some, or quantize them to fewer bits"
            ) from error
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.bytes, self.start = size, flat.data_ptr()
        self.blobs = flat[:size].view(layers, experts, pitch)[:, :, :blob_bytes]
        self.registered: list[int] = []  # addresses
        # of an arena that nobody closed
        weakref.finalize(self, unregister, self.registered, device, self.process).atexit = False
        self.locked_bytes = self.register(flat[:size], pitch) if pin else 0  # from the beginning on

    @property
    def pinned(self) -> bool:
        """Whether all of it is page-locked."""
        return self.locked_bytes == self.bytes

    def locked(self, source: Tensor) -> bool:
        """Whether these bytes, of one blob, are page-locked."""
        return 0 <= source.data_ptr() - self.start < self.locked_bytes

    def blob(self, layer: int, expert: int) -> Tensor:  # [blob_bytes] uint8, without gaps
        return self.blobs[layer, expert]

    def register(self, flat: Tensor, pitch: int) -> int:
        """Lock pages, a run of whole blobs at a time, as far as the driver does. Returns how many bytes."""
        step = max(PIN_PIECE // pitch, 1) * pitch
        with current(self.device):
            runtime = torch.cuda.cudart()
            for start in range(0, flat.numel(), step):
                address = flat.data_ptr() + start
                if int(runtime.cudaHostRegister(address, min(step, flat.numel() - start), PORTABLE)) != 0:
                    clear_last_error()
                    return start
                self.registered.append(address)
        return flat.numel()

    def close(self) -> None:
        """Unlock the pages. The memory goes when the last tensor that looks into it does."""
        unregister(self.registered, self.device, self.process)
        self.locked_bytes = 0
        self.__dict__.pop("blobs", None)


def private_memory(size: int, huge: bool) -> mmap.mmap:
    """Zeros, on `huge` pages where there are such: a driver locks them sooner, but where the machine's memory
    is in pieces, finding them takes longer than filling small ones. A fork gets no copy of them: no engine
    computes there, and pages that the driver has locked would be copied at once. Raises `OSError`."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        for advice in (mmap.MADV_HUGEPAGE, WIPE_ON_FORK) if huge else (WIPE_ON_FORK,):
            with contextlib.suppress(OSError):  # a kernel without
                memory.madvise(advice)
    return memory


def unlocked_remedy() -> str:
    """What helps where the driver does not lock all memory that it is asked to."""
    if "microsoft" in platform.release().lower():  # WSL2
        return "raise `memory` under [wsl2] in .wslconfig, or quantize experts to fewer bits"
    return "free some host memory, or quantize experts to fewer bits"


def current(device: torch.device | None) -> AbstractContextManager[object]:
    """While inside, calls of the driver go to `device`: to another they would make it a context, which takes
    some 500 MB there."""
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


def unregister(addresses: list[int], device: torch.device | None, process: int) -> None:
    """Unlock the pages of each, and empty the list. In a fork of the `process` that locked them they are not
    locked, and the driver is not to be asked."""
    if os.getpid() != process:
        addresses.clear()
    with current(device) if addresses else contextlib.nullcontext():
        while addresses:
            torch.cuda.cudart().cudaHostUnregister(addresses.pop())


def clear_last_error() -> None:
    """The driver keeps a refusal for whoever next asks for errors, which would be the launch of a kernel that
    has nothing to do with it. This is such a launch."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
