"""What a trace of the expert cache says.

    python -m tools.trace summary TRACE [--json]    hit ratios, recorded and replayed; recall; bytes; waits
    python -m tools.trace plot TRACE --out DIR      experts.png, hit_ratio.png, recall.png, tiers.png

A trace is recorded by `python -m runtime.generate --trace FILE`.
"""

import argparse
import json
from pathlib import Path

from runtime.experts.trace import TraceError
from runtime.shell.arguments import help_by_put, new_parser
from runtime.shell.command import put, run, say
from tools.trace.plot import plot
from tools.trace.read import Trace, read_trace
from tools.trace.statistics import summarize
from tools.trace.text import as_text


def main(argv: list[str] | None = None) -> int:
    return run(lambda: study(argv))


def study(argv: list[str] | None) -> None:
    """Do what the command line asks. Every failure is raised."""
    args = make_parser().parse_args(argv)
    trace = load(args.trace)
    if args.command == "plot":
        for path in plot(trace, args.out, args.layers, args.tokens):
            put(f"{path}\n")
    else:
        report = summarize(trace)
        put((json.dumps(report, indent=2) if args.json else as_text(report)) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser("tools.trace", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    summary = help_by_put(commands.add_parser("summary", help="statistics, as tables or JSON"))
    summary.add_argument("trace", type=Path, metavar="TRACE")
    summary.add_argument("--json", action="store_true", help="print JSON")
    figures = help_by_put(commands.add_parser("plot", help="figures; needs matplotlib"))
    figures.add_argument("trace", type=Path, metavar="TRACE")
    figures.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    figures.add_argument(
        "--layers", type=int, nargs="+", metavar="L", help="layers to show (default: first, middle, last)"
    )
    figures.add_argument(
        "--tokens", type=int, default=100, metavar="N", help="show the first N decoded tokens (default: 100)"
    )
    return parser


def load(path: Path) -> Trace:
    """The trace, with a warning if it was cut off. Raises `TraceError`."""
    trace = read_trace(path)
    if trace.truncated:
        say(f"warning: {path}: the last line is incomplete and left out")
    if not trace.events:
        raise TraceError(f"{path}: there is a header and no events; nothing was generated")
    return trace
