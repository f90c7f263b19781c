"""What became of the experts that were needed or guessed: counted always, and told to a trace if there is
one."""

from collections.abc import Callable, Sequence

from runtime.experts import trace
from runtime.experts.copying import Ticket
from runtime.stats import Stats


class Ledger:
    """The entries of one cache."""

    def __init__(self) -> None:
        self.counters = Stats()
        self.forward = -1
        self.predicted: Sequence[int] = ()  # what the layer before ranked highest for the layer at hand
        self.recorder: trace.Recorder | None = None

    def add(self, event: trace.Event) -> None:
        if (recorder := self.recorder) is not None:  # another thread may set it to None
            recorder.add(event)

    def begin_forward(self) -> None:
        self.forward += 1
        self.predicted = ()

    def choice(
        self,
        layer: int,
        tokens: int,
        needed: list[int],
        shares: Callable[[], Sequence[float]],
        ahead: list[list[int]],
    ) -> None:
        """So many tokens on the whole need these experts; and the rankings for the next layers. `shares`,
        which are the experts' weights added up over tokens, are asked for only if somebody records."""
        if tokens == 1 and self.predicted:
            self.counters.recalled += len(set(needed) & set(self.predicted[: len(needed)]))
            self.counters.recallable += len(needed)
        self.predicted = ahead[0] if ahead else ()
        if self.recorder is None:
            return
        shown = tuple(round(share, 4) for share in shares())
        self.add(trace.Routing(self.forward, layer, tokens, tuple(needed), shown))
        for distance, ranking in enumerate(ahead, start=1):
            self.add(trace.Ranking(self.forward, layer + distance, distance, tuple(ranking)))

    def hit(self, layer: int, expert: int) -> None:
        self.counters.hits += 1
        self.add(trace.Hit(self.forward, layer, expert))

    def miss(self, layer: int, expert: int, evicted: int | None, guessed: bool) -> None:
        self.counters.misses += 1
        self.counters.used_guesses += guessed
        self.add(trace.Miss(self.forward, layer, expert, evicted))
        if guessed:
            self.add(trace.UsedGuess(self.forward, layer, expert))

    def guess(self, layer: int, expert: int, distance: int, rank: int) -> None:
        self.counters.guesses += 1
        self.add(trace.Guess(self.forward, layer, expert, distance, rank))

    def wasted(self, layer: int, expert: int, moved: int) -> None:
        """A guess did not come true, of which so many bytes had been moved. The copy engine counts these."""
        self.add(trace.WastedGuess(self.forward, layer, expert, moved))

    def stall(self, layer: int, expert: int, seconds: float) -> None:
        self.counters.stall_seconds += seconds
        if seconds:
            self.add(trace.Stall(self.forward, layer, expert, seconds))

    def copied(self) -> Callable[[Ticket], None] | None:
        """What to tell of complete copies, whose labels are (step, layer, expert, kind); None without a
        recorder."""
        recorder = self.recorder
        if recorder is None:
            return None

        def copied(ticket: Ticket) -> None:  # in the copy thread
            step, layer, expert, kind = ticket.label
            recorder.add(trace.Copy(step, layer, expert, kind, ticket.source.numel(), ticket.seconds))

        return copied
