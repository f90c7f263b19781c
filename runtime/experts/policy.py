"""Eviction policies: which expert leaves when another needs its slot. Each layer has a policy object. If host
memory does not have all experts either, it has one more, for the experts of all layers.

A policy sees only the numbers of experts, so it can be tested, replayed and replaced without a device. All
policies are deterministic: the same accesses give the same victims on every machine.
"""

import random
from collections.abc import Callable, Collection
from typing import Protocol

from model.errors import quoted
from runtime.errors import OptionError


class Policy(Protocol):
    """Picks victims among one layer's experts that are in slots, or among all layers' that are only in berths
    of host memory. There, layers are counted on: the number of layers stands for the layer, and an expert's
    number is layer * experts of a layer + expert.

    To add a policy, write such a class. `EngineOptions(policy=...)` takes a function that makes an object of
    it from a seed and a layer's number. A line in `POLICIES` gives that function a name for the command line.
    After a forward that was broken off, slots are empty again, and a copy of the new policy
    (`copy.deepcopy`) takes its place.

    >>> class MostRecent:
    ...     "Evicts the expert that was used last: best for a cycle of more experts than slots."
    ...     def __init__(self):
    ...         self.order = []
    ...     def used(self, expert):
    ...         self.order = [e for e in self.order if e != expert] + [expert]
    ...     def victim(self, candidates):
    ...         return next(e for e in reversed(self.order) if e in candidates)
    ...     def evicted(self, expert):
    ...         self.order.remove(expert)
    >>> policy = make_policy(lambda seed, layer: MostRecent(), seed=0, layer=0)
    >>> for expert in (3, 1, 4):
    ...     policy.used(expert)
    >>> policy.victim({3, 1})
    1
    """

    def used(self, expert: int) -> None:
        """A forward needs the expert. It is in a slot: it was there before, or has just been given one.
        Of berths: it has just been given one, or it has left its slot."""
        ...

    def victim(self, candidates: Collection[int]) -> int:
        """Which of these experts leaves. There is at least one. All are in slots and have been used."""
        ...

    def evicted(self, expert: int) -> None:
        """The expert has left its slot: it was the victim."""
        ...


class LRU:
    """Evicts the expert that was used least recently.

    >>> policy = LRU()
    >>> for expert in (3, 1, 4, 3):
    ...     policy.used(expert)
    >>> policy.victim({1, 3, 4})
    1
    """

    def __init__(self) -> None:
        self.order: dict[int, None] = {}  # least recent first

    def used(self, expert: int) -> None:
        self.order.pop(expert, None)
        self.order[expert] = None

    def victim(self, candidates: Collection[int]) -> int:
        return next(expert for expert in self.order if expert in candidates)

    def evicted(self, expert: int) -> None:
        del self.order[expert]


class LFU:
    """Evicts the expert that was used least often. Of experts used equally often, the least recent leaves.

    Counts are kept after eviction. Otherwise an expert that returns would start at 1 and be the next victim.
    They are halved at every `half_life`-th
    access of the layer. Without decay, the experts of an earlier text would hold their slots through all of
    the next text. Of 4, 8, 16, ... 512 accesses, 16 and 32 had the most hits on the demo model. 32 accesses
    are 16 tokens of 2 experts.

    >>> policy = LFU(half_life=4)
    >>> for expert in (3, 3, 1):
    ...     policy.used(expert)
    >>> policy.victim({1, 3})
    1
    >>> policy.used(1), policy.counts  # the fourth access
    (None, {3: 1.0, 1: 1.0})
    >>> policy.victim({1, 3})
    3
    """

    def __init__(self, half_life: int = 32) -> None:  # accesses
        self.half_life = half_life
        self.accesses = 0
        self.counts: dict[int, float] = {}  # least recent first

    def used(self, expert: int) -> None:
        self.counts[expert] = self.counts.pop(expert, 0.0) + 1
        self.accesses += 1
        if self.accesses % self.half_life == 0:
            self.counts = {e: count / 2 for e, count in self.counts.items()}

    def victim(self, candidates: Collection[int]) -> int:
        return min((e for e in self.counts if e in candidates), key=self.counts.__getitem__)

    def evicted(self, expert: int) -> None:
        pass


class Random:
    """Evicts any expert with equal probability. It is the baseline that other policies have to beat.

    The generator is Python's `random.Random("SEED LAYER")`. Each victim takes one `randrange`, an index into
    the candidates in ascending order. That is all one needs to know to replay a trace.

    >>> policy = Random(seed=1, layer=0)
    >>> [policy.victim({2, 5, 6}) for _ in range(6)]
    [2, 5, 2, 2, 5, 6]
    """

    def __init__(self, seed: int, layer: int) -> None:
        self.generator = random.Random(f"{seed} {layer}")

    def used(self, expert: int) -> None:
        pass

    def victim(self, candidates: Collection[int]) -> int:
        return sorted(candidates)[self.generator.randrange(len(candidates))]

    def evicted(self, expert: int) -> None:
        pass


class Static:
    """Keeps the experts that came first: the newest arrival leaves. The gain of another policy over this one
    shows what it is worth to follow the text.

    >>> policy = Static()
    >>> for expert in (3, 1, 4, 3):
    ...     policy.used(expert)
    >>> policy.victim({1, 3, 4})
    4
    """

    def __init__(self) -> None:
        self.arrived: dict[int, None] = {}  # oldest first

    def used(self, expert: int) -> None:
        self.arrived.setdefault(expert)

    def victim(self, candidates: Collection[int]) -> int:
        return next(expert for expert in reversed(self.arrived) if expert in candidates)

    def evicted(self, expert: int) -> None:
        del self.arrived[expert]


PolicyMaker = Callable[[int, int], Policy]  # from a seed and a layer's number

POLICIES: dict[str, PolicyMaker] = {
    "lru": lambda seed, layer: LRU(),
    "lfu": lambda seed, layer: LFU(),
    "random": Random,
    "static": lambda seed, layer: Static(),
}


def make_policy(policy: str | PolicyMaker, seed: int, layer: int) -> Policy:
    """A policy for one layer.

    Raises `OptionError` if `POLICIES` has no such name, or if a function of the caller's does not take a seed
    and a layer.

    >>> make_policy("fifo", seed=0, layer=0)
    Traceback (most recent call last):
    ...
    runtime.errors.OptionError: policy is 'fifo', and must be one of lru, lfu, random, static
    """
    if callable(policy):
        try:
            return policy(seed, layer)
        except TypeError as error:
            raise OptionError(f"policy is {quoted(policy)}, and takes no seed and layer ({error})") from error
    if policy not in POLICIES:
        raise OptionError(f"policy is {quoted(policy)}, and must be one of {', '.join(POLICIES)}")
    return POLICIES[policy](seed, layer)


def policy_name(policy: str | PolicyMaker) -> str:
    """The name of a policy in traces.

    >>> policy_name("lru"), policy_name(Random)
    ('lru', 'Random')
    """
    return policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)
