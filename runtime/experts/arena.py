"""Host memory for every expert's blob: one reservation, page-locked where a GPU is to read it.

PyTorch's own pinned allocator may round each block up to a power of two (94 MB becomes 134), so the arena is
one anonymous mapping, which begins on a page, and is registered with the driver piece by piece. Where the
driver refuses (a limit on locked memory, WSL2), the arena stays ordinary memory, and copies go by way of
small pinned buffers.
"""

import contextlib
import mmap
import weakref

import torch
from torch import Tensor

from runtime.errors import DeviceError
from runtime.units import format_bytes

PIN_PIECE = 1 << 30  # bytes registered in one call: a refusal shows early, and no call takes seconds
PORTABLE = 1  # cudaHostRegisterPortable: locked for every device, not only for the current one


class Arena:
    """Blobs [layers, experts, blob_bytes] uint8. Written while loading, and never again."""

    def __init__(self, layers: int, experts: int, blob_bytes: int, pin: bool = False) -> None:
        """`pin` asks for page-locked memory; whether it was granted says `pinned`.

        Raises `DeviceError` if the host has no such memory to give.
        """
        self.experts = experts
        size = layers * experts * blob_bytes
        try:
            memory = mmap.mmap(-1, max(size, 1))
        except OSError as error:
            raise DeviceError(
                f"cannot reserve {format_bytes(size)} of host memory for all experts ({error.strerror}); "
                "free some, or quantise them to fewer bits"
            ) from error
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.blobs = flat[:size].view(layers, experts, blob_bytes)
        self.registered: list[int] = []  # addresses
        weakref.finalize(self, unregister, self.registered).atexit = False  # behind whom nobody closed
        self.pinned = pin and self.register(flat)

    def blob(self, layer: int, expert: int) -> Tensor:  # [blob_bytes] uint8
        return self.blobs[layer, expert]

    def register(self, flat: Tensor) -> bool:
        """Lock all pages, or none."""
        runtime = torch.cuda.cudart()
        for start in range(0, flat.numel(), PIN_PIECE):
            address = flat.data_ptr() + start
            if int(runtime.cudaHostRegister(address, min(PIN_PIECE, flat.numel() - start), PORTABLE)) != 0:
                clear_last_error()
                unregister(self.registered)
                return False
            self.registered.append(address)
        return True

    def close(self) -> None:
        """Unlock the pages. The memory goes when the last tensor that looks into it does."""
        unregister(self.registered)
        self.pinned = False
        self.__dict__.pop("blobs", None)


def unregister(addresses: list[int]) -> None:
    """Unlock the pages of each, and empty the list."""
    while addresses:
        torch.cuda.cudart().cudaHostUnregister(addresses.pop())


def clear_last_error() -> None:
    """The driver keeps a refusal for whoever next asks for errors, which would be the launch of a kernel that
    has nothing to do with it. This is such a launch."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
