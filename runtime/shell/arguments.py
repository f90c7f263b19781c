"""Parsers of command lines, and option dataclasses as flags: `max_new_tokens` is `--max-new-tokens`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from model.errors import quoted
from runtime.shell.command import put
from runtime.shell.prompts import decode

Options = TypeVar("Options")

MODEL_HELP = "a checkpoint's folder, or org/name or org/name@revision at the Hugging Face hub"

# The titles under which `--help` shows the fields of options, in this order.
GROUPS = {
    "model and prompt": ("chat_template",),
    "when to stop": ("max_new_tokens", "stop", "ignore_eos"),
    "what to write": ("json_schema", "grammar"),
    "sampling": (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias", "seed",
    ),
    "memory and device": (
        "device", "dtype", "vram", "ram", "map", "context", "kv", "parallel", "threads", "graphs",
    ),
    "experts that do not all fit": (
        "offload", "slots", "berths", "policy", "lookahead", "prefetch", "misses",
        "link_gbps", "disk_gbps", "cpu_gbps",
    ),
    "several ranks": ("distributed", "rank_layers", "rank_timeout"),
}  # fmt: skip


def new_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of `python -m command`, with `--help` as its only flag."""
    return help_by_put(
        argparse.ArgumentParser(
            prog=f"python -m {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )


def help_by_put(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make a parser print its help as commands print results. Argparse would hide errors of stdout."""
    parser.print_help = lambda file=None: put(parser.format_help())  # type: ignore[method-assign]
    return parser


def at_least_one(text: str) -> int:
    """Parse the value of a flag that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, and must be a number of at least 1")
    return int(text)


def add_flags(parser: argparse.ArgumentParser, *options: type) -> None:
    """Add a flag for each field of these dataclasses that was made by `option`, under the titles of
    `GROUPS`."""
    fields = {field.name: field for each in options for field in dataclasses.fields(each) if field.metadata}
    for title, names in GROUPS.items():
        for name in names:
            if name in fields:
                add_flag(group(parser, title), fields.pop(name))
    assert not fields, f"no group for {', '.join(fields)}"


def add_flag(group: argparse._ArgumentGroup, field: "dataclasses.Field[Any]") -> None:
    words: dict[str, Any] = dict(field.metadata)
    if words.pop("contents", False):
        words["type"] = Path
    if words.get("action") in ("store_true", argparse.BooleanOptionalAction):
        del words["type"]
    elif words.get("nargs") == "+":
        words["action"] = "extend"
    if isinstance(field.default, (str, int, float)) and not isinstance(field.default, bool):
        words["help"] += f" (default: {field.default})"
    group.add_argument(flag(field.name), default=argparse.SUPPRESS, **words)


def group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Return the parser's group of flags with this title. Makes the group if there is none."""
    found = [group for group in parser._action_groups if group.title == title]
    return found[0] if found else parser.add_argument_group(title)


def from_flags(options: type[Options], args: argparse.Namespace) -> Options:
    """Make the dataclass from parsed flags. A field keeps its default if its flag was not given.

    Raises `OSError` or `RequestError` if a file cannot be read whose text becomes a field.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    values = {name: value for name, value in vars(args).items() if name in fields}
    for name in values:
        if fields[name].metadata.get("contents"):
            values[name] = decode(values[name].read_bytes(), quoted(str(values[name])))
    return options(**values)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
