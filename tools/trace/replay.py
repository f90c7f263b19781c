"""What a cache would have done with the experts that a trace needed, under any policy and number of slots.

This simulation shares nothing with `runtime.experts`, so that it can check its accounts: with the recorded
policy and slots it has to give the recorded hits, misses and victims, one by one.

A layer's accesses in one forward follow these rules. Needed experts that are in slots are hits, and are
accessed first. The others are misses. An expert that was accessed in this forward is not evicted in it unless
there is no other; then the one that was accessed first leaves.
"""

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

POLICIES = ("lru", "lfu", "random", "static")
HALF_LIFE = 32  # accesses after which LFU halves its counts


@dataclass(frozen=True)
class Access:
    expert: int
    hit: bool
    evicted: int | None = None
    placed: bool = True  # False if the host computed it, and it got no slot

    def __str__(self) -> str:
        gone = "" if self.evicted is None else f", {self.evicted} goes"
        return f"{self.expert} {'hits' if self.hit else 'misses'}{gone}"


class Rule:
    """A policy as the documentation describes it."""

    def __init__(self, policy: str, seed: int, number: int) -> None:
        """`number` is the layer's, or for berths that of all layers."""
        self.policy = policy
        self.uses = 0
        self.last: dict[int, int] = {}  # of every expert that was ever used: the number of that use
        self.counts: dict[int, float] = {}
        self.generator = random.Random(f"{seed} {number}")

    def use(self, expert: int) -> None:
        self.uses += 1
        self.last[expert] = self.uses
        self.counts[expert] = self.counts.get(expert, 0.0) + 1
        if self.uses % HALF_LIFE == 0:
            self.counts = {e: count / 2 for e, count in self.counts.items()}

    def victim(self, candidates: Sequence[int]) -> int:  # in order of arrival
        if self.policy == "lru":
            return min(candidates, key=self.last.__getitem__)
        if self.policy == "lfu":
            return min(candidates, key=lambda e: (self.counts[e], self.last[e]))
        if self.policy == "random":
            return sorted(candidates)[self.generator.randrange(len(candidates))]
        assert self.policy == "static", self.policy
        return candidates[-1]


def replay(
    needs: Iterable[Sequence[int]],
    slots: int,
    policy: str,
    seed: int = 0,
    layer: int = 0,
    by_host: Iterable[Mapping[int, bool]] | None = None,
) -> list[list[Access]]:
    """The accesses of each forward to one layer, from the experts that each forward needs.

    `by_host` has the missing experts that the host computed in each forward, and whether each was given a
    slot. They come last.

    >>> for accesses in replay([(0, 1), (1, 2), (0, 2)], slots=2, policy="lru"):
    ...     print(*accesses, sep="; ")
    0 misses; 1 misses
    1 hits; 2 misses, 0 goes
    2 hits; 0 misses, 1 goes
    """
    resident: list[int] = []  # oldest arrival first
    rule = Rule(policy, seed, layer)
    steps = []
    for need, computed in zip(needs, itertools.repeat({}) if by_host is None else by_host, strict=False):
        step = [Access(e, hit=True) for e in need if e in resident]
        missing = sorted((e for e in need if e not in resident), key=computed.__contains__)
        protected = [access.expert for access in step]
        for expert in protected:
            rule.use(expert)
        for expert in missing:
            if not computed.get(expert, True):
                step.append(Access(expert, hit=False, placed=False))
                continue
            evicted = None
            if len(resident) == slots:
                candidates = [e for e in resident if e not in protected] or [protected.pop(0)]
                evicted = rule.victim(candidates)
                resident.remove(evicted)
            resident.append(expert)
            rule.use(expert)
            protected.append(expert)
            step.append(Access(expert, hit=False, evicted=evicted))
        steps.append(step)
    return steps


def optimum(needs: Sequence[Sequence[int]], slots: int) -> list[int]:
    """The hits of each forward if the experts stay whose next use is nearest (Belady, 1966). Over all
    forwards, no policy has more.

    Where a forward needs more experts than there are slots, any of the resident and the needed experts may
    stay, as if each miss passed through a slot of its own. That makes the bound a little looser.

    >>> optimum([(0, 1), (1, 2), (0, 2)], slots=2), optimum([(0,), (1,), (0,), (2,), (0,)], slots=2)
    ([0, 1, 1], [0, 0, 1, 0, 1])
    """
    # For each forward, last first: the next one after it that needs an expert.
    following: list[dict[int, int]] = [{}]
    for i in range(len(needs) - 1, 0, -1):
        following.append(following[-1] | dict.fromkeys(needs[i], i))
    resident: set[int] = set()
    hits = []
    for need, following_use in zip(needs, reversed(following), strict=False):
        next_use = {e: following_use.get(e, math.inf) for e in resident.union(need)}
        hits.append(len(resident.intersection(need)))
        crowded = len(need) > slots
        kept = sorted(next_use, key=lambda e: (not crowded and e not in need, next_use[e]))[:slots]
        resident = set(kept)
    return hits
