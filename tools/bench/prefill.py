"""Speed of a long prompt. Every layer needs all experts for it, so each expert that is not in a slot crosses
the link once per chunk, while others compute.

A prompt takes no less than the bytes of the experts that layers lacked when they began take on the link, and
no less than computing alone. Both are measured in the same run, and misses are counted. At first the slots
hold what another prompt has left in them.
"""

import argparse
import statistics
from typing import Any

from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from tools.bench.figures import Turn, bound, device_memory, median_seconds, rates
from tools.bench.stage import Player, Stage, random_ids, staged
from tools.bench.subject import add_arguments as add_subject

BEFORE = 64  # tokens of the prompt before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument("--tokens", type=at_least_one, default=2048, help="of the prompt (default: 2048)")
    parser.add_argument("--repeats", type=at_least_one, default=3, help="whose median counts (default: 3)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per repeat on stderr. Returns all figures.

    Raises `OptionError`, `DeviceError` or `ModelError` before anything is loaded or made.
    """
    with staged(args, args.tokens) as stage:
        return stage.subject.describe() | measure(stage, args.tokens, args.repeats)


def measure(stage: Stage, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians and bests of `repeats`, after a first one that does not count."""
    subject, plan = stage.subject, stage.subject.plan
    ids = random_ids(subject.config, tokens).to(plan.device)
    turns: dict[str, list[Turn]] = {way: [] for way in stage.ways}
    memory: dict[str, Any] = {}

    def another(player: Player) -> None:
        player.prompt(ids[:, :BEFORE])
        player.kv.truncate(0)

    for repeat in range(repeats + 1):
        for way, taken in turns.items():
            taken.append(stage.play(way, another, lambda player: player.prompt(ids))[1])
            memory = memory or device_memory(plan)
        shown = ", ".join(f"{way} {tokens / taken[-1].seconds:,.1f} tokens/s" for way, taken in turns.items())
        say(f"{repeat} of {repeats}: {shown}")
    counting = {way: taken[1:] for way, taken in turns.items()}
    first = next(iter(stage.ways))
    report = {"prompt": rates(tokens, counting[first]), "chunk": plan.chunk} | memory
    if stage.cache is None:
        return report
    full, computing = (median_seconds(counting[way]) for way in stage.ways)
    missing = statistics.median(turn.counted.misses for turn in counting["full"])
    chunks = -(-tokens // plan.chunk)
    return report | {
        "slots": list(plan.slots_per_layer),
        "missing_experts_per_layer": missing / subject.config.layers / chunks,
        "missed_bytes": missing * plan.blob_bytes,
        "copied_bytes": statistics.median(turn.counted.copied_bytes for turn in counting["full"]),
        "bound": bound(missing * plan.blob_bytes, subject.link, computing, full),
    }
