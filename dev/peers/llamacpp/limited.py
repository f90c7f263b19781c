"""Decoding in less memory than the model takes, next to llama.cpp's.

Each side in turn is a fresh process in a control group with a limit, which counts the page cache too. Its
files are dropped from the page cache first, because pages that were read outside of the group would not
count. Both map their files; llama.cpp without reordering its weights, which would copy them. The first tokens
fill the group's memory and do not count.
"""

import argparse
from typing import Any

from dev.peers.llamacpp.group import memory_group
from dev.peers.llamacpp.models import add_model_arguments, make_pair
from dev.peers.llamacpp.sides import SideError, our_side, their_side
from dev.peers.llamacpp.ways import Way, drop_from_page_cache
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from runtime.units import format_bytes, parse_bytes
from tools.text import show

TIMES = 1.5  # our files over the limit, by default
CONTEXT = 512  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--limit", help="memory, like 2GiB (default: our files' size divided by 1.5)")
    parser.add_argument("--tokens", type=at_least_one, default=32, help="that count (default: 32)")
    parser.add_argument("--warm-up", type=at_least_one, default=32, help="tokens that do not (default: 32)")
    parser.add_argument("--rounds", type=at_least_one, default=2, help="(default: 2)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per process on stderr. Returns all figures; of a side that does not run in so
    little memory, the reason.

    Raises `DeviceError` if no group can be made, and `MixtralError` if a model cannot.
    """
    with our_side() as ours, their_side(args.python) as theirs:
        pair = make_pair(ours, theirs, args)
    ways = [Way("ours", pair.native), Way("theirs", pair.gguf, {"repack": False}, args.python)]
    limit = parse_bytes(args.limit) if args.limit else int(ways[0].bytes / TIMES)
    rows, failed = [], {}
    for _ in range(args.rounds):
        for way in ways:
            try:
                row = measure(way, limit, args)
                rows.append({"side": way.name, "files_over_limit": way.bytes / limit} | row)
                say(", ".join(f"{name} {show(value)}" for name, value in rows[-1].items()))
            except SideError as error:
                failed[way.name] = str(error)
                say(f"{way.name}: {error}")
    return {
        "model": f"{args.shape}, {args.layers} layers, random",
        "ours": pair.ours,
        "theirs": pair.theirs,
        "limit": format_bytes(limit),
        "threads": args.threads,
        "runs": rows,
        **({"failed": failed} if failed else {}),
    }


def measure(way: Way, limit: int, args: argparse.Namespace) -> dict[str, float]:
    with memory_group(limit) as prefix, way.start(prefix) as side:
        drop_from_page_cache(way.files)
        loaded = way.load(side, CONTEXT, args.threads)
        side.ask("prompt", tokens=1)
        side.ask("decode", tokens=args.warm_up)
        before = side.ask("memory")
        decoded = side.ask("decode", tokens=args.tokens)
        after = side.ask("memory")
    return {
        "load_seconds": loaded["seconds"],
        "tokens_per_s": args.tokens / decoded["seconds"],
        "cpu_ms_per_token": decoded["cpu_seconds"] / args.tokens * 1e3,
        "read_mb_per_token": (after["read"] - before["read"]) / args.tokens / 1e6,
        "rss_mb": after["rss"] / 1e6,
    }
