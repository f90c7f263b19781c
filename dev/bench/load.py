"""Loading a checkpoint: seconds until it is loaded and until its first token, and memory at the peak.

Each measurement is a process of its own, with all experts resident. It is taken with the files in the page
cache (warm), and after they are dropped from it where the system can (cold). A mapped file is read when its
pages are first used, so the time of the first token belongs to its load. A first prompt of 64 random ids uses
nearly all experts.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from dev.bench.random_checkpoint import random_checkpoint, shape_of_size
from dev.peers.llamacpp.ways import Way, add_peer_arguments, drop_from_page_cache, mapped_and_read, peer_ways
from model.checkpoint import open_checkpoint
from runtime.options import DTYPES
from runtime.process.threads import usable_processors
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from runtime.units import parse_bytes
from tools.text import show

PROMPT = 64  # tokens
CONTEXT = 2 * PROMPT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", type=Path, nargs="?", help="a checkpoint folder")
    source.add_argument(
        "--bytes", help="make a random checkpoint of about this size, like 2GB, and load that"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the model in memory (default: the engine's)")
    parser.add_argument(
        "--threads", type=at_least_one, default=usable_processors(), help="(default: all processors)"
    )
    parser.add_argument(
        "--runs",
        type=at_least_one,
        default=3,
        help="per measurement; the fastest counts (default: 3)",
    )
    add_peer_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per measurement on stderr. Returns all figures."""
    if args.bytes is None:
        return measure_all(args.model, args)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        random_checkpoint(shape_of_size(parse_bytes(args.bytes)), Path(folder))
        return measure_all(Path(folder), args)


def measure_all(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    about = open_checkpoint(folder).description
    given = {"offload": "never", **({"dtype": args.dtype} if args.dtype else {})}
    ways = mapped_and_read(folder, **given) + peer_ways(args)
    states = ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",)
    rows: list[dict[str, Any]] = []
    for way in ways:
        measure(way, args.threads)  # into the page cache
        for state in states:
            rows.append({"way": way.name, "files": state} | fastest(way, state == "cold", args))
            say(", ".join(f"{name} {show(value)}" for name, value in rows[-1].items()))
    return {"checkpoint": about, "threads": args.threads, "loads": rows}


def fastest(way: Way, cold: bool, args: argparse.Namespace) -> dict[str, float]:
    results = []
    for _ in range(args.runs):
        if cold:
            drop_from_page_cache(way.files)
        results.append(measure(way, args.threads))
    return min(results, key=lambda result: result["first_token_s"])


def measure(way: Way, threads: int) -> dict[str, float]:
    """One load in a fresh process. `peak_mb` is its memory at the peak of the load, and `private_mb` what it
    has of its own afterwards, both over what it had before."""
    with way.start() as side:
        before = side.ask("memory")
        loaded = way.load(side, CONTEXT, threads)
        after = side.ask("memory")
        first = side.ask("prompt", tokens=PROMPT)
    size = way.bytes
    return {
        "seconds": loaded["seconds"],
        "seconds_per_gb": loaded["seconds"] / size * 1e9,
        "first_token_s": loaded["seconds"] + first["seconds"],
        "files_mb": size / 1e6,
        "peak_mb": (after["peak"] - before["rss"]) / 1e6,
        "private_mb": (after["anonymous"] - before["anonymous"]) / 1e6,
    }
