"""The outcomes of cases, and their sums in a part."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Verdict(str, Enum):
    """The first two are right, the others are failures."""

    REFUSED = "refused"  # by an error of the promised family, whose message is one line
    ACCEPTED = "accepted"
    RAW = "raw"  # any other error, a message that is not one line, a crash
    HANG = "hang"  # not done within the time that the part allows
    LEAK = "leak"  # a thread, a handle or memory more than before
    WRONG = "wrong"  # a result that differs from the undisturbed one

    @property
    def failure(self) -> bool:
        return self not in (Verdict.REFUSED, Verdict.ACCEPTED)


class Wrong(Exception):
    """Raised by a case whose result is wrong."""


class Leaked(Exception):
    """Raised by a case that finds a leak other than threads or handles of this process."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of case number `at`."""

    at: int
    verdict: Verdict
    said: str = ""
    trace: str = ""  # of an error, or of all threads of a process that hangs


@dataclass
class Tally:
    """The sums of one part."""

    part: str
    tried: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {verdict.value: 0 for verdict in Verdict})
    seconds: float = 0.0
    skipped: str = ""  # why the part could not be tried
    findings: list[Outcome] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)  # lines, of parts that measure

    def add(self, outcome: Outcome) -> None:
        self.tried += 1
        self.counts[outcome.verdict.value] += 1
        if outcome.verdict.failure:
            self.findings.append(outcome)

    @property
    def failures(self) -> int:
        return len(self.findings)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
