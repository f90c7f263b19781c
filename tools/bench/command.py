"""Benchmarks, one per subcommand:

    python -m tools.bench decode MODEL | --shape S    tokens per second, against what memory bandwidth allows
    python -m tools.bench prefill MODEL | --shape S   a long prompt, against what the link allows
    python -m tools.bench offload MODEL | --shape S   the expert cache with and without each of its parts
    python -m tools.bench link                        bytes per second to the device, and of its memory
    python -m tools.bench gpu --out DIR               all of these on a GPU, in minutes

The report goes to stdout, with the machine, as text or as JSON with --json.
"""

import argparse
import json
import subprocess
from typing import Any

from runtime.errors import DeviceError, MixtralError
from runtime.options import EngineOptions
from runtime.process.shortage import shortage_as
from runtime.process.threads import using_threads
from runtime.shell.arguments import help_by_put, new_parser
from runtime.shell.command import put, run
from tools.bench import decode, gpu, link, offload, prefill
from tools.bench.machine import machine
from tools.text import as_text

AS_WRITTEN = argparse.RawDescriptionHelpFormatter
SUBCOMMANDS: dict[str, Any] = {
    "decode": decode,
    "prefill": prefill,
    "offload": offload,
    "link": link,
    "gpu": gpu,
}


def main(argv: list[str] | None = None) -> int:
    return run(lambda: measure(make_parser("tools.bench", __doc__, SUBCOMMANDS).parse_args(argv)))


def measure(args: argparse.Namespace) -> None:
    """Do what the command line asks. Every failure is raised."""
    benchmark = args.benchmark
    try:
        threads = EngineOptions(threads=getattr(args, "threads", None)).threads  # which checks it
        with shortage_as(DeviceError, "take a smaller model, or free some"), using_threads(threads):
            measured = benchmark.run(args)
        # Last, because asking a GPU for its name takes memory, which processes that `gpu` starts would lack.
        report = {"benchmark": args.subcommand, "machine": machine()} | measured
    except subprocess.CalledProcessError as error:
        raise MixtralError(str(error)) from error
    text = getattr(benchmark, "as_text", as_text)
    put((json.dumps(report, indent=2) if args.json else text(report)) + "\n")


def make_parser(command: str, description: str | None, benchmarks: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser of `python -m command`, with a subcommand for each module in `benchmarks`."""
    parser = new_parser(command, description)
    choices = parser.add_subparsers(dest="subcommand", required=True)
    for name, module in benchmarks.items():
        subparser = help_by_put(
            choices.add_parser(name, description=module.__doc__, formatter_class=AS_WRITTEN)
        )
        module.add_arguments(subparser)
        subparser.set_defaults(benchmark=module)
        subparser.add_argument("--json", action="store_true", help="print JSON")
    return parser
