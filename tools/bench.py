"""Benchmarks, one per subcommand:

    python -m tools.bench load MODEL | --bytes 2GB    seconds per GB, and peak memory over the model's size
    python -m tools.bench quantize                    seconds per matrix, against hqq on the whole matrix
    python -m tools.bench quality                     size and held-out perplexity in 21 pairs of formats
    python -m tools.bench decode MODEL | --shape S    tokens per second, against what memory bandwidth allows
    python -m tools.bench offload MODEL | --shape S   the expert cache with and without each of its parts
    python -m tools.bench link                        bytes per second to the device, and of its memory

What was measured goes to stdout with the machine it was measured on, as text or, with --json, as JSON.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from model.errors import ModelError
from runtime.errors import MixtralError
from tools.benchmarks import decode, link, load, offload, quality, quantize
from tools.benchmarks.machine import machine

SUBCOMMANDS = {
    "load": load,
    "quantize": quantize,
    "quality": quality,
    "decode": decode,
    "offload": offload,
    "link": link,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = parser.add_subparsers(dest="subcommand", required=True)
    for name, module in SUBCOMMANDS.items():
        subparser = choices.add_parser(name, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        report = {"benchmark": args.subcommand, "machine": machine()} | SUBCOMMANDS[args.subcommand].run(args)
    except (ModelError, MixtralError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    show = getattr(SUBCOMMANDS[args.subcommand], "as_text", as_text)
    print(json.dumps(report, indent=2) if args.json else show(report))
    return 0


def as_text(report: dict[str, Any], indent: str = "") -> str:
    """
    >>> print(as_text({"machine": {"cores": 2}, "warm": {"seconds": 0.51234567}}))
    machine
      cores  2
    warm
      seconds  0.5123
    """
    width = max((len(name) for name, value in report.items() if not isinstance(value, dict)), default=0)
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", as_text(value, indent + "  ")]
        else:
            shown = (
                f"{value:,.4g}"
                if isinstance(value, float)
                else f"{value:,}"
                if isinstance(value, int)
                else value
            )
            lines.append(f"{indent}{name:{width}}  {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
