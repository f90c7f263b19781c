"""The memory of a process that has a model: after loading, after all experts have been used, and after many
prompts of different lengths; and what a second process takes for the same model.

Every way is a process of its own: each dtype with all experts resident (mapped and read, where the system
can), and with experts offloaded. Prompts are random ids of 1 to --longest tokens, each followed by two more.
Sizes are in MB over what the process had before loading. `anonymous` is memory of its own, and `mapped` the
resident part of files. Of both together, `over_files` is the share of the model's files. `pss` counts what
processes share in equal parts. `grown` is the peak as a share above the size after the tenth prompt, and
`planned` what the plan says. `second_private` is what another process with the same model has for itself.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from dev.peers.llamacpp.sides import Side
from dev.peers.llamacpp.ways import Way, add_peer_arguments, mapped_and_read, peer_ways
from runtime.engine import DEMO
from runtime.errors import DeviceError
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

SETTLED = 10  # prompts, after which memory should not grow
ALL_EXPERTS = 64  # tokens that use nearly all of them
SIZES = ("anonymous", "mapped", "pss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?", default=DEMO, help="folder (default: the demo model)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: these two)")
    parser.add_argument("--prompts", type=at_least_one, default=40, help="(default: 40)")
    parser.add_argument("--longest", type=at_least_one, default=600, help="tokens (default: 600)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="(default: 1)")
    parser.add_argument("--offload", choices=("never", "always"), help="only so (default: both)")
    add_peer_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per way on stderr. Returns all figures.

    Raises `DeviceError` where the system does not tell a process's memory.
    """
    if not sys.platform.startswith("linux"):
        raise DeviceError("this system does not tell a process's memory; Linux does")
    rows = {}
    for way in our_ways(args) + peer_ways(args):
        rows[way.name] = row = measure(way, args)
        last = row["moments"][-1]
        taken = f"{last['over_files']:.2f} of the files' {row['files']:,.1f} MB"
        say(f"{way.name}, {args.prompts} prompts: {taken}; grown {row['grown']:.1%}")
    return {"ways": rows}


def our_ways(args: argparse.Namespace) -> list[Way]:
    ways = []
    for dtype in args.dtypes:
        if args.offload != "always":
            ways += [
                Way(f"{dtype}, resident, {way.name}", way.path, way.given)
                for way in mapped_and_read(args.model, dtype=dtype, offload="never")
            ]
        if args.offload != "never":
            ways.append(Way(f"{dtype}, offloaded", args.model, {"dtype": dtype, "offload": "always"}))
    return ways


def measure(way: Way, args: argparse.Namespace) -> dict[str, Any]:
    context = max(args.longest, ALL_EXPERTS) + 8
    with way.start() as side, way.start() as second:
        before = side.ask("memory")
        found = way.load(side, context, args.threads)
        moments = {"loaded": side.ask("memory")}
        side.ask("prompt", tokens=ALL_EXPERTS)
        moments["all experts used"] = side.ask("memory")
        sizes = after_each_prompt(side, args.prompts, args.longest)
        moments[f"{len(sizes)} prompts"] = sizes[-1]
        alone = second.ask("memory")
        way.load(second, context, args.threads)
        second.ask("prompt", tokens=ALL_EXPERTS)
        private = second.ask("memory")["private"] - alone["private"]
    settled, later = sizes[:SETTLED][-1]["rss"], [size["rss"] for size in sizes[SETTLED - 1 :]]
    return {
        "files": way.bytes / 1e6,
        **({"planned": found["planned"] / 1e6} if "planned" in found else {}),
        "moments": [describe(moment, size, before, way.bytes) for moment, size in moments.items()],
        "grown": max(later, default=settled) / settled - 1,
        "second_private": private / 1e6,
    }


def after_each_prompt(side: Side, prompts: int, longest: int, seed: int = 0) -> list[dict[str, Any]]:
    """Memory after each prompt; each has 1 to `longest` tokens."""
    chance = random.Random(seed)
    sizes = []
    for _ in range(prompts):
        side.ask("prompt", tokens=chance.randint(1, longest))
        side.ask("decode", tokens=2)
        sizes.append(side.ask("memory"))
    return sizes


def describe(moment: str, size: dict[str, int], before: dict[str, int], files: int) -> dict[str, Any]:
    """One moment as a row."""
    taken = {name: (size[name] - before[name]) / 1e6 for name in SIZES}
    share = (size["rss"] - before["rss"]) / files
    return {"moment": moment, **taken, "over_files": share}
