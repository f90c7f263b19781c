"""The judge alone: its peers are sockets that a test holds the other ends of."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from runtime.ranks.links import Links
from runtime.ranks.lost import Lost
from runtime.ranks.watch import GRACE, Watch

TIMEOUT = 0.5
NAMES = ("a", "b", "b", "c")


class World:
    """Rank 0's watch, and the other ends of its connections."""

    def __init__(self, timeout: float = TIMEOUT, size: int = 4, least: float | None = None) -> None:
        pairs = {rank: socket.socketpair() for rank in range(1, size)}
        for own, _ in pairs.values():
            own.setblocking(False)
        self.ends = {rank: end for rank, (_, end) in pairs.items()}
        self.mail: list[Any] = []
        links = Links({rank: own for rank, (own, _) in pairs.items()}, NAMES[:size], "", least or timeout)
        self.watch = Watch(0, links, timeout, lambda rank, message: self.mail.append((rank, message)))
        self.beating = True
        self.alive = set(self.ends)
        self.thread = threading.Thread(target=self.beat)
        self.thread.start()

    def beat(self) -> None:
        """For those ranks that are alive."""
        while self.beating:
            for rank in list(self.alive):
                self.say(rank, "")
            time.sleep(TIMEOUT / 10)

    def say(self, rank: int, message: Any) -> None:
        with suppress(OSError):  # it has ended
            self.ends[rank].sendall((json.dumps(message) if message else "").encode() + b"\n")

    def drop(self, rank: int) -> None:
        """The rank dies."""
        self.alive.discard(rank)
        self.ends[rank].close()

    def cause(self, seconds: float = 3.0) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                self.watch.check()
            except Lost as error:
                return str(error)
            time.sleep(0.002)
        return "none"

    def told(self, rank: int) -> list[Any]:
        """What rank 0 has told that rank so far."""
        data, deadline = b"", time.monotonic() + 0.2
        self.ends[rank].settimeout(0.2)
        with suppress(TimeoutError):
            while time.monotonic() < deadline and (got := self.ends[rank].recv(1 << 16)):
                data += got
        return [json.loads(line) for line in data.split(b"\n") if line]

    def close(self) -> None:
        self.beating = False
        self.thread.join()
        for end in self.ends.values():
            end.close()
        self.watch.close()
        assert not self.watch.thread.is_alive()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def test_beats_keep_ranks_alive_and_are_sent(world: World) -> None:
    time.sleep(3 * TIMEOUT)
    world.watch.check()
    world.ends[2].settimeout(1)
    assert 10 <= len(world.ends[2].recv(1000)) <= 25  # one byte, five times in a timeout


def test_ranks_that_fall_silent_together_are_named_together(world: World) -> None:
    """Half of the network is gone. Their last beats came at slightly different times."""
    since = time.monotonic()
    world.alive -= {2}
    time.sleep(TIMEOUT / 10)
    world.alive -= {3}
    line = "rank 2 (b) and rank 3 (c) have not answered for 0.5 s; stopped, or cut off from the network?"
    assert world.cause() == line
    assert time.monotonic() - since > TIMEOUT * 0.8
    assert {"cause": line} in world.told(1)


def test_a_connection_that_ends_is_a_loss_at_once_and_is_told(world: World) -> None:
    since = time.monotonic()
    world.drop(2)
    assert world.cause() == "rank 2 (b) has ended; the output there may say why"
    assert time.monotonic() - since < TIMEOUT / 2
    assert world.told(1)[-1] == world.told(3)[-1] == {"cause": world.cause()}


def test_the_first_cause_stays(world: World) -> None:
    """A rank that found the loss before ends, too, and that is no other loss."""
    world.say(1, {"cause": "rank 3: out of\nmemory"})
    world.drop(1)
    world.drop(3)
    assert world.cause() == "rank 3: out of memory"
    world.say(2, {"cause": "another"})
    time.sleep(TIMEOUT / 2)
    assert world.cause() == "rank 3: out of memory"


def test_words_before_an_end_count_before_it(world: World) -> None:
    """Rank 3's end may be seen before rank 1's word, if both are there."""
    with world.watch.lock:  # the watch's thread cannot finish its round
        world.watch.tell({"x": 1})
        time.sleep(0.05)
        world.drop(3)
        world.say(1, {"cause": "rank 3: its reason"})
        time.sleep(0.05)
    assert world.cause() == "rank 3: its reason"


def test_a_broken_connection_of_the_ring_waits_for_a_better_reason(world: World) -> None:
    world.watch.suspect(2)
    time.sleep(GRACE / 3)
    world.watch.check()
    world.say(2, {"cause": "rank 2: its own line"})
    assert world.cause() == "rank 2: its own line"


def test_a_broken_connection_of_the_ring_is_a_reason_in_the_end(world: World) -> None:
    world.watch.suspect(2)
    since = time.monotonic()
    assert world.cause() == "the connection to rank 2 (b) broke"
    assert GRACE * 0.9 < time.monotonic() - since < GRACE + 0.5


def test_a_rank_that_leaves_may_break_fall_silent_and_end(world: World) -> None:
    world.say(2, {"leaving": True})
    while not world.watch.left(2):
        time.sleep(0.01)
    world.watch.suspect(2)
    world.alive -= {2}
    time.sleep(TIMEOUT + 2 * GRACE)
    world.drop(2)
    assert world.cause(0.3) == "none" and (2, None) in world.mail
    world.drop(1)  # the others are watched as before
    assert world.cause() == "rank 1 (b) has ended; the output there may say why"


def test_callbacks_are_called_once_each(world: World) -> None:
    calls: list[str] = []
    world.watch.on_loss(lambda: calls.append("before"))
    world.drop(1)
    world.cause()
    time.sleep(0.05)
    world.watch.on_loss(lambda: calls.append("after"))
    world.drop(2)
    time.sleep(0.05)
    assert calls == ["before", "after"]


def test_a_process_that_was_stopped_forgives(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All seem silent then, and it is this rank itself that was."""
    selecting = world.watch.judge
    gone = threading.Event()

    def judge(now: float) -> None:
        if not gone.is_set():
            gone.set()
            time.sleep(3 * TIMEOUT)
        selecting(now)

    monkeypatch.setattr(world.watch, "judge", judge)
    world.alive.clear()  # nothing will be in the sockets when it goes on
    gone.wait()
    time.sleep(3 * TIMEOUT - 0.1)
    world.alive |= set(world.ends)
    assert world.cause(2 * TIMEOUT) == "none"


def test_beats_suit_the_least_patient_rank() -> None:
    world = World(timeout=60.0, least=0.5)
    try:
        time.sleep(0.55)
        world.ends[1].settimeout(1)
        assert 4 <= len(world.ends[1].recv(1000)) <= 40  # of 60 s, there would be one
    finally:
        world.close()


def test_a_peer_that_does_not_read_blocks_nobody(world: World) -> None:
    """A stopped rank's buffers fill up."""
    since = time.monotonic()
    for _ in range(100):
        world.watch.tell({"value": "x" * (1 << 16)})
    assert time.monotonic() - since < 1
    time.sleep(TIMEOUT)
    world.watch.check()
    world.alive -= {3}
    assert "rank 3 (c) has not answered" in world.cause()


def test_nonsense_on_a_connection_is_no_traceback(world: World) -> None:
    world.ends[1].sendall(b"\xff{]\n[1, 2]\n\n7\n")
    world.say(2, {"value": 1})
    time.sleep(0.1)
    world.watch.check()
    assert world.mail == [(2, {"value": 1})]


def test_closing_waits_for_no_silent_rank(world: World) -> None:
    world.alive.clear()
    time.sleep(TIMEOUT * 0.6)
    since = time.monotonic()
    world.watch.close()
    assert time.monotonic() - since < 0.5


def test_closing_tells_the_others() -> None:
    world = World()
    closing = threading.Thread(target=world.watch.close)
    closing.start()
    assert world.told(1) == world.told(3) == [{"leaving": True}]
    world.close()
    closing.join()
