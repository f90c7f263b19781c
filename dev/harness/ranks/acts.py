"""What befalls ranks: one is killed, stopped or loses its network, or somebody presses Ctrl-C."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from dev.harness.ranks.launching import Ranks

KILL, STOP, CUT, INTERRUPT, INTERRUPT_ONE, TERMINATE, ORPHAN, NOTHING = (
    "kill -9", "SIGSTOP", "network cut", "Ctrl-C", "Ctrl-C of one", "SIGTERM", "torchrun killed", "nothing",
)  # fmt: skip


@dataclass(frozen=True)
class Befallen:
    """What was done. `victim` is the rank that it was done to, if it was done to one; `landed` says whether
    there was anything left to do it to."""

    act: str
    victim: int | None
    landed: bool

    def __str__(self) -> str:
        return self.act if self.victim is None else f"{self.act} of rank {self.victim}"


def draw(ranks: Ranks, chance: Random) -> str:
    """Something to do to these ranks, or to one of them."""
    kinds = [(KILL, 6), (STOP, 6), (INTERRUPT, 3), (INTERRUPT_ONE, 2), (TERMINATE, 2), (NOTHING, 1)]
    if ranks.machines:
        kinds.append((CUT, 8))
    if ranks.way.torchrun:
        kinds.append((ORPHAN, 1))
    return chance.choices([name for name, _ in kinds], [weight for _, weight in kinds])[0]


def kill(ranks: Ranks, chance: Random) -> Befallen:
    victim = chance.randrange(ranks.size)
    return Befallen(KILL, victim, ranks.send(victim, signal.SIGKILL))


def stop(ranks: Ranks, chance: Random) -> Befallen:
    victim = chance.randrange(ranks.size)
    return Befallen(STOP, victim, ranks.send(victim, signal.SIGSTOP))


def cut(ranks: Ranks, chance: Random) -> Befallen:
    assert ranks.machines
    victim = chance.randrange(ranks.size)
    ranks.machines.cut(victim, outside=chance.random() < 0.5)
    return Befallen(CUT, victim, ranks.status(victim) is None)


def interrupt(ranks: Ranks, chance: Random) -> Befallen:
    return to_all(ranks, INTERRUPT, signal.SIGINT)


def interrupt_one(ranks: Ranks, chance: Random) -> Befallen:
    """As a user does in one of several terminals."""
    victim = chance.randrange(ranks.size)
    return Befallen(INTERRUPT_ONE, victim, ranks.send(victim, signal.SIGINT))


def terminate(ranks: Ranks, chance: Random) -> Befallen:
    if chance.random() < 0.5:
        return to_all(ranks, TERMINATE, signal.SIGTERM)
    victim = chance.randrange(ranks.size)
    return Befallen(TERMINATE, victim, ranks.send(victim, signal.SIGTERM))


def to_all(ranks: Ranks, name: str, number: signal.Signals) -> Befallen:
    """Signal torchrun, which passes it on, or all ranks where there is none."""
    if ranks.way.torchrun:
        landed = [ranks.send_to_launchers(number)]
    else:
        landed = [ranks.send(rank, number) for rank in range(ranks.size)]
    return Befallen(name, None, any(landed))


def orphan(ranks: Ranks, chance: Random) -> Befallen:
    return Befallen(ORPHAN, None, ranks.send_to_launchers(signal.SIGKILL))


def nothing(ranks: Ranks, chance: Random) -> Befallen:
    return Befallen(NOTHING, None, False)


DO: dict[str, Callable[[Ranks, Random], Befallen]] = {
    KILL: kill, STOP: stop, CUT: cut, INTERRUPT: interrupt, INTERRUPT_ONE: interrupt_one,
    TERMINATE: terminate, ORPHAN: orphan, NOTHING: nothing,
}  # fmt: skip


def do(name: str, ranks: Ranks, chance: Random) -> Befallen:
    return DO[name](ranks, chance)
