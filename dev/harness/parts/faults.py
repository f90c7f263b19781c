"""The n-th call to the disk, for a tensor or for a thread fails, or an interrupt comes there; or the process
has little address space. After any failure, the next attempt has to give the known result."""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from random import Random

from dev.harness.faults import (
    DISK_ERRORS,
    Fault,
    disk,
    interrupted,
    memory,
    no_memory,
    no_thread,
    python_memory,
    thread_starts,
)
from dev.harness.isolate import isolated
from dev.harness.outcome import Verdict
from dev.harness.part import Case
from dev.harness.scenarios import Scenario, scenarios
from dev.harness.subject import Subject

ROOM = 48 << 20  # bytes of address space at most beyond what is taken: with more, everything fits


@contextmanager
def open_io(subject: Subject) -> Iterator[Case]:
    def faulty(fault: Fault) -> AbstractContextManager[None]:
        return disk(fault, subject.folder)

    tried = count_calls(subject, "io", faulty)

    def case(chance: Random) -> Verdict:
        scenario, calls = chance.choice(tried)
        make = chance.choice((*DISK_ERRORS, interrupted))
        lasting = chance.random() < 0.3 and make is not interrupted
        fault = Fault(chance.randint(1, calls), make, lasting)
        with faulty(fault):
            return scenario(fault)

    yield case


@contextmanager
def open_allocation(subject: Subject) -> Iterator[Case]:
    tried = count_calls(subject, "allocation", memory)

    def case(chance: Random) -> Verdict:
        scenario, calls = chance.choice(tried)
        if chance.random() < 0.3:
            room = chance.randrange(ROOM)
            return isolated(lambda: limited(scenario, room))
        fault = Fault(chance.randint(1, calls), chance.choice((no_memory, python_memory)))
        with memory(fault):
            return scenario(fault)

    yield case


@contextmanager
def open_threads(subject: Subject) -> Iterator[Case]:
    tried = [(scenario, calls) for scenario, calls in count_calls(subject, "threads", thread_starts) if calls]

    def case(chance: Random) -> Verdict:
        scenario, calls = chance.choice(tried)
        afterwards = chance.random() < 0.4  # an interrupt, when the thread has just started
        make = interrupted if afterwards else no_thread
        lasting = chance.random() < 0.3 and not afterwards
        fault = Fault(chance.randint(1, calls), make, lasting)
        with thread_starts(fault, afterwards):
            return scenario(fault)

    yield case


def count_calls(
    subject: Subject, name: str, faulty: Callable[[Fault], AbstractContextManager[None]]
) -> list[tuple[Scenario, int]]:
    """All scenarios, with the number of calls in each that could fail."""
    found = []
    for scenario in scenarios(subject, subject.work(name)):
        counting = Fault()
        with faulty(counting):
            scenario(counting)
        found.append((scenario, counting.calls))
    return found


def limited(scenario: Scenario, room: int) -> Verdict:
    """The scenario with `room` bytes of address space to take. After a request has failed it has all
    again."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit, none = (
        partial(resource.setrlimit, resource.RLIMIT_AS, (most, hard)) for most in (taken + room, hard)
    )
    return scenario(Fault(begin=limit, end=none))
