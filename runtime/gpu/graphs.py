"""CUDA graphs: the launches of some work, captured once and replayed by one call instead of hundreds."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.gpu.streams import streams

Work = Callable[[], Any]


class Graphs(Protocol):
    """How a device repeats work."""

    def shared(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory, all 0, that captured work may read and write."""
        ...

    def capture(self, work: Work) -> Work:
        """Call `work` and return a call that repeats on the same memory what it launched.

        The launches themselves may or may not take place during the capture. Raises if `work` cannot be
        captured.
        """
        ...

    def wait(self) -> None:
        """Wait until the device has done all launched work."""
        ...


class CudaGraphs:
    """One pool of memory serves all graphs, because they run one after the other, in the order of capture."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.streams = streams(device)
        self.stream = self.streams.capturing
        # A pool ends with its last graph and cannot be used again, so one graph stays.
        self.anchor: torch.cuda.CUDAGraph | None = None
        self.broken: list[torch.cuda.CUDAGraph] = []  # kept, because PyTorch may still refer to them

    def shared(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device="cpu", pin_memory=True)

    def capture(self, work: Work) -> Work:
        with self.streams.turn:
            if self.anchor is None:
                nothing = torch.zeros(1, device=self.device)
                self.anchor = self.record(partial(nothing.fill_, 0))
            return self.record(work).replay

    def record(self, work: Work) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self.stream:
            # thread_local, because other threads go on copying experts during the capture.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self.give_up(graph)
                raise
        return graph

    def give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. Errors here are dropped, since the first one says more."""
        self.broken.append(graph)
        with contextlib.suppress(Exception):
            graph.capture_end()
        with contextlib.suppress(Exception):  # `capture_end` may fail before it ends allocating to the pool
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
