"""What a trace of the expert cache tells (python -m runtime.generate --trace FILE records one):

python -m tools.trace summary TRACE [--json]    hit ratios, recorded and replayed; recall; bytes; waits
python -m tools.trace plot TRACE --out DIR      experts.png, hit_ratio.png, recall.png
"""

import argparse
import json
import os
import sys
from pathlib import Path

from runtime.errors import MixtralError
from runtime.experts.trace import TraceError
from tools.traces.plot import plot
from tools.traces.read import Trace, read_trace
from tools.traces.statistics import summarise
from tools.traces.text import as_text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    summary = commands.add_parser("summary", help="statistics, as tables or JSON")
    summary.add_argument("trace", type=Path, metavar="TRACE")
    summary.add_argument("--json", action="store_true", help="print JSON")
    figures = commands.add_parser("plot", help="figures; needs matplotlib")
    figures.add_argument("trace", type=Path, metavar="TRACE")
    figures.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    figures.add_argument(
        "--layers", type=int, nargs="+", metavar="L", help="layers to show (default: first, middle, last)"
    )
    figures.add_argument(
        "--tokens", type=int, default=100, metavar="N", help="show the first N decoded tokens (default: 100)"
    )
    args = parser.parse_args(argv)
    try:
        trace = load(args.trace)
        if args.command == "plot":
            for path in plot(trace, args.out, args.layers, args.tokens):
                print(path)
        else:
            report = summarise(trace)
            print(json.dumps(report, indent=2) if args.json else as_text(report), flush=True)
    except BrokenPipeError:  # whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush, at exit
        return 0
    except (MixtralError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def load(path: Path) -> Trace:
    """The trace, with a warning if it was cut off. Raises `TraceError`."""
    trace = read_trace(path)
    if trace.truncated:
        print(f"warning: {path}: the last line is incomplete and left out", file=sys.stderr)
    if not trace.events:
        raise TraceError(f"{path}: there is a header and no events; nothing was generated")
    return trace


if __name__ == "__main__":
    sys.exit(main())
