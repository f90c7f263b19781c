"""The process that runs a part's cases, and reports each to its parent."""

import faulthandler
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import NoReturn

import torch

from dev.harness.judge import judge
from dev.harness.measure import Holdings, peak_bytes, reset_peak, resident_bytes, settled, settled_bytes
from dev.harness.outcome import Outcome, Verdict
from dev.harness.part import Absent, Case, Part, Telling
from dev.harness.subject import Subject

ROOM = 8 << 30  # bytes of address space that a part may take, since the machine is shared
WARM = 20  # cases before memory is first measured


def serve(
    part: Part, subject: Subject, seed: int, numbers: Iterable[int], until: float, pipe: int, log: Path
) -> NoReturn:
    """Run the cases until the moment `until`, then end the process. Everything it prints goes to `log`."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(written, 1)
    os.dup2(written, 2)
    faulthandler.enable(written)
    faulthandler.register(signal.SIGUSR1, written, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ROOM, resource.RLIM_INFINITY))

    def tell(**message: object) -> None:
        os.write(pipe, json.dumps(message).encode() + b"\n")

    try:
        with part.open(subject) as case:
            watch = Watch(part, case)
            for at in numbers:
                if time.monotonic() > until:
                    break
                tell(begin=at)
                for outcome in watch.run(at, Random(f"{seed} {part.name} {at}")):
                    tell(**asdict(outcome))
            for outcome in watch.finish():
                tell(**asdict(outcome))
            if isinstance(case, Telling):
                tell(figures=case.figures())
        tell(done=True)
    except Absent as reason:
        tell(skipped=str(reason))
    except BaseException as error:
        tell(**asdict(judge(-1, error)))
    sys.stdout.flush()
    os._exit(0)


class Watch:
    """Runs cases, and measures what each takes and leaves."""

    def __init__(self, part: Part, case: Case) -> None:
        self.part, self.case = part, case
        self.last = -1
        self.done = 0
        self.held: Holdings | None = None
        self.memory = 0  # after the first cases

    def run(self, at: int, chance: Random) -> list[Outcome]:
        before = Holdings.now()
        reset_peak()
        memory, cpu = resident_bytes(), time.process_time()
        try:
            outcome = Outcome(at, self.case(chance))
        except BaseException as error:
            outcome = judge(at, error)
            del error
        cpu, memory = time.process_time() - cpu, peak_bytes() - memory
        self.last, self.done = at, self.done + 1
        if outcome.verdict.failure:
            return [outcome]
        if cpu > self.part.cpu_seconds:
            return [Outcome(at, Verdict.HANG, f"took {cpu:.1f} s of processor time")]
        if memory > self.part.memory:
            return [Outcome(at, Verdict.LEAK, f"took {memory >> 20} MiB of memory")]
        if self.done > 1 and (extra := settled(before)):  # the first case may fill caches
            return [Outcome(at, Verdict.LEAK, f"left {extra}")]
        if self.done == WARM:
            self.memory = settled_bytes()
        return [outcome]

    def finish(self) -> list[Outcome]:
        """The memory that all cases together have taken for good."""
        if not self.memory:
            return []
        grown = settled_bytes() - self.memory
        if grown <= self.part.growth:
            return []
        return [Outcome(self.last, Verdict.LEAK, f"{self.done} cases have taken {grown >> 20} MiB for good")]
