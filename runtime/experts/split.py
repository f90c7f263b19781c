"""Which missed experts of a token the device computes, and which the host (`--misses compute` and `auto`).

Where host memory is faster than the link, an expert is computed sooner where it lies than it is copied. So
the host computes missed experts while the link carries others. Bits depend on who computes an expert. So
nothing here may depend on how long anything really took: all times are computed from two recorded rates.

    copy       seconds that one expert takes on the link
    compute    seconds that the host takes for one expert, while the link is busy
    left       of an expert under way: the seconds that the link still needs for it

**One layer** misses n experts. Those that were guessed are under way, and `left` is what is left of them. Of
the others it is `copy`. The k experts with the least left are *brought*: the device computes them, as it does
hits. The host computes the other n - k. The layer takes

    time(k) = max(left of hits and of brought experts, added up, (n - k) * compute)

and k is the least number with the least time(k) + demanded(k) / 2. Here demanded(k) is what brought experts
that were not guessed take on the link, whose time is worth something: guesses could use it, and about half of
them save the host an expert. With "compute", only guessed experts may be brought.

**Meanwhile** the link is free for `time - left of hits and brought experts`. It carries in the background,
in the order in which they were sent for:

1. *Guesses*, if they will be there in time or almost. A guess for the layer after the next has one more layer
   to travel, which takes `pace`, the mean time of recent layers. It is sent for if

       left of all that is under way + copy <= free + (distance - 1) * pace + compute / 2

   Later than that, it is better to compute it on the host.
2. *Placing*. An expert that the host computes also travels to a slot, if nothing else is under way. It takes
   the slot of the policy's victim, and the next token that needs it finds it there. A guess that came true
   too late is placed, too: the host computes it, and the rest of it travels on. Any other computed expert
   leaves slots and policy as they are.

By these rules a slow link (one expert while the host computes three or more) carries hardly any guesses, but
it keeps slots filled with experts of the text. A fast one carries one guess after the other.

For example, with a link half as fast as the host: of two missed experts one was guessed, and half of it is
left. It is there when the host has computed the other one.

>>> split = Split(copy=2.0, compute=1.0, demand=True)
>>> split.send(layer=1, expert=5)
>>> split.divide(layer=0, hits=[3], missed=[7])  # takes 1.0, in which the link carries half of expert 5
([], [7])
>>> split.pass_layer()
>>> split.divide(layer=1, hits=[], missed=[4, 5])
([5], [4])
"""

from collections.abc import Sequence

MEMORY = 16  # layers, about, over which `pace` is a mean


class Split:
    """Divides each layer's missed experts, and keeps account of what travels in the background."""

    def __init__(self, copy: float, compute: float, demand: bool) -> None:
        """`demand` says whether experts that nothing has sent for may be brought."""
        self.copy, self.compute, self.demand = copy, compute, demand
        self.clear()

    def clear(self) -> None:
        """Begin anew, with nothing under way."""
        self.left: dict[tuple[int, int], float] = {}  # by layer and expert, in the order of sending
        self.pace = self.compute
        self.free = 0.0  # seconds of this layer in which the link has no demanded expert to carry

    def divide(self, layer: int, hits: Sequence[int], missed: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which of a layer's missed experts are brought, and which the host computes, both ascending.

        Hits and brought experts are no longer in the background after that.
        """
        waits = sum(self.drop(layer, e) for e in hits)
        guessed = [e for e in missed if (layer, e) in self.left]
        nearest = sorted(missed, key=lambda e: (self.left.get((layer, e), self.copy), e not in guessed, e))
        most = len(missed) if self.demand else len(guessed)
        brought, spent, time = 0, waits, max(waits, len(missed) * self.compute)
        link, demanded, least = waits, 0.0, time
        for k, e in enumerate(nearest[:most], start=1):
            link += self.left.get((layer, e), self.copy)
            demanded += 0.0 if e in guessed else self.copy
            taken = max(link, (len(missed) - k) * self.compute)
            if taken + demanded / 2 < least:
                brought, spent, time, least = k, link, taken, taken + demanded / 2
        for e in nearest[:brought]:
            self.drop(layer, e)
        self.free = time - spent
        self.pace += (time - self.pace) / MEMORY
        return sorted(nearest[:brought]), sorted(nearest[brought:])

    def pass_layer(self) -> None:
        """The layer has been computed. The link has carried what it was free for."""
        for key, left in list(self.left.items()):
            carried = min(left, self.free)
            self.free -= carried
            self.left[key] = left - carried
            if carried < left:
                break
        self.free = 0.0

    def in_time(self, distance: int) -> bool:
        """Whether an expert that is sent for now will be there `distance` layers later, or almost."""
        room = self.free + (distance - 1) * self.pace + self.compute / 2
        return sum(self.left.values()) + self.copy <= room

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not any(self.left.values())

    def send(self, layer: int, expert: int) -> None:
        """An expert begins to travel in the background."""
        self.left[layer, expert] = self.copy

    def drop(self, layer: int, expert: int) -> float:
        """An expert no longer travels in the background. Returns what was left of it."""
        return self.left.pop((layer, expert), 0.0)
