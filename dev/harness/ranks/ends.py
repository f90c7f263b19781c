"""Judges how ranks ended: what each printed, its exit status, and the text."""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dev.harness.command import DONE, FAILED, INTERRUPTED, USAGE
from dev.harness.judge import fault_of
from dev.harness.outcome import Wrong
from dev.harness.ranks.acts import INTERRUPT, INTERRUPT_ONE, KILL, NOTHING, ORPHAN, STOP, TERMINATE, Befallen
from dev.harness.ranks.asked import Ordinary
from dev.harness.ranks.launching import Ranks
from dev.harness.ranks.moments import Scene

KILLED, TERMINATED = (128 + number for number in (signal.SIGKILL, signal.SIGTERM))
EARLY = "Python's traceback, before the program began"
OURS = "/runtime/", "/model/", "/tokenizer/"


@dataclass(frozen=True)
class Ended:
    """How the ranks ended that nothing was done to. `seconds` are those until the last of them had, and
    `lines` all that they printed beyond what they always print."""

    seconds: float
    lines: tuple[str, ...]
    whole: bool  # whether the text was finished


def wait_for_others(scene: Scene, befallen: Befallen, limit: float) -> float:
    """Wait until all ranks have ended but one that is stopped. Returns the seconds since now until the last
    one of the others had. Raises `Wrong` after `limit` seconds."""
    ranks, began = scene.ranks, time.time()
    others = [rank for rank in range(ranks.size) if befallen.act != STOP or rank != befallen.victim]
    others = [rank for rank in others if not never_began(ranks, rank)]
    if not ranks.wait(lambda: all(gone(ranks, rank) for rank in others), limit):
        late = [rank for rank in others if not gone(ranks, rank)]
        for rank in late:
            ranks.send(rank, signal.SIGABRT)  # has Python's fault handler print stacks
        time.sleep(0.5)
        raise Wrong(f"ranks {late} have not ended after {limit:.0f} s\n{scene.told()}")
    counted = [rank for rank in others if rank != befallen.victim and ranks.status(rank) is not None]
    return max(0.0, max((ranks.when("status", rank) for rank in counted), default=began) - began)


def go_on(scene: Scene, befallen: Befallen, limit: float) -> None:
    """Continue a rank that was stopped, and wait for its end. Raises `Wrong` after `limit` seconds."""
    assert befallen.victim is not None
    scene.ranks.send(befallen.victim, signal.SIGCONT)
    wait_for_others(scene, Befallen(NOTHING, None, False), limit)


def never_began(ranks: Ranks, rank: int) -> bool:
    """Whether torchrun has ended, or was told to, before it started the rank."""
    return ranks.pid(rank) is None and all(launcher.poll() is not None for launcher in ranks.launchers)


def gone(ranks: Ranks, rank: int) -> bool:
    return ranks.status(rank) is not None or never_began(ranks, rank)


def check(scene: Scene, befallen: Befallen, ordinary: Ordinary) -> tuple[str, ...]:
    """Judge every rank that has ended. Returns the lines that they printed about it. Raises `Wrong`."""
    text = scene.text()
    if not scene.asked.agrees(text):
        raise Wrong(f"a wrong text: {text[-300:]!r}")
    lines: list[str] = []
    for rank in range(scene.ranks.size):
        if rank and scene.ranks.out(rank):
            raise Wrong(f"rank {rank} writes a text: {scene.ranks.out(rank)[:200]!r}")
        if scene.ranks.status(rank) is not None:
            said = ordinary.others(scene.ranks.err(rank))
            if fault := fault_in(scene, rank, said, befallen):
                raise Wrong(f"rank {rank}: {fault}; {said[:5]}\n{scene.told()}")
            lines += [EARLY] if "Traceback" in scene.ranks.err(rank) else said
    return tuple(lines)


def fault_in(scene: Scene, rank: int, said: Sequence[str], befallen: Befallen) -> str:
    """What is wrong with the end of a rank; empty if nothing is."""
    ranks = scene.ranks
    status, err = ranks.status(rank), ranks.err(rank)
    if befallen.act == KILL and rank == befallen.victim and status == KILLED:
        return ""
    if "Traceback" in err:
        if status in (FAILED, INTERRUPTED) and not any(place in err for place in OURS):
            return ""  # Python itself had not started yet
        return "a traceback"
    by_torchrun = ranks.way.torchrun and befallen.act != NOTHING  # which sends SIGTERM to the others
    if status == DONE:  # also of a rank that was told so by rank 0, whose user ended it
        ended = befallen.act == TERMINATE or ranks.status(0) in (INTERRUPTED, DONE)
        well = scene.whole() or (rank > 0 and ended)
        return "" if not said and well else "it ends as if all were well"
    interrupted = befallen.act == INTERRUPT or (befallen.act == INTERRUPT_ONE and rank == befallen.victim)
    if status == INTERRUPTED and interrupted:
        return "" if list(said) in ([], ["interrupted"]) else "other words for an interrupt"
    if status == TERMINATED and (befallen.act in (TERMINATE, ORPHAN) or by_torchrun):
        return "" if len(said) < 2 else "more than one line"
    if status == 128 + signal.SIGINT and interrupted:
        return ""  # Python itself had not started yet
    if status != FAILED:
        return f"status {status}"
    return fault_of_line(said)


def fault_of_line(said: Sequence[str]) -> str:
    """What is wrong with all that a rank says of its end; empty if it is one clear line."""
    if len(said) != 1:
        return f"{len(said)} lines"
    if not said[0].startswith("error: "):
        return "a line that is no error"
    return fault_of(said[0])


def check_refused(ranks: Ranks, ordinary: Ordinary, there: Sequence[int], told: str) -> tuple[str, ...]:
    """Judge ranks that disagree: all of `there` refuse, and each says why. Returns what they say. Raises
    `Wrong`."""
    lines = []
    for rank in there:
        status, said = ranks.status(rank), ordinary.others(ranks.err(rank))
        by_torchrun = status == TERMINATED and ranks.way.torchrun and not said
        if ranks.out(rank):
            raise Wrong(f"rank {rank} writes a text: {ranks.out(rank)[:200]!r}")
        if by_torchrun:
            continue
        fault = "a traceback" if "Traceback" in ranks.err(rank) else fault_of_line(said)
        if status not in (FAILED, USAGE):
            fault = f"status {status}"
        if fault:
            raise Wrong(f"rank {rank}: {fault}; {said[:5]}\n{told}")
        lines += said
    if not lines:
        raise Wrong(f"no rank says why it ends\n{told}")
    return tuple(lines)
