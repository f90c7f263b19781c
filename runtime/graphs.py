"""Work that is put on the device again and again, as a CUDA graph: one call instead of hundreds."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Graphs(Protocol):
    """How a device repeats work, and shares memory with the host meanwhile."""

    def shared(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that captured work may copy from and to."""
        ...

    def capture(self, work: Work) -> Work:
        """What does the same to the same memory as `work` did when it was captured, whatever it would do by
        then. Capturing may or may not do it once. Raises `RuntimeError` where it cannot be captured."""
        ...

    def wait(self) -> None:
        """Return when all that was put on the device is done."""
        ...


class CudaGraphs:
    """One pool of memory serves all graphs: they run one after the other, in the order of capture."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # the default stream cannot be captured

    def shared(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=True)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            # Other threads go on copying experts meanwhile, which is none of this graph's business.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph.replay

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
