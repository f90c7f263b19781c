"""The figures, as a table; and what went wrong, each kind with the seed and the step that make it again."""

import re
from collections.abc import Sequence

from dev.harness.outcome import Outcome, Tally, Verdict

TITLES = ("part", "tried", "refused", "accepted", "raw errors", "hangs", "leaks", "wrong", "seconds")


def table(tallies: Sequence[Tally]) -> str:
    """
    >>> print(table([Tally("index", 2, {verdict.value: 0 for verdict in Verdict} | {"refused": 2}, 1.5)]))
    part   tried  refused  accepted  raw errors  hangs  leaks  wrong  seconds
    index      2        2         0           0      0      0      0      1.5
    """
    rows = [list(TITLES)]
    for tally in tallies:
        counts = [str(tally.counts[verdict.value]) for verdict in Verdict]
        rows.append([tally.part, str(tally.tried), *counts, f"{tally.seconds:.1f}"])
    if len(tallies) > 1:
        sums = [sum(tally.counts[verdict.value] for tally in tallies) for verdict in Verdict]
        tried, seconds = sum(tally.tried for tally in tallies), sum(tally.seconds for tally in tallies)
        rows.append(["all", str(tried), *map(str, sums), f"{seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines += [f"{tally.part}: not tried, {tally.skipped}" for tally in tallies if tally.skipped]
    lines += [f"{tally.part}: {line}" for tally in tallies for line in tally.figures]
    return "\n".join(lines)


def kinds(findings: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Findings by kind: the verdict, and the beginning of the message without its numbers and quotations."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in findings:
        said = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|\d+", "#", outcome.said)[:40]
        found.setdefault((outcome.verdict.value, said), []).append(outcome)
    return found


def failures(tally: Tally, seed: int, shown: int = 3) -> str:
    """A line for each kind of failure, with the flags that repeat some of its cases."""
    lines = []
    for (verdict, _), outcomes in kinds(tally.findings).items():
        lines.append(f"{tally.part}: {verdict}, {len(outcomes)} times: {outcomes[0].said}")
        lines += [f"    --seed {seed} --only {tally.part} --at {outcome.at}" for outcome in outcomes[:shown]]
    return "\n".join(lines)
