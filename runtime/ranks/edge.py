"""One direction between two ranks: messages of bytes by gloo, without `torch.distributed`'s global state.

Gloo transfers a message when its receive has been posted. So receives are posted ahead, and a message takes
one way instead of three.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import repeat
from typing import Any

import torch

FOREVER = timedelta(days=1000)
MOMENT = timedelta(milliseconds=1)
FRAMES, ROWS, BREAK = range(3)  # tags


class Edge:
    """A connection from one rank to the next. Errors of gloo's are `RuntimeError`."""

    def __init__(self, store: Any, sends: bool, address: str, patience: float) -> None:
        """Connect to the other end, which does the same with the same `store`. Blocks in C++, at most
        `patience` seconds. `address`: numeric, of this machine, that the other end can reach."""
        from torch.distributed import ProcessGroupGloo

        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # what PyTorch itself makes them by
        options._timeout = timedelta(seconds=patience)
        options._threads = 1  # for collectives, of which there are none
        options._devices = [ProcessGroupGloo.create_device(hostname=address)]
        self.other = 1 if sends else 0
        self.group: Any = ProcessGroupGloo(store, 1 - self.other, 2, options)

    def sends(self, messages: Sequence[torch.Tensor], tags: Sequence[int]) -> Iterator[Any]:
        """Begin to send one message each time that the next result is taken, by C code alone. A message must
        stay as it is until `wait` has returned for its result."""
        return map(self.group.send, [[message] for message in messages], repeat(self.other), tags)

    def post(self, message: torch.Tensor, tag: int) -> Any:
        """Begin to receive into `message`, which may be longer than what is sent."""
        return self.group.recv([message], self.other, tag)

    def sever(self) -> None:
        """End all transfers here and at the other end with an error.

        Gloo has no such call. But when a wait of its runs out of time, it closes the connection, and every
        other wait ends with an error, except those whose message is half transferred.
        """
        with suppress(RuntimeError):
            self.post(torch.empty(1, dtype=torch.uint8, device="cpu"), BREAK).wait(MOMENT)

    def close(self) -> None:
        """Free the connection. No transfer may be waited for any more."""
        self.group = None


def wait(work: Any) -> None:
    """Return when a transfer has ended. Blocks in C++. Raises `RuntimeError` if its connection breaks."""
    work.wait(FOREVER)
