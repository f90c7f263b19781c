"""Host memory for every expert's blob: one reservation, page-locked where a GPU is to read it.

PyTorch's own pinned allocator may round each block up to a power of two (94 MB becomes 134), so the arena is
one anonymous mapping, which begins on a page, and is registered with the driver piece by piece. A copy's
source has to lie in one registration, so each blob then begins on a page of its own, and pieces end where
blobs do. Where the driver refuses (a limit on locked memory, WSL2), the arena stays ordinary memory, and
copies go by way of small pinned buffers.
"""

import contextlib
import mmap
import weakref
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from runtime.errors import DeviceError
from runtime.units import format_bytes

PIN_PIECE = 1 << 30  # bytes registered in one call, about: a refusal shows early, and no call takes seconds
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
        """`pin` asks the driver of `device` (None: the current one) for page-locked memory; whether it was
        granted says `pinned`.

        Raises `DeviceError` if the host has no such memory to give.
        """
        self.experts, self.device = experts, device
        pitch = -(-blob_bytes // mmap.PAGESIZE) * mmap.PAGESIZE if pin else blob_bytes  # from blob to blob
        size = layers * experts * pitch
        try:
            memory = mmap.mmap(-1, max(size, 1))
        except OSError as error:
            raise DeviceError(
                f"cannot reserve {format_bytes(size)} of host memory for all experts ({error.strerror}); "
                "free some, or quantise them to fewer bits"
            ) from error
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.blobs = flat[:size].view(layers, experts, pitch)[:, :, :blob_bytes]
        self.registered: list[int] = []  # addresses
        # of an arena that nobody closed
        weakref.finalize(self, unregister, self.registered, device).atexit = False
        self.pinned = pin and self.register(flat[:size], pitch)

    def blob(self, layer: int, expert: int) -> Tensor:  # [blob_bytes] uint8, without gaps
        return self.blobs[layer, expert]

    def register(self, flat: Tensor, pitch: int) -> bool:
        """Lock all pages, or none, a run of whole blobs at a time."""
        step = max(PIN_PIECE // pitch, 1) * pitch
        with current(self.device):
            runtime = torch.cuda.cudart()
            for start in range(0, flat.numel(), step):
                address = flat.data_ptr() + start
                if int(runtime.cudaHostRegister(address, min(step, flat.numel() - start), PORTABLE)) != 0:
                    clear_last_error()
                    unregister(self.registered, self.device)
                    return False
                self.registered.append(address)
        return True

    def close(self) -> None:
        """Unlock the pages. The memory goes when the last tensor that looks into it does."""
        unregister(self.registered, self.device)
        self.pinned = False
        self.__dict__.pop("blobs", None)


def current(device: torch.device | None) -> AbstractContextManager[object]:
    """While inside, calls of the driver go to `device`: to another they would make it a context, which takes
    some 500 MB there."""
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


def unregister(addresses: list[int], device: torch.device | None) -> None:
    """Unlock the pages of each, and empty the list."""
    with current(device) if addresses else contextlib.nullcontext():
        while addresses:
            torch.cuda.cudart().cudaHostUnregister(addresses.pop())


def clear_last_error() -> None:
    """The driver keeps a refusal for whoever next asks for errors, which would be the launch of a kernel that
    has nothing to do with it. This is such a launch."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
