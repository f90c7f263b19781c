"""Option dataclasses as command-line flags: `--max-new-tokens` is the field `max_new_tokens`."""

import argparse
import dataclasses
from typing import Any, TypeVar

Options = TypeVar("Options")


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
