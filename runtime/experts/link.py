"""The link between host memory and a device, as a protocol.

On a GPU it is a CUDA stream (`runtime.experts.cuda_link`). On a CPU it is a plain copy, as slow as asked for.
So demand, guesses and overlap work the same on every machine, and can be studied without a GPU.
"""

import time
from typing import Any, Protocol

import numpy as np
from torch import Tensor

SLACK = 1e-3  # seconds that a busy link may catch up on, where sleeping took longer than asked for


class Link(Protocol):
    """Moves bytes a piece at a time: from host memory to the device, back from there, or from files.

    Two threads use a link. The computing thread calls `blocks`, and `reached` and `used` of the link to the
    device. The copy thread calls `prepare`, `begin`, `move` and `close`. For a copy that does not block, the
    computing thread calls `begin` and `move` itself. The copy engine sees to it that only one thread at a
    time is in `begin` or `move`.

    A source is a tensor, or for a disk a part of a file. A mark is a point in the work of a device. What it
    is made of is the link's own affair.
    """

    piece: int  # bytes to move at a time

    def blocks(self, source: Any) -> bool:
        """Whether moving these bytes keeps the calling thread waiting."""
        ...

    def begin(self, free: Any) -> None:
        """Let the moves that follow come after a mark of the device, such as the last use of a slot."""
        ...

    def prepare(self, source: Any, demand: bool) -> Any:
        """Wait until a piece may be put on the link, and return the bytes that `move` will read.

        A guess waits here as long as it could delay a demanded copy that comes later.
        """
        ...

    def move(self, source: Any, target: Tensor, demand: bool) -> Any:
        """Copy one piece, or begin to. Returns the mark that `reached` takes."""
        ...

    def reached(self, mark: Any) -> None:
        """Let all computing that is launched from now on come after the mark."""
        ...

    def used(self) -> Any:
        """A mark after everything that has been launched so far."""
        ...

    def stalled(self) -> float:
        """Seconds that the device has waited for copies, as far as those waits are over.

        Time that the computing thread spent in `CopyEngine.wait` is not included. Any thread may call this at
        any moment. It changes nothing.
        """
        ...

    def settle(self) -> None:
        """Return when nothing is under way any more."""
        ...

    def close(self) -> None:
        """The same. No `move` follows."""
        ...


class Pace:
    """Slows a link down to `bytes_per_second`. None does not slow it down."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self.rate = bytes_per_second
        self.free_at = 0.0  # when the link will have moved everything that was put on it

    def spend(self, size: int, start: float) -> None:
        """Sleep until a link of this rate would have moved `size` bytes. It began at the time `start`."""
        if self.rate is not None:
            idle = start - self.free_at > SLACK
            self.free_at = (start if idle else self.free_at) + size / self.rate
            if (wait := self.free_at - time.perf_counter()) > 0:
                time.sleep(wait)


class HostLink:
    """A CPU's stand-in for a link: copies within host memory, at `bytes_per_second` or as fast as it can."""

    def __init__(self, bytes_per_second: float | None = None) -> None:
        self.pace = Pace(bytes_per_second)
        # About a millisecond's worth. A shorter sleep is inaccurate, and wakes the copy thread too often.
        rate = bytes_per_second
        self.piece = 1 << 20 if rate is None else min(max(int(rate / 1000), 1 << 14), 1 << 22)

    def blocks(self, source: Tensor) -> bool:
        return True

    def begin(self, free: Any) -> None:
        pass

    def prepare(self, source: Tensor, demand: bool) -> Tensor:
        return source

    def move(self, source: Tensor, target: Tensor, demand: bool) -> None:
        start = time.perf_counter()
        np.copyto(target.numpy(), source.numpy())  # releases the interpreter's lock, uses this thread alone
        self.pace.spend(source.numel(), start)

    def reached(self, mark: Any) -> None:
        pass

    def used(self) -> None:
        return None

    def stalled(self) -> float:
        return 0.0

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass
