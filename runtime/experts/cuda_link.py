"""The link to a CUDA device: a stream for each direction, with events between them and the computing."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from runtime.gpu.streams import same, streams

PIECE = 8 << 20  # bytes: 0.3 ms at 25 GB/s


class CudaLink:
    """Copies pieces on a stream of their own, from page-locked memory or through page-locked buffers.

    From page-locked memory, the computing thread puts all pieces of a demanded expert on the stream at once.
    The copy thread keeps two pieces of guesses there, so that the link does not idle between them. It puts
    another there only after the earlier of the two has ended. So a demanded expert waits for two at most.
    """

    piece = PIECE

    def __init__(self, device: torch.device, locked: Callable[[Tensor], bool] | None = None) -> None:
        """`locked` says whether a source is page-locked. None means that all are."""
        self.device, self.locked = device, locked
        self.stream = same(streams(device).copies)
        self.staging = (
            [torch.empty(PIECE, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in (0, 1)]
            if locked
            else []
        )
        self.before: list[torch.cuda.Event | None] = [None, None]  # after each staging buffer's last use
        self.guesses: list[torch.cuda.Event | None] = [None, None]  # after the last two pieces of guesses
        self.waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # around each wait for a copy
        self.waited = 0.0  # seconds of the waits that are over and no longer in `waits`

    def blocks(self, source: Tensor) -> bool:
        return self.locked is not None and not self.locked(source)

    def begin(self, free: torch.cuda.Event | None) -> None:
        if free is not None:
            self.stream.wait_event(free)

    def prepare(self, source: Tensor, demand: bool) -> Tensor:
        if not demand and (earlier := self.guesses[0]) is not None:
            earlier.synchronize()
        return self.stage(source) if self.blocks(source) else source

    def move(self, source: Tensor, target: Tensor, demand: bool) -> torch.cuda.Event:
        # Entering the stream itself, unlike `torch.cuda.stream`, is C code throughout. So an interrupt cannot
        # leave the computing thread on this stream.
        with self.stream:
            target.copy_(source, non_blocking=True)
            mark = torch.cuda.Event()
            mark.record(self.stream)
        if self.staging and source.data_ptr() == self.staging[0].data_ptr():
            self.before[0] = mark
        if not demand:
            self.guesses = [self.guesses[1], mark]
        return mark

    def stage(self, source: Tensor) -> Tensor:
        """Copy a piece to the buffer that has been idle for longer, and return it there."""
        self.staging.reverse()
        self.before.reverse()
        if (busy := self.before[0]) is not None:
            busy.synchronize()
        return self.staging[0][: source.numel()].copy_(source)

    def reached(self, mark: torch.cuda.Event) -> None:
        stream = torch.cuda.current_stream(self.device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        stream.wait_event(mark)
        end.record(stream)
        self.waits.append((begin, end))
        while self.waits[0][1].query() and len(self.waits) > 1:  # keep what is not over
            begin, end = self.waits.popleft()
            self.waited += begin.elapsed_time(end) / 1e3

    def stalled(self) -> float:
        over = [(begin, end) for begin, end in self.waits.copy() if end.query()]
        return self.waited + sum(begin.elapsed_time(end) for begin, end in over) / 1e3

    def used(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def settle(self) -> None:
        self.stream.synchronize()

    def close(self) -> None:
        self.settle()


class CudaReturn:
    """Copies pieces back from the device, on a stream of their own: the link's other direction."""

    piece = PIECE

    def __init__(self, device: torch.device, locked: bool) -> None:
        """`locked` says whether all targets are page-locked."""
        self.locked, self.device = locked, device
        self.stream = same(streams(device).returns)

    def blocks(self, source: Tensor) -> bool:
        return not self.locked

    def begin(self, free: torch.cuda.Event | None) -> None:
        if free is not None:
            self.stream.wait_event(free)

    def prepare(self, source: Tensor, demand: bool) -> Tensor:
        return source

    def move(self, source: Tensor, target: Tensor, demand: bool) -> torch.cuda.Event:
        with self.stream:
            target.copy_(source, non_blocking=True)
            mark = torch.cuda.Event()
            mark.record(self.stream)
        if not self.locked:  # from memory that is not page-locked, `CudaLink.stage` reads without marks
            mark.synchronize()
        return mark

    def reached(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def used(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def stalled(self) -> float:
        return 0.0  # nothing computes with what was copied back

    def settle(self) -> None:
        self.stream.synchronize()

    def close(self) -> None:
        self.settle()
