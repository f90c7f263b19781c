"""Accounts of the experts that were needed or guessed: counters always, and a trace if one is recorded."""

from collections.abc import Callable, Sequence

from runtime.experts import trace
from runtime.experts.needs import Needs
from runtime.experts.tickets import Ticket
from runtime.stats import Stats


class Ledger:
    """The accounts of one cache."""

    def __init__(self) -> None:
        self.counters = Stats()
        self.forward = -1  # the number of the forward, over all sessions
        self.predicted: Sequence[int] = ()  # how the layer before ranked the next layer's experts
        self.recorder: trace.Recorder | None = None
        self.latest: dict[int, tuple[list[int], list[int]]] = {}  # hits and misses of a layer's last forward

    def add(self, event: trace.Event) -> None:
        if (recorder := self.recorder) is not None:  # another thread may set it to None
            recorder.add(event)

    def begin_forward(self) -> None:
        self.forward += 1
        self.predicted = ()

    def routing(self, needs: Needs) -> None:
        """A layer's router has chosen, and ranked the experts of the next layers."""
        needed = needs.experts
        if needs.tokens == 1 and self.predicted:
            self.counters.recalled += len(set(needed) & set(self.predicted[: len(needed)]))
            self.counters.recallable += len(needed)
        self.predicted = needs.ahead[0] if needs.ahead else ()
        self.latest[needs.layer] = [], []
        if self.recorder is None:
            return
        shares = tuple(round(share, 4) for share in needs.shares())
        self.add(trace.Routing(self.forward, needs.layer, needs.tokens, tuple(needed), shares))
        for distance, ranking in enumerate(needs.ahead, start=1):
            self.add(trace.Ranking(self.forward, needs.layer + distance, distance, tuple(ranking)))

    def hit(self, layer: int, expert: int) -> None:
        self.counters.hits += 1
        self.latest[layer][0].append(expert)
        self.add(trace.Hit(self.forward, layer, expert))

    def miss(self, layer: int, expert: int, evicted: int | None, source: str, guessed: bool) -> None:
        """`source` says where the expert was, "host" or "file"."""
        self.counters.misses += 1
        self.latest[layer][1].append(expert)
        self.counters.used_guesses += guessed
        self.add(trace.Miss(self.forward, layer, expert, evicted, source))
        if guessed:
            self.add(trace.UsedGuess(self.forward, layer, expert))

    def computed(
        self, layer: int, expert: int, evicted: int | None = None, placed: bool = False, guessed: bool = False
    ) -> None:
        """The host computes a missing expert. If it is placed, it also travels to a slot."""
        self.counters.misses += 1
        self.latest[layer][1].append(expert)
        self.counters.computed += 1
        self.counters.used_guesses += guessed
        self.add(trace.Miss(self.forward, layer, expert, evicted, "compute", placed))
        if guessed:
            self.add(trace.UsedGuess(self.forward, layer, expert))

    def guess(self, layer: int, expert: int, distance: int, rank: int) -> None:
        self.counters.guesses += 1
        self.add(trace.Guess(self.forward, layer, expert, distance, rank))

    def wasted(self, layer: int, expert: int, moved: int) -> None:
        """A guess did not come true, after `moved` bytes of it. The copy engine counts those bytes."""
        self.add(trace.WastedGuess(self.forward, layer, expert, moved))

    def stall(self, layer: int, expert: int, seconds: float) -> None:
        self.counters.stall_seconds += seconds
        if seconds:
            self.add(trace.Stall(self.forward, layer, expert, seconds))

    def dropped(self, layer: int, expert: int) -> None:
        """An expert has left host memory. From now on it is only in its file."""
        self.add(trace.Drop(self.forward, layer, expert))

    def copied(self) -> Callable[[Ticket], None] | None:
        """A function that records a complete copy to the device, or None without a recorder. The label of the
        copy's ticket is (forward, layer, expert, kind)."""
        return self.moved(trace.Copy)

    def read(self) -> Callable[[Ticket], None] | None:
        """The same for what was read from a file."""
        return self.moved(trace.Read)

    def written_back(self) -> Callable[[Ticket], None] | None:
        """The same for what went back to host memory."""
        return self.moved(lambda step, layer, e, kind, *rest: trace.WriteBack(step, layer, e, *rest))

    def moved(self, event: Callable[..., trace.Event]) -> Callable[[Ticket], None] | None:
        recorder = self.recorder
        if recorder is None:
            return None

        def moved(ticket: Ticket) -> None:  # called in a copy thread
            recorder.add(event(*ticket.label, ticket.source.numel(), ticket.seconds))

        return moved
