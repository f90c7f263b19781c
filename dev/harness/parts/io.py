"""The n-th call to the disk fails, once or from then on."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from dev.harness.faults import DISK_ERRORS, Fault, disk, interrupted
from dev.harness.outcome import Verdict
from dev.harness.part import Case
from dev.harness.scenarios import scenarios
from dev.harness.subject import Subject


@contextmanager
def open_io(subject: Subject) -> Iterator[Case]:
    tried = scenarios(subject, subject.work("io"))
    calls = {}
    for scenario in tried:
        counting = Fault()
        with disk(counting, subject.folder):
            scenario.run(counting)
        calls[scenario.name] = counting.calls

    def case(chance: Random) -> Verdict:
        scenario = chance.choice(tried)
        make = chance.choice((*DISK_ERRORS, interrupted))
        fault = Fault(
            chance.randint(1, calls[scenario.name]), make, chance.random() < 0.3 and make is not interrupted
        )
        with disk(fault, subject.folder):
            return scenario.run(fault)

    yield case
