"""Which rank this process is: the variables that torchrun sets, or whoever starts ranks by hand."""

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from runtime.errors import DeviceError
from runtime.ranks.deadline import Deadline

HOW = "start the ranks by torchrun, e.g. torchrun --nproc-per-node 2 -m runtime.generate --distributed ..."


@dataclass(frozen=True)
class Launch:
    """This process's place among the ranks, and where they meet."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this machine
    address: str  # a name or an address of the machine that hosts the store
    port: int
    agent: bool  # whether torchrun hosts the store; otherwise rank 0 does
    attempt: str  # how often torchrun has started these ranks again

    @property
    def place(self) -> str:
        """Where the ranks meet, for messages."""
        return f"{self.address}:{self.port} (MASTER_ADDR, MASTER_PORT)"

    @staticmethod
    def read(environ: Mapping[str, str]) -> "Launch":
        """From RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; LOCAL_RANK is 0 where it is not set.

        Raises `DeviceError` if a variable is missing or makes no sense.
        """
        needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if not environ.get(name)]:
            raise DeviceError(
                f"ranks find each other by the variables {', '.join(needed)}, and {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set; {HOW}"
            )
        size = number(environ, "WORLD_SIZE", 1, 1 << 16)
        return Launch(
            rank=number(environ, "RANK", 0, size - 1),
            size=size,
            local_rank=number(environ, "LOCAL_RANK", 0, size - 1) if environ.get("LOCAL_RANK") else 0,
            address=environ["MASTER_ADDR"],
            port=number(environ, "MASTER_PORT", 1, (1 << 16) - 1),
            agent=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def open_store(self, deadline: Deadline) -> Any:  # a Store, which is not imported before it is needed
        """A connection of one's own to the store, which rank 0 hosts unless torchrun does.

        Raises `DeviceError` if nobody answers there until the deadline.
        """
        from torch.distributed import TCPStore

        hosts = self.rank == 0 and not self.agent
        try:
            if not hosts:
                self.await_host(deadline)
            left = timedelta(seconds=max(deadline.left, 1))
            return TCPStore(self.address, self.port, None, hosts, left, False, True)
        except (RuntimeError, OSError) as error:  # of PyTorch's and of sockets
            reason = " ".join(str(error).split())[:160]
            remedy = "take another port" if hosts else "is rank 0 up, and may this machine connect to it?"
            raise DeviceError(f"the ranks cannot meet at {self.place}: {reason}; {remedy}") from error

    def await_host(self, deadline: Deadline) -> None:
        """Return when somebody listens at the store's address. PyTorch's own attempts would print a stack
        each time. Raises `OSError`."""
        while True:
            try:
                left = max(min(deadline.left, 5), 0.1)
                socket.create_connection((self.address, self.port), left).close()
                return
            except OSError:
                if deadline.left < 0:
                    raise
                time.sleep(0.05)


def number(environ: Mapping[str, str], name: str, least: int, most: int) -> int:
    """The whole number in a variable. Raises `DeviceError` if it is none from `least` to `most`."""
    text = environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise DeviceError(f"{name}={text[:40]!r} is not a whole number from {least} to {most}; {HOW}")
    return int(text)
