"""Try to break everything for a while, and report what happened.

    python -m dev.harness --seconds 600 --seed 1
    python -m dev.harness --only interrupts --cases 20000 --seconds 3600
    python -m dev.harness --seed 1 --only headers --at 4711       one case again, with its traces

The exit status is 1 if there were raw errors, hangs, leaks or wrong results. The attacked code is that of the
current folder.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from dev.harness.outcome import Tally
from dev.harness.parts import PARTS
from dev.harness.report import failures, kinds, table
from dev.harness.subject import make_subject
from dev.harness.supervise import run_part


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    if args.at is not None and len(names) > 1:
        parser.error("--at is a case of one part; name it with --only")
    with tempfile.TemporaryDirectory(prefix="mixtral-harness-") as folder:
        subject = make_subject(Path(folder))
        tallies = []
        for name in names:
            most = args.cases.get(name, args.cases.get("")) if args.at is None else 1
            seconds = args.seconds / len(names)
            tallies.append(run_part(PARTS[name], subject, args.seed, args.at or 0, most, seconds))
            if not args.quiet:
                print(table(tallies[-1:]), file=sys.stderr, flush=True)
    tell(tallies, args)
    return int(any(tally.failures for tally in tallies))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dev.harness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds", type=float, default=120, metavar="N", help="for all parts (default: 120)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    parser.add_argument("--only", metavar="PART,...", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--cases", type=counts, default={}, metavar="N", help="most cases of each part; or PART=N,..."
    )
    parser.add_argument("--at", type=int, metavar="K", help="only case K, with the traces of its errors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and findings to FILE")
    parser.add_argument("--findings", type=Path, metavar="DIR", help="write a file for each kind of failure")
    parser.add_argument("--quiet", action="store_true", help="nothing until the end")
    return parser


def counts(text: str) -> dict[str, int]:
    """
    >>> counts("20"), counts("io=3,soak=4")
    ({'': 20}, {'io': 3, 'soak': 4})
    """
    return {name: int(count) for name, _, count in (item.rpartition("=") for item in text.split(","))}


def tell(tallies: list[Tally], args: argparse.Namespace) -> None:
    """Print the table and the failures, and write them to the files that were asked for."""
    print(f"seed {args.seed}")
    print(table(tallies))
    for tally in tallies:
        if tally.findings:
            print(failures(tally, args.seed))
        if args.at is not None:
            print("".join(f"{outcome.said}\n{outcome.trace}" for outcome in tally.findings))
    if args.json:
        report = {"seed": args.seed, "parts": [tally.as_json() for tally in tallies]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.findings:
        write_findings(tallies, args.seed, args.findings)


def write_findings(tallies: list[Tally], seed: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for tally in tallies:
        for number, ((verdict, _), outcomes) in enumerate(kinds(tally.findings).items()):
            first = outcomes[0]
            cases = ", ".join(str(outcome.at) for outcome in outcomes[:50])
            text = f"seed {seed}, cases {cases}\n{len(outcomes)} times: {first.said}\n\n{first.trace}\n"
            (folder / f"{tally.part}-{number}-{verdict}.txt").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
