"""What a case can come to, and the sums of a part."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Verdict(str, Enum):
    """The first two are as they should be."""

    REFUSED = "refused"  # with one line, of the family of errors that the program promises
    ACCEPTED = "accepted"
    RAW = "raw"  # any other error, a message that is not one line, a crash
    HANG = "hang"  # no end within the time that the part allows
    LEAK = "leak"  # a thread, a handle or memory more than before
    WRONG = "wrong"  # another result than the undisturbed one

    @property
    def failure(self) -> bool:
        return self not in (Verdict.REFUSED, Verdict.ACCEPTED)


class Wrong(Exception):
    """Raised by a case whose result is not what it has to be."""


class Leaked(Exception):
    """Raised by a case that finds something left over which is not a thread or handle of this process."""


@dataclass(frozen=True)
class Outcome:
    """What became of case number `at`."""

    at: int
    verdict: Verdict
    said: str = ""
    trace: str = ""  # of an error, or of every thread that hangs


@dataclass
class Tally:
    """The sums of one part."""

    part: str
    tried: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {verdict.value: 0 for verdict in Verdict})
    seconds: float = 0.0
    skipped: str = ""  # why the part could not be tried
    findings: list[Outcome] = field(default_factory=list)

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
