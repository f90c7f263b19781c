"""The n-th tensor cannot be had; or the process has only so much address space."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

from dev.harness.faults import Fault, memory, no_memory, python_memory
from dev.harness.isolate import isolated
from dev.harness.outcome import Verdict
from dev.harness.part import Case
from dev.harness.scenarios import Scenario, scenarios
from dev.harness.subject import Subject

STEPS = 48 << 20  # bytes of addresses beyond those that are taken: more and everything fits


@contextmanager
def open_allocation(subject: Subject) -> Iterator[Case]:
    tried = scenarios(subject, subject.work("allocation"))
    calls = {}
    for scenario in tried:
        counting = Fault()
        with memory(counting):
            scenario.run(counting)
        calls[scenario.name] = counting.calls

    def case(chance: Random) -> Verdict:
        scenario = chance.choice(tried)
        if chance.random() < 0.3:
            room = chance.randrange(STEPS)
            return isolated(lambda: limited(scenario, room))
        fault = Fault(chance.randint(1, calls[scenario.name]), chance.choice((no_memory, python_memory)))
        with memory(fault):
            return scenario.run(fault)

    yield case


def limited(scenario: Scenario, room: int) -> Verdict:
    """The scenario with so much room for memory. When a request has failed there is all the room again."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit, none = (
        partial(resource.setrlimit, resource.RLIMIT_AS, (most, hard)) for most in (taken + room, hard)
    )
    return scenario.run(Fault(begin=limit, end=none))
