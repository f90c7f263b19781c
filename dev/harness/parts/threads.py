"""The n-th thread cannot be started, or an interrupt comes when it has just been."""

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from dev.harness.faults import Fault, interrupted, no_thread, thread_starts
from dev.harness.outcome import Verdict
from dev.harness.part import Case
from dev.harness.scenarios import scenarios
from dev.harness.subject import Subject


@contextmanager
def open_threads(subject: Subject) -> Iterator[Case]:
    tried = scenarios(subject, subject.work("threads"))
    calls = {}
    for scenario in tried:
        counting = Fault()
        with thread_starts(counting):
            scenario.run(counting)
        calls[scenario.name] = counting.calls

    def case(chance: Random) -> Verdict:
        scenario = chance.choice([scenario for scenario in tried if calls[scenario.name]])
        afterwards = chance.random() < 0.4
        make = interrupted if afterwards else no_thread
        lasting = chance.random() < 0.3 and not afterwards
        fault = Fault(chance.randint(1, calls[scenario.name]), make, lasting)
        with thread_starts(fault, afterwards):
            return scenario.run(fault)

    yield case
