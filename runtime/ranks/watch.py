"""Whether the other ranks are alive: a thread that beats, listens and judges, and never blocks.

Each rank sends each other one a byte some times per timeout. A rank is lost when its connection ends without
a goodbye, or when nothing has come from it for the timeout. Whoever finds that tells the others before it
ends, so all of them name the same cause. Clocks are compared with themselves only.
"""

import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from runtime.ranks.links import Links
from runtime.ranks.lost import Lost
from runtime.ranks.peer import BEAT, Peer, encoded

BEATS = 5  # in the shortest timeout
GRACE = 0.3  # seconds in which a better reason for a broken connection may come
PARTING = 1.0  # seconds for the last words
LONGEST = 2000  # characters of a cause
ENDED = "ended; the output there may say why"


class Watch:
    """Watches all other ranks until it is closed. Its methods can be called from any thread."""

    def __init__(
        self,
        rank: int,
        links: Links,
        timeout: float,
        deliver: Callable[[int, dict[str, Any] | None], None] = lambda rank, message: None,
    ) -> None:
        """`timeout`: seconds of silence that are a loss here. Others may have other ones.

        `deliver(rank, message)` is called in the watch's thread with each message that is not the watch's
        own, and with None when that rank closes in order.
        """
        self.rank, self.timeout, self.deliver = rank, timeout, deliver
        now = time.monotonic()
        self.peers = {r: Peer(r, f"rank {r} ({links.hosts[r]})", s, now) for r, s in links.sockets.items()}
        self.interval = links.timeout / BEATS
        self.name = f"rank {rank} ({links.hosts[rank]})"
        self.process = os.getpid()
        self.lock = threading.RLock()  # guards what follows
        self.cause: str | None = None
        self.callbacks: list[Callable[[], None]] = []
        self.words: deque[bytes] = deque()  # for all, from other threads
        self.suspected: dict[int, float] = {}  # ranks with a broken connection, and when they are judged
        self.ending = False
        self.bell, self.ear = socket.socketpair()
        self.bell.setblocking(False)
        self.ear.setblocking(False)
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
        self.thread.start()

    # What other threads call.

    def check(self) -> None:
        """Raises `Lost` if a rank has been lost or has failed."""
        if self.cause is not None:
            raise Lost(self.cause)

    def on_loss(self, callback: Callable[[], None]) -> None:
        """Call `callback` once when a rank is lost, in the watch's thread, or here and now if one is already.
        It must not wait."""
        with self.lock:
            if self.cause is None:
                self.callbacks.append(callback)
                return
        callback()

    def left(self, rank: int) -> bool:
        """Whether that rank has closed in order."""
        return rank in self.peers and self.peers[rank].leaving

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to all other ranks."""
        with self.lock:
            self.words.append(encoded(message))
        self.ring()

    def suspect(self, rank: int) -> None:
        """Report that a connection to that rank broke. It is lost, unless it turns out to close in order.
        Waits a moment for a better reason."""
        with self.lock:
            self.suspected.setdefault(rank, time.monotonic() + GRACE)
        self.ring()

    def fail(self, line: str) -> None:
        """Tell the others why this rank ends. Waits until they have been told, at most a second."""
        if self.process == os.getpid():
            self.lose(one_line(f"rank {self.rank}: {line}"))
            self.await_words()

    def end(self) -> None:
        """Tell the others that this process ends before it has closed. Waits as `fail` does."""
        if self.process == os.getpid():
            self.lose(f"{have(self.name)} {ENDED}")
            self.await_words()

    def leave(self) -> None:
        """Tell the others that connections of this rank may end from now on, which is no loss."""
        self.tell({"leaving": True})
        self.await_words()

    def close(self) -> None:
        """Say goodbye, and end the thread. Takes as long as the others need to answer, at most a second."""
        if self.process != os.getpid():
            return
        if not self.ending:
            self.leave()
            self.ending = True
            self.ring()
        self.thread.join()

    def await_words(self) -> None:
        deadline = time.monotonic() + PARTING
        while self.thread.is_alive() and time.monotonic() < deadline:
            with self.lock:
                if not self.words and not any(peer.out for peer in self.peers.values() if peer.open):
                    return
            time.sleep(0.002)

    def ring(self) -> None:
        """Wake the thread."""
        with suppress(OSError):  # it has been woken often enough, or has ended
            self.bell.send(b".")

    # What the thread does.

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.ear, selectors.EVENT_READ)
                for peer in self.peers.values():
                    selector.register(peer.connection, selectors.EVENT_READ, peer)
                self.watch(selector)
                self.part(selector)
        except BaseException as error:  # a mistake here must not look like a healthy silence
            self.lose(f"rank {self.rank}: its watch failed: {error!r}")
            raise
        finally:
            for peer in self.peers.values():
                peer.close()
            self.bell.close()
            self.ear.close()

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Until `close` is called."""
        beat = looked = time.monotonic()
        while not self.ending:
            now = time.monotonic()
            if now >= beat:
                beat = now + self.interval
                self.say(BEAT)
            self.say_words()
            self.listen(selector, min(beat, *self.suspected.values(), beat) - now)
            now = time.monotonic()
            if now - looked > self.timeout / 2:  # this process was stopped itself, and has heard nobody
                for peer in self.peers.values():
                    peer.heard = now
            looked = now
            self.judge(now)

    def say(self, line: bytes) -> None:
        """To all."""
        for peer in self.peers.values():
            peer.tell(line)

    def say_words(self) -> None:
        while self.words:
            with self.lock:  # so that a word is always in `words` or in `out` until it has been sent
                self.say(self.words[0])
                self.words.popleft()

    def listen(self, selector: selectors.BaseSelector, seconds: float) -> None:
        """Wait so long for what others say, and take it in. Ends count after all words."""
        for peer in self.peers.values():
            if peer.open:
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.out else 0)
                if selector.get_key(peer.connection).events != wanted:
                    selector.modify(peer.connection, wanted, peer)
        ended = []
        for key, events in selector.select(max(seconds, 0)):
            if (peer := key.data) is None:
                self.drain_ear()
                continue
            if events & selectors.EVENT_WRITE:
                peer.flush()
            if events & selectors.EVENT_READ:
                for message in peer.read(time.monotonic()):
                    self.take(peer, message)
                if not peer.open:
                    selector.unregister(peer.connection)
                    peer.close()
                    ended.append(peer)
        if lost := [peer for peer in ended if not peer.leaving]:
            self.lose(f"{have(*(peer.name for peer in lost))} {ENDED}")

    def drain_ear(self) -> None:
        try:
            while self.ear.recv(1 << 10):
                pass
        except BlockingIOError:
            pass

    def take(self, peer: Peer, message: dict[str, Any]) -> None:
        """Act on a message."""
        if "cause" in message:
            self.lose(one_line(str(message["cause"])))
        elif "leaving" in message:
            peer.leaving = True
            self.deliver(peer.rank, None)
        else:
            self.deliver(peer.rank, message)

    def judge(self, now: float) -> None:
        """Find a loss that nobody has told."""
        watched = [peer for peer in self.peers.values() if peer.open and not peer.leaving]
        if any(now - peer.heard > self.timeout for peer in watched):
            nearly = self.timeout - 1.5 * self.interval  # the same event, but beats come one after the other
            silent = [peer for peer in watched if now - peer.heard > nearly]
            names = have(*(peer.name for peer in silent))
            self.lose(f"{names} not answered for {self.timeout:g} s; stopped, or cut off from the network?")
        with self.lock:
            for rank, when in list(self.suspected.items()):
                if self.peers[rank].leaving or self.cause is not None:
                    del self.suspected[rank]
                elif now >= when:
                    self.lose(f"the connection to {self.peers[rank].name} broke")

    def lose(self, cause: str) -> None:
        """Make `cause` known to the others and here, unless there is one. In this order, since this process
        may end as soon as it knows, and the others would take that for the cause."""
        with self.lock:
            if self.cause is not None:
                return
            self.words.append(encoded({"cause": cause}))
            if threading.current_thread() is self.thread:
                self.say_words()
            self.cause = cause
            callbacks, self.callbacks = self.callbacks, []
        self.ring()
        for callback in callbacks:
            callback()

    def part(self, selector: selectors.BaseSelector) -> None:
        """Close the connections. If something were unread here, the system would break them, and the last
        words could be lost on the way. So read until the others close, too."""
        self.say_words()
        deadline = time.monotonic() + PARTING
        for peer in self.peers.values():
            if peer.open:
                peer.finish()
        while (now := time.monotonic()) < deadline and any(
            peer.open and now - peer.heard < self.timeout / 2 for peer in self.peers.values()
        ):
            self.listen(selector, 0.05)


def have(*names: str) -> str:
    """
    >>> have("rank 1", "rank 2")
    'rank 1 and rank 2 have'
    """
    return " and ".join(names) + (" has" if len(names) == 1 else " have")


def one_line(text: str) -> str:
    """
    >>> one_line("/x: no such\\nfolder")
    '/x: no such folder'
    """
    return " ".join(text.split())[:LONGEST]
