"""Work that is put on the device again and again, as a CUDA graph: one call instead of hundreds."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.gpu.streams import streams

Work = Callable[[], Any]


class Graphs(Protocol):
    """How a device repeats work, and shares memory with the host meanwhile."""

    def shared(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that captured work may copy from and to."""
        ...

    def capture(self, work: Work) -> Work:
        """What does the same to the same memory as `work` does now, whatever `work` would do by then. Whether
        capturing does it once as well is up to the device. Raises where it cannot be captured."""
        ...

    def wait(self) -> None:
        """Return when all that was put on the device is done."""
        ...


class CudaGraphs:
    """One pool of memory serves all graphs: they run one after the other, in the order of capture."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.streams = streams(device)
        self.stream = self.streams.capturing
        # A pool ends with its last graph, and cannot be used again: so one graph stays.
        self.anchor: torch.cuda.CUDAGraph | None = None
        self.broken: list[torch.cuda.CUDAGraph] = []  # PyTorch may go on referring to them

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
            # Other threads go on copying experts meanwhile, which is none of this graph's business.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self.give_up(graph)
                raise
        return graph

    def give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that went wrong. Of what that raises nothing is as telling as what went wrong."""
        self.broken.append(graph)
        with contextlib.suppress(Exception):
            graph.capture_end()
        with contextlib.suppress(Exception):  # where the former did not come to it: or allocating stays as is
            torch._C._cuda_endAllocateToPool(self.device.index or 0, self.pool)

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
