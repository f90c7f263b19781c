"""Where each missing expert of a trace came from, worked out again, where some experts have no berth in host
memory.

This simulation shares nothing with `runtime.experts.berths`, so that it can check its accounts. From the
misses, victims and guesses of a trace it follows which experts are in host memory, by these rules. The
recorded sources of misses, and the experts that were dropped, have to be the same.

- A miss or a guess that is not in host memory comes there, and so does a victim that leaves its slot.
- It takes an empty berth. If there is none, it takes that of the expert that has been a double for longest
  (a slot has it, too). But it leaves the last `spare_berths` doubles alone if there are singles. Then the
  policy picks one of these, which is dropped.
- For the policy, an expert is used when it comes to host memory, when it leaves its slot, and when the host
  computes it without giving it a slot.
- A guessed expert is neither single nor double until the guess is used or wasted. If it came for a guess that
  was wasted, it leaves.
"""

from runtime.experts.trace import Drop, Event, Guess, Header, Miss, WastedGuess
from tools.trace.read import Trace
from tools.trace.replay import POLICIES, Rule


class Contradiction(Exception):
    """The trace does what no host memory of this kind could do."""


def berths_agree(trace: Trace) -> bool | None:
    """Whether every recorded source and drop is what the simulation gives. None if host memory has all
    experts, or if the policy cannot be simulated."""
    header = trace.header
    if not header.berths or header.policy not in POLICIES:
        return None
    host, drops = HostMemory(header), []
    try:
        for event in trace.events:
            if isinstance(event, Drop):
                drops.append(event.layer * header.experts + event.expert)
            elif not host.follow(event):
                return False
    except Contradiction:
        return False
    return host.dropped == drops


class HostMemory:
    """Which experts are in berths. An expert is layer * experts + expert here."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.rule = Rule(header.policy, header.seed, header.layers)
        self.there: dict[int, str] = {}  # single, double or held, in the order in which they came
        self.doubles: dict[int, None] = {}  # the oldest first
        self.read_ahead: set[int] = set()  # those that came for a guess
        self.dropped: list[int] = []
        for expert in header.in_berths:
            self.come(expert)

    def follow(self, event: Event) -> bool:
        """Do what the event says. Returns False if a miss has another source."""
        E = self.header.experts
        if isinstance(event, Guess):
            expert = event.layer * E + event.expert
            if expert not in self.there:
                self.come(expert)
                self.read_ahead.add(expert)
            self.turn(expert, "single", "held")
        elif isinstance(event, WastedGuess):
            expert = event.layer * E + event.expert
            self.turn(expert, "held", "single")
            if expert in self.read_ahead:
                self.read_ahead.remove(expert)
                del self.there[expert]
        elif isinstance(event, Miss):
            expert = event.layer * E + event.expert
            if event.source not in ("compute", "host" if expert in self.there else "file"):
                return False
            if expert not in self.there:
                self.come(expert)
            if event.placed:
                self.read_ahead.discard(expert)
                self.turn(expert, self.there[expert], "double")
            else:
                self.rule.use(expert)
            if event.evicted is not None:
                self.leave_slot(event.layer * E + event.evicted)
        return True

    def leave_slot(self, expert: int) -> None:
        if expert in self.there:
            self.turn(expert, "double", "single")
            self.rule.use(expert)
        else:
            self.come(expert)

    def come(self, expert: int) -> None:
        """An expert gets a berth."""
        if len(self.there) == self.header.berths:
            singles = [e for e, state in self.there.items() if state == "single"]
            if len(self.doubles) > self.header.spare_berths or not singles:
                if not self.doubles:
                    raise Contradiction
                oldest = next(iter(self.doubles))
                del self.doubles[oldest], self.there[oldest]
            else:
                self.dropped.append(self.rule.victim(singles))
                del self.there[self.dropped[-1]]
        self.there[expert] = "single"
        self.rule.use(expert)

    def turn(self, expert: int, before: str, after: str) -> None:
        if self.there.get(expert) != before or before == after:
            raise Contradiction
        self.there[expert] = after
        self.doubles.pop(expert, None)
        if after == "double":
            self.doubles[expert] = None
