"""Which expert is in which berth of host memory: bookkeeping in plain Python, without a device.

A berth is a piece of host memory with room for one expert. With a berth for every expert, each stays in its
own for good. With fewer, the berths are a cache between the device's slots and the checkpoint's files, for
the experts of all layers. An expert in a berth is one of three things:

    single   no slot has it: the berth has the only copy in memory
    double   a slot of its layer has it, too
    held     it is copied to a spare slot as a guess, which may come true or not

An expert that comes in, from the file or from a slot that it leaves, gets an empty berth. If there is none,
it gets that of the oldest double, whose expert stays in its slot. But a few doubles are left alone, because
their copies to slots may still be under way. Then a single has to go, which the policy picks. It is read from
its file when it is needed again.

At a miss, the missing expert gets its berth first, and then the one that it evicts. For the policy, an expert
is used when it comes to a berth and when it leaves its slot. Once all slots are in use, berths for all
experts that have no slot and for those few doubles are enough: no single goes any more.

A guess never makes a single go, and takes a berth only if enough remain for experts that are needed. So it
always finds a berth. Nothing here depends on how long a copy takes.
"""

from collections.abc import Mapping

from runtime.experts.policy import Policy


class Berths:
    """Experts have numbers here: layer * experts of a layer + expert.

    Three berths, of which one double is left alone. Experts 7, 8 and 9 are in them:

    >>> from runtime.experts.policy import LRU
    >>> berths = Berths(3, LRU(), spare=1, everything=20)
    >>> berths.restore({0: 7, 1: 8, 2: 9})

    Slots get 7 and then 8. Expert 5 comes from the file and takes the berth of 7, the oldest of two doubles.
    Then 7 leaves its slot and has no berth. There are two doubles again, 8 and 5, so it gets that of 8:

    >>> berths.lift(7), berths.lift(8)
    (None, None)
    >>> berths.take(5), berths.lift(5)
    ((0, None), None)
    >>> berths.sink(7), berths.take(7)
    (False, (1, None))
    >>> print(berths)
    berth  expert  state
    0      5       double
    1      7       single
    2      9       single

    8 leaves its slot, too. The only double is left alone, so of the singles 9 is dropped, which was used
    before 7:

    >>> berths.sink(8), berths.take(8)
    (False, (2, 9))
    """

    def __init__(self, count: int, policy: Policy, spare: int, everything: int) -> None:
        """`spare` doubles are left alone. `everything` is the number of all experts."""
        self.count, self.policy, self.spare = count, policy, spare
        self.complete = count >= everything
        self.where: dict[int, int] = {}  # expert -> berth
        self.empty = list(range(count))  # the longest empty first
        self.singles: dict[int, None] = {}
        self.doubles: dict[int, None] = {}  # the oldest first
        self.held: set[int] = set()

    def restore(self, where: Mapping[int, int]) -> None:
        """Put experts into empty berths: an expert by the number of each berth."""
        for berth, expert in where.items():
            self.empty.remove(berth)
            self.assign(berth, expert)

    def find(self, expert: int) -> int | None:
        """The berth that holds or receives the expert, if any. Changes nothing."""
        return self.where.get(expert)

    def contents(self) -> tuple[int, ...]:
        """The experts in berths, in the order of these."""
        return tuple(sorted(self.where, key=self.where.__getitem__))

    def can_hold(self, expert: int) -> bool:
        """Whether the expert may be guessed. If it has no berth, `take` will find one that costs nothing."""
        if self.complete:
            return True
        if len(self.held) + 1 > self.count - self.spare:
            return False
        return expert in self.where or bool(self.empty) or len(self.doubles) > self.spare

    def take(self, expert: int) -> tuple[int, int | None]:
        """A berth for an expert that has none, and the expert that was dropped for it, if any. The newcomer
        is a single until `lift` or `hold`."""
        assert expert not in self.where, (expert, self.where)
        dropped = None
        if self.empty:
            berth = self.empty.pop(0)
        elif len(self.doubles) > self.spare or not self.singles:
            oldest = next(iter(self.doubles))
            del self.doubles[oldest]
            berth = self.leave(oldest)
        else:
            dropped = self.policy.victim(self.singles.keys())
            del self.singles[dropped]
            berth = self.leave(dropped)
        self.assign(berth, expert)
        return berth, dropped

    def lift(self, expert: int) -> None:
        """A slot of its layer has the expert as well, or will have it."""
        self.singles.pop(expert, None)
        self.held.discard(expert)
        self.doubles[expert] = None

    def hold(self, expert: int) -> None:
        """A guess copies the expert to a spare slot."""
        del self.singles[expert]
        self.held.add(expert)

    def let_go(self, expert: int) -> None:
        """The guess has not come true."""
        self.held.remove(expert)
        self.singles[expert] = None

    def touch(self, expert: int) -> None:
        """The host computes the expert, which remains what it is."""
        self.policy.used(expert)

    def sink(self, expert: int) -> bool:
        """The expert leaves its slot. Returns whether it has a berth. If not, `take` one for it."""
        if expert not in self.where:
            return False
        del self.doubles[expert]
        self.singles[expert] = None
        self.policy.used(expert)
        return True

    def vacate(self, expert: int) -> None:
        """Empty an expert's berth: its bytes did not arrive, or are not wanted any more."""
        for state in (self.singles, self.doubles):
            state.pop(expert, None)
        self.held.discard(expert)
        self.empty.append(self.leave(expert))

    def assign(self, berth: int, expert: int) -> None:
        self.where[expert] = berth
        self.singles[expert] = None
        self.policy.used(expert)

    def leave(self, expert: int) -> int:
        self.policy.evicted(expert)
        return self.where.pop(expert)

    def __str__(self) -> str:
        states = {"single": self.singles, "double": self.doubles, "held": self.held}
        rows = {self.where[e]: (str(e), state) for state, experts in states.items() for e in experts}
        rows |= {berth: ("-", "empty") for berth in self.empty}
        lines = [f"{berth:<5}  {expert:<6}  {state}" for berth, (expert, state) in sorted(rows.items())]
        return "\n".join(["berth  expert  state", *lines])
