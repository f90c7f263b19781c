"""Tokens per second of several requests at once, next to llama.cpp's server with as many slots.

Each turn answers N requests at once, all of different random prompts, and samples each token by its
probability alone. `tokens_per_s` counts the new tokens of all requests over the whole time, prompts included;
`each` is a request's own speed after its first token. `over_one` compares with one request of the same way,
and `over_theirs` with llama.cpp's server, each by the median of the rounds' own ratios.

Ways: `ours` and `theirs` hold all experts in memory. `served` is ours through HTTP and as streams; `theirs`
goes through HTTP, too, and `ours` does not. `offloaded` is ours with --slots of each layer's experts in
slots, where the others are copied as they are needed. llama.cpp has no such thing on a CPU, so there too
`over_theirs` is against its server that has all experts in memory.

The routers of random models choose at random, and requests differ in what they choose. `random_choices` says
how many experts of a layer N tokens need, and how many times as fast as one N could be if experts alone took
time.

Every turn is kept in a file, and the same command goes on with it after an interrupt. More --rounds add to
what is there.
"""

import argparse
import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dev.peers.llamacpp.models import Pair, add_model_arguments, make_pair, name_pair
from dev.peers.llamacpp.records import Records, Turn
from dev.peers.llamacpp.sides import OUR_SERVER, OUR_SERVICE, THEIR_SERVER, Side, our_side, their_side
from dev.peers.llamacpp.turns import median, quartiles
from model.config import ModelConfig
from model.quant.formats import DEFAULT
from model.shapes import SHAPES
from runtime.errors import OptionError
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

WAYS = {"ours": OUR_SERVICE, "served": OUR_SERVER, "theirs": THEIR_SERVER, "offloaded": OUR_SERVICE}
WARM_UP = 4  # tokens of each request of the first turn, which does not count
SETTINGS = ("shape", "layers", "quant", "threads", "prompt", "tokens", "their_head", "slots", "link_gbps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, layers=2)
    parser.add_argument(
        "--server", default="llama-server", help="llama.cpp's program (default: llama-server)"
    )
    parser.add_argument(
        "--requests", type=at_least_one, nargs="+", default=[1, 2, 4, 8], help="at once (default: 1 2 4 8)"
    )
    parser.add_argument("--prompt", type=at_least_one, default=16, help="tokens of each (default: 16)")
    parser.add_argument("--tokens", type=at_least_two, default=32, help="new ones of each (default: 32)")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="(default: 5)")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), help="(default: all)")
    parser.add_argument("--slots", type=at_least_one, help="of a layer (default: for half of its experts)")
    parser.add_argument(
        "--link-gbps", type=float, metavar="G", help="GB/s at most to slots (default: no limit)"
    )
    parser.add_argument(
        "--turns", type=Path, help="file that keeps turns (default: parallel.jsonl in the models' folder)"
    )


def at_least_two(text: str) -> int:
    """Parse the number of new tokens: a speed after the first one needs another."""
    if (count := at_least_one(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}, and must be a number of at least 2")
    return count


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the file of turns lacks, printing a line per round on stderr. Returns all figures.

    Raises `MixtralError` if a side cannot do its part.
    """
    counts, shape = sorted(set(args.requests)), SHAPES[args.shape]
    args.slots = args.slots or shape.experts // 2
    settings = {name: getattr(args, name) for name in (*SETTINGS, *DEFAULT.by_kind())}
    settings["most_at_once"] = counts[-1]
    args.folder.mkdir(parents=True, exist_ok=True)
    records = Records(args.turns or args.folder / "parallel.jsonl", settings)
    wanted = [(number, count, way) for number in range(args.rounds) for count in counts for way in args.ways]
    missing = [turn for turn in wanted if turn not in records.turns]
    if kept := len(wanted) - len(missing):
        say(f"{kept} of {len(wanted)} turns are in {records.path}; remove it to measure all anew")
    if missing:
        take(missing, records, args)
    pair = name_pair(args)
    return {
        "model": f"{args.shape}, {args.layers} layers, random",
        "ours": pair.ours,
        "theirs": pair.theirs,
        **{name: settings[name] for name in ("threads", "prompt", "tokens", "slots", "link_gbps")},
        "rounds": args.rounds,
        "requests_at_once": table(records.turns, args),
        "random_choices": [
            {
                "at_once": count,
                "experts": (needed := experts_needed(shape, count)),
                "over_one": count * shape.experts_per_token / needed,
            }
            for count in counts
        ],
    }


def take(missing: Sequence[Turn], records: Records, args: argparse.Namespace) -> None:
    """Load what these turns need, have each side take one that does not count, and take them in order."""
    if shutil.which(args.server) is None:
        raise OptionError(f"--server {args.server}: there is no such program")
    with our_side() as ours, their_side(args.python) as theirs:
        pair = make_pair(ours, theirs, args)
    most = max(args.requests)
    with ExitStack() as stack:
        sides = {}
        for way in dict.fromkeys(way for _, _, way in missing):
            say(f"{way}: loading")
            sides[way] = stack.enter_context(Side(WAYS[way]))
            load(sides[way], way, pair, args)
            first = {"prompt": args.prompt, "tokens": min(WARM_UP, args.tokens), "seed": 0}
            sides[way].ask("together", requests=most, **first)
        for turn in missing:
            number, count, way = turn
            seed = 1000 * (number + 1) + count
            asked = {"requests": count, "prompt": args.prompt, "tokens": args.tokens, "seed": seed}
            records.add(turn, sides[way].ask("together", **asked))
            if turn[1:] == (most, args.ways[-1]):
                say(f"{number + 1} of {args.rounds} rounds")


def load(side: Side, way: str, pair: Pair, args: argparse.Namespace) -> None:
    """Load a model for as many requests at once as there will be, and texts as long as theirs."""
    size = {"threads": args.threads, "parallel": max(args.requests), "context": args.prompt + args.tokens}
    path, vocab = str(pair.gguf if way == "theirs" else pair.native), SHAPES[args.shape].vocab
    given: dict[str, dict[str, Any]] = {
        "ours": {"offload": "never"},
        "served": {"offload": "never", "vocab": vocab},
        "theirs": {"server": args.server, "vocab": vocab},
        "offloaded": {"offload": "always", "slots": args.slots, "link_gbps": args.link_gbps},
    }
    side.ask("load", path=path, **size, **given[way])


def table(turns: dict[Turn, dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per way and number of requests. Processor time and copies are a new token's, with its share of
    the prompts'."""

    def speeds(count: int, way: str) -> list[float]:
        return [count * args.tokens / turns[i, count, way]["seconds"] for i in range(args.rounds)]

    rows = []
    for way in args.ways:
        for count in sorted(set(args.requests)):
            found = [turns[i, count, way] for i in range(args.rounds)]
            made = count * args.tokens
            row = {
                "way": way,
                "at_once": count,
                "tokens_per_s": statistics.median(speeds(count, way)),
                "each": statistics.median(speed for turn in found for speed in turn["each"]),
                "cpu_ms": median(found, "cpu_seconds") / made * 1e3,
                "hit_ratio": median(found, "hit_ratio"),
                "copied_mb": median(found, "copied") / made / 1e6,
            }
            if 1 in args.requests:
                row["over_one"] = ratio(speeds(count, way), speeds(1, way))[1]
            if "theirs" in args.ways:
                low, row["over_theirs"], high = ratio(speeds(count, way), speeds(count, "theirs"))
                row |= {"low": low, "high": high}
            rows.append(row)
    return rows


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the rounds' own ratios."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def experts_needed(shape: ModelConfig, tokens: int) -> float:
    """How many of a layer's experts so many tokens need on average, if each chooses at random.

    >>> experts_needed(SHAPES["mixtral-8x7b"], 1), round(experts_needed(SHAPES["mixtral-8x7b"], 4), 2)
    (2.0, 5.47)
    """
    return shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** tokens)
