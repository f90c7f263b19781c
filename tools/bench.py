"""Benchmarks, one per subcommand:

    python -m tools.bench load MODEL | --bytes 2GB    seconds per GB, and peak memory over the model's size
    python -m tools.bench quantize                    seconds per matrix, against hqq on the whole matrix
    python -m tools.bench quality                     size and held-out perplexity in 21 pairs of formats
    python -m tools.bench decode MODEL | --shape S    tokens per second, against what memory bandwidth allows
    python -m tools.bench prefill MODEL | --shape S   a long prompt, against what the link allows
    python -m tools.bench offload MODEL | --shape S   the expert cache with and without each of its parts
    python -m tools.bench link                        bytes per second to the device, and of its memory
    python -m tools.bench gpu --out DIR               the last four on a GPU, in minutes, with tables

What was measured goes to stdout with the machine it was measured on, as text or, with --json, as JSON.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from model.errors import ModelError
from runtime.errors import MixtralError
from tools.benchmarks import decode, gpu, link, load, offload, prefill, quality, quantize
from tools.benchmarks.machine import machine

SUBCOMMANDS = {
    "load": load,
    "quantize": quantize,
    "quality": quality,
    "decode": decode,
    "prefill": prefill,
    "offload": offload,
    "link": link,
    "gpu": gpu,
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
        measured = SUBCOMMANDS[args.subcommand].run(args)
        # Behind it: asking a GPU its name takes of its memory, which processes that `gpu` starts would see.
        report = {"benchmark": args.subcommand, "machine": machine()} | measured
    except (ModelError, MixtralError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    text = getattr(SUBCOMMANDS[args.subcommand], "as_text", as_text)
    print(json.dumps(report, indent=2) if args.json else text(report))
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
            lines.append(f"{indent}{name:{width}}  {show(value)}")
    return "\n".join(lines)


def show(value: object) -> str:
    """
    >>> show(0.51234567), show(12345), show(True), show("4g64")
    ('0.5123', '12,345', 'True', '4g64')
    """
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
