"""One of two ranks between which frames go to and fro: over a ring, and by torch.distributed itself."""

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from dev.peers.llamacpp.serving import serve
from runtime.ranks.frames import frame_bytes
from runtime.ranks.meeting import Meeting
from runtime.ranks.orders import Order
from runtime.ranks.ring import Ring

DTYPE = torch.bfloat16
WIDTH = 4096  # of Mixtral-8x7B's rows
HEADER = Order.length(1)  # numbers


class HopSide:
    def meet(self, rank: int) -> None:
        """Connect to the other rank. Rank 1 does it while it answers."""
        self.rank, self.other = rank, 1 - rank
        self.thread = threading.Thread(target=self.connect, daemon=True)
        self.thread.start()
        if not rank:
            self.thread.join()

    def connect(self) -> None:
        meeting = Meeting.join(timeout=10)
        store = dist.PrefixStore("raw", meeting.store)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=2)
        self.ring = Ring(meeting, frame_bytes(1, WIDTH, DTYPE, HEADER))

    def echo(self, how: str, size: int, count: int) -> None:
        """Send back what comes, while the answer goes out."""
        self.thread.join()
        work, message = getattr(self, f"echo_{how}"), rows(size)
        self.thread = threading.Thread(target=lambda: [work(message) for _ in range(count)], daemon=True)
        self.thread.start()

    def echo_ring(self, message: torch.Tensor) -> None:
        self.ring.send(*self.ring.receive())

    def echo_gloo(self, message: torch.Tensor) -> None:
        dist.recv(message, self.other)
        dist.send(message, self.other)

    def bounce(self, how: str, size: int, count: int) -> dict[str, Any]:
        """Send so many messages of so many bytes, each when the last one has come back. Returns the seconds
        that each was on its way there, half of the time until it was back."""
        work, message, times = getattr(self, f"bounce_{how}"), rows(size), []
        for _ in range(count):
            began = time.perf_counter()
            work(message)
            times.append((time.perf_counter() - began) / 2)
        return {"times": times}

    def bounce_ring(self, message: torch.Tensor) -> None:
        self.ring.send([0] * HEADER, message)
        self.ring.receive()

    def bounce_gloo(self, message: torch.Tensor) -> None:
        dist.send(message, self.other)
        dist.recv(message, self.other)

    def spent(self) -> dict[str, float]:
        """The processor's seconds since the process began."""
        return {"processor": time.process_time()}


def rows(size: int) -> torch.Tensor:
    """As many bytes as rows of Mixtral-8x7B, or less than one."""
    width = min(size // DTYPE.itemsize, WIDTH)
    return torch.ones(size // DTYPE.itemsize // width, width, dtype=DTYPE)


if __name__ == "__main__":
    serve(HopSide())
