"""Parsers of command lines, and option dataclasses as flags: `--max-new-tokens` is `max_new_tokens`."""

import argparse
import dataclasses
from typing import Any, TypeVar

from runtime.shell.command import put

Options = TypeVar("Options")


def new_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m command`, without flags so far but `--help`."""
    return help_by_put(
        argparse.ArgumentParser(
            prog=f"python -m {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )


def help_by_put(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let a parser print its help as results are printed: argparse hides that stdout takes no more."""
    parser.print_help = lambda file=None: put(parser.format_help())  # type: ignore[method-assign]
    return parser


def at_least_one(text: str) -> int:
    """The type of a flag that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, and must be at least 1")
    return value


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Add a flag for each field of the dataclass `options`, in a group of its own."""
    group = parser.add_argument_group(options.__name__)
    for field in dataclasses.fields(options):
        words: dict[str, Any] = dict(field.metadata)
        if words.get("action") in ("store_true", argparse.BooleanOptionalAction):
            del words["type"]
        elif words.get("nargs") == "+":
            words["action"] = "extend"
        if field.default not in (None, (), False):
            words["help"] += f" (default: {field.default})"
        group.add_argument(flag(field.name), default=argparse.SUPPRESS, **words)


def from_flags(options: type[Options], args: argparse.Namespace) -> Options:
    """The dataclass, from what argparse read; flags that were not given keep their defaults."""
    names = {field.name for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    return options(**{name: value for name, value in vars(args).items() if name in names})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
