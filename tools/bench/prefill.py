"""Speed of a long prompt, whose every layer needs all experts: each that is not in a slot crosses the link
once per chunk, while others compute.

So a prompt takes no less than the bytes of the experts that layers lacked when they began, over the link,
nor than computing alone does. Both are measured in the same run, and misses are counted. The slots hold at
first what another prompt has left in them.

Prompts come in any length, and from any thread. So prompts of a few other lengths are computed twice each,
and one of them twice more in another thread. Where a library prepares something for a length or a thread, the
first time takes longer than the second.
"""

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from runtime.shell.arguments import at_least_one
from tools.bench.decode import random_ids, rates, set_up
from tools.bench.figures import bound, device_memory
from tools.bench.play import Stage, seconds
from tools.bench.subject import add_arguments as add_subject
from tools.bench.subject import make_subject

BEFORE = 64  # tokens of the prompt before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument("--tokens", type=at_least_one, default=2048, help="of the prompt (default: 2048)")
    parser.add_argument(
        "--repeats", type=at_least_one, default=3, help="the median of these counts (default: 3)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per repeat on stderr. Returns all figures.

    Raises `OptionError`, `DeviceError` or `ModelError` before anything is loaded or made.
    """
    subject = make_subject(args, args.tokens)
    stage = set_up(subject, ("full", "computing"), "own", args.tokens)
    try:
        report = subject.describe() | measure(stage, args.tokens, args.repeats)
        return report | {"first_times": measure_first_times(stage, args.tokens)}
    finally:
        stage.close()
        subject.close()


def measure(stage: Stage, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians and best of `repeats`, after one that does not count."""
    setup, config = stage.subject.setup, stage.subject.config
    ids = random_ids(config, tokens).to(setup.device)
    ways = list(stage.ways) or ["resident"]
    times: dict[str, list[float]] = {way: [] for way in ways}
    misses, copied = [], []  # by repeat
    memory: dict[str, Any] = {}
    for repeat in range(repeats + 1):
        for way, taken in times.items():
            player = stage.use(way)
            player.prompt(ids[:, :BEFORE])
            player.kv.truncate(0)
            before = stage.count()
            taken.append(seconds(partial(player.prompt, ids)))
            counted = stage.count() - before
            memory = memory or device_memory(setup.plan, setup.device)
            if way == "full":
                misses.append(counted.misses)
                copied.append(counted.copied_bytes)
        shown = ", ".join(f"{way} {tokens / taken[-1]:,.1f} tokens/s" for way, taken in times.items())
        print(f"{repeat} of {repeats}: {shown}", file=sys.stderr)
    prompts = times[ways[0]][1:]
    report = {"prompt": rates(tokens, prompts), "chunk": setup.plan.chunk} | memory
    if "full" not in times:
        return report
    missing = statistics.median(misses[1:])
    least = bound(
        missing * setup.plan.blob_bytes, stage.subject.rates.link, statistics.median(times["computing"][1:])
    )
    chunks = -(-tokens // setup.plan.chunk)
    return report | {
        "slots": list(setup.plan.slots_per_layer),
        "missing_experts_per_layer": missing / config.layers / chunks,
        "missed_bytes": missing * setup.plan.blob_bytes,
        "copied_bytes": statistics.median(copied[1:]),
        "bound": least | {"share_of_bound": least["bound_ms"] / (statistics.median(prompts) * 1e3)},
    }


def measure_first_times(stage: Stage, tokens: int) -> list[dict[str, Any]]:
    """How long the first prompt of a length takes, and how long the second; of one length in another thread,
    too. Where experts are offloaded they count as there, since copies would hide the difference."""
    way = "computing" if "computing" in stage.ways else next(iter(stage.ways), "resident")
    lengths = other_lengths(tokens)
    with ThreadPoolExecutor(1) as pool:
        rows = [first_times(stage, way, length) for length in lengths]
        in_another = [pool.submit(first_times, stage, way, length).result() for length in lengths[:1]]
    return [row | {"thread": "main"} for row in rows] + [row | {"thread": "another"} for row in in_another]


def other_lengths(tokens: int) -> list[int]:
    """
    >>> other_lengths(2048), other_lengths(9), other_lengths(1)
    ([1021, 515, 37], [1, 5], [1])
    """
    wanted = (tokens // 2 - 3, tokens // 4 + 3, 37)
    return [length for length in wanted if 0 < length < tokens] or [1]


def first_times(stage: Stage, way: str, length: int) -> dict[str, Any]:
    ids = random_ids(stage.subject.config, length).to(stage.subject.setup.device)
    player = stage.use(way)
    taken = []
    for _ in range(2):
        player.kv.truncate(0)
        taken.append(seconds(partial(player.prompt, ids)) * 1e3)
    return {"tokens": length, "first_ms": taken[0], "again_ms": taken[1]}
