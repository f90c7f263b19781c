"""The ranks of one engine: who they are, what they tell each other, and whether all are there.

meeting = Meeting.join(timeout=10)
layers = meeting.share("layers", 16)  # [16, 8, 8] on each of three ranks
meeting.close()
"""

import json
import os
import queue
import socket
import time
from contextlib import suppress
from typing import Any

from runtime.errors import DeviceError, MixtralError
from runtime.ranks.address import LOOPBACK, interface_address, local_address, remote_address
from runtime.ranks.beside import beside
from runtime.ranks.deadline import Deadline
from runtime.ranks.launch import Launch
from runtime.ranks.links import Links, Place, connect
from runtime.ranks.lost import Lost
from runtime.ranks.watch import Watch

POLL = 0.1  # seconds between two attempts
PARTING = 1.0  # seconds that rank 0 may take to close its store
PATIENCE = 120.0  # seconds between the first rank's coming and the last one's


class Meeting:
    """One rank's view of all of them. Use it in one thread; close it in the end."""

    rank: int
    size: int
    local_rank: (
        int  # among the ranks of this machine; what torchrun says, which a launcher by hand may not know
    )
    host: str  # names the machine; ranks have the same `host` if and only if they are on the same machine
    hosts: tuple[str, ...]  # of all ranks, in their order
    address: str  # numeric, of this machine, that the other ranks can reach
    store: Any  # a torch.distributed.Store, for this meeting alone
    watch: Watch

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout: float,
        local_rank: int = 0,
        place: Place | None = None,
        patience: float = PATIENCE,
    ) -> None:
        """Meet `size` ranks, which all call this with the same `store`, a `torch.distributed.Store` that has
        not been used. Waits for the last one up to `patience` seconds.

        `timeout`: seconds of silence after which a rank is lost. `place` is on the loopback interface if it
        is not given. Raises `DeviceError` if a rank does not come, or cannot be reached.
        """
        place = place or Place(socket.gethostname(), LOOPBACK, LOOPBACK)
        deadline = Deadline(patience)

        def overdue() -> None:
            if deadline.left < -5:  # the store does not answer at all
                raise DeviceError(
                    f"the ranks' store has not answered for {patience:g} s; is rank 0's machine up?"
                )

        links: Links = beside(
            lambda: connect(store, rank, size, place, timeout, deadline), overdue, deadline.end
        )
        self.rank, self.size, self.local_rank, self.store = rank, size, local_rank, store
        self.host, self.hosts, self.address = links.hosts[rank], links.hosts, links.address
        self.mail: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self.told: dict[tuple[int, int], tuple[str, Any]] = {}  # by number of the share and rank
        self.closed: set[int] = set()  # ranks whose goodbye has been taken from the mail
        self.shares = 0
        self.hosted = self.store_closed = False  # whether rank 0 hosts the store, and whether it did
        self.watch = Watch(rank, links, timeout, lambda r, told: self.mail.put((r, told)))
        self.watch.on_loss(lambda: self.mail.put(None))

    @classmethod
    def join(cls, timeout: float, patience: float = PATIENCE) -> "Meeting":
        """Meet the ranks that torchrun has started with this one. `timeout`, `patience`: as above.

        A process may join again, at the same time or later, if all do. Raises `DeviceError` if torchrun's
        variables are missing, if a rank does not come, or cannot be reached.
        """
        launch, deadline = Launch.read(os.environ), Deadline(patience)
        while True:
            try:
                return cls.enter(launch, timeout, deadline)
            except RuntimeError as error:  # PyTorch's: the store was one that rank 0 was about to close
                if deadline.left < 0:
                    reason = " ".join(str(error).split())[:160]
                    raise DeviceError(f"the ranks' store at {launch.place} ended: {reason}") from error
                time.sleep(POLL)

    @classmethod
    def enter(cls, launch: Launch, timeout: float, deadline: Deadline) -> "Meeting":
        """One attempt of `join`."""

        def overdue() -> None:
            if deadline.left < -10:
                raise DeviceError(
                    f"the ranks' store at {launch.place} does not answer; is rank 0's machine up, "
                    "and may this one connect to it?"
                )

        def open_store() -> Any:
            from torch.distributed import PrefixStore

            store = launch.open_store(deadline)
            coming = store.add(f"mixtral/{launch.attempt}/{launch.rank}", 1)
            return PrefixStore(f"mixtral/{launch.attempt}/{coming}", store)

        store = beside(open_store, overdue, deadline.end)
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        try:
            own = interface_address(interface) if interface else local_address(launch.address, launch.port)
            seen = remote_address(launch.address, launch.port)
        except OSError as error:
            raise DeviceError(f"MASTER_ADDR={launch.address}: {error.strerror or error}") from error
        place = Place(socket.gethostname(), own, seen)
        left = max(deadline.left, 1)
        meeting = cls(store, launch.rank, launch.size, timeout, launch.local_rank, place, left)
        meeting.hosted = not launch.agent
        return meeting

    def share(self, topic: str, value: Any) -> list[Any]:
        """Every rank's `value`, in the order of ranks. All must call this with the same topic.

        Values are what JSON can hold, and come back as JSON gives them: tuples as lists. Waits as long as the
        others are alive. Raises `Lost` if one is lost, has failed, or has closed.
        """
        self.shares += 1
        number = self.shares
        self.watch.tell({"share": number, "topic": topic, "value": value})
        self.told[number, self.rank] = topic, json.loads(json.dumps(value))
        while missing := [rank for rank in range(self.size) if (number, rank) not in self.told]:
            self.watch.check()
            if closed := [rank for rank in missing if rank in self.closed]:
                raise Lost(f"{self.name(closed[0])} has closed before it told its {topic}")
            self.take()
        told = [self.told.pop((number, rank)) for rank in range(self.size)]
        if len({theirs for theirs, _ in told}) > 1:
            raise RuntimeError(f"ranks share different things: {', '.join(theirs for theirs, _ in told)}")
        return [value for _, value in told]

    def take(self, seconds: float | None = None) -> None:
        """Wait for something that the watch has found, at most so long (else `queue.Empty`), and note it."""
        if (item := self.mail.get(timeout=seconds)) is None:  # a loss
            return
        rank, message = item
        if message is None:
            self.closed.add(rank)
        elif "store" in message:
            self.store_closed = True
        elif "share" in message:
            self.told[message["share"], rank] = str(message["topic"]), message["value"]

    def name(self, rank: int) -> str:
        """How messages call a rank."""
        return f"rank {rank} ({self.hosts[rank]})"

    def fail(self, reason: str | BaseException) -> None:
        """Tell the other ranks why this one ends. They raise `Lost(f"rank {self.rank}: {reason}")`. They know
        of a loss already."""
        if not isinstance(reason, Lost):
            self.watch.fail(words(reason) if isinstance(reason, BaseException) else reason)

    def close(self) -> None:
        """Leave. The others lose nothing by that until they need this rank. Takes at most some seconds, if
        one of them hangs, and milliseconds else. Does nothing in a fork."""
        self.store = None
        if self.hosted and not self.watch.ending and self.watch.process == os.getpid():
            self.await_store()
        self.watch.close()

    def await_store(self) -> None:
        """Wait, but not for long, until rank 0 hosts the store no more. A rank that joined again before that
        would find the old one."""
        if self.rank == 0:
            self.watch.tell({"store": None})
            return
        with suppress(queue.Empty):
            while self.watch.cause is None and not self.store_closed:
                self.take(PARTING)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def words(error: BaseException) -> str:
    """What ends a rank, as others are told.

    >>> words(KeyboardInterrupt()), words(DeviceError("it is too long")), words(OSError("x"))
    ('interrupted', 'it is too long', 'OSError: x')
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, MixtralError) else f"{type(error).__name__}: {error}"
