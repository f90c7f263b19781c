"""A model's layers over ranks of one thread each, against one process, on one machine.

    1 thread, 2 threads        one process, which has all layers
    2 ranks                    two processes of one thread, each of which has half of the layers
    2 ranks, 1 under way       the same with one pass at a time: one rank computes, and the other waits

All ways stay loaded and take turns with the same ids, and have to choose the same next ones. While one is
asked, the others wait, and `idle` are the processors that a way keeps busy meanwhile. They decode one text,
compute prompts of one chunk and of several, and write texts together, first with all experts resident, then
with slots for half of them.

Figures are medians of the rounds with their quartiles. `of_threads` is a way's speed over that of one process
with as many threads as there are ranks. `of_one_under_way` is over that of the same ranks with one pass at a
time. Both are by the rounds' own ratios. `cpu_ms` is the processor time of a token on all ranks. `hops` are
messages between two processes, beside those of PyTorch's gloo alone.

`token` says where the time of a decoded token goes over ranks. Predicted is what its weights' bytes take at
the bandwidth that one thread reaches, and a hop of a row for each rank. Measured is what each rank computes.
`passing_ms` is what is left, in which no rank computes.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dev.bench.random_checkpoint import random_native
from dev.bench.ranks_hops import ROW, measure_hops
from dev.bench.ranks_turns import Works
from dev.bench.ranks_way import Crew, Way
from dev.peers.llamacpp.bandwidth import read_bandwidth
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from model.quant.formats import DEFAULT
from model.shapes import SHAPES
from runtime.errors import OptionError
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from tools.quantize.names import CONFIG

SHAPE = SHAPES["mixtral-8x7b"]
CHUNK = 512  # tokens of a prompt that are computed at once
KINDS = ("resident", "half in slots")
SHARE = 0.7  # of the time is for the first kind, if there are two


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="a checkpoint (default: a random one of Mixtral-8x7B's shape)"
    )
    parser.add_argument("--folder", type=Path, help="where the random one is kept for the next time")
    parser.add_argument("--layers", type=at_least_one, default=4, help="of the random one (default: 4)")
    parser.add_argument("--ranks", type=at_least_two, default=2, help="(default: 2)")
    parser.add_argument("--tokens", type=at_least_one, default=24, help="to decode in a turn (default: 24)")
    parser.add_argument("--long", type=at_least_one, default=4, help="chunks of the long prompt (default: 4)")
    parser.add_argument("--texts", type=at_least_two, default=4, help="to write together (default: 4)")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="(default: 3)")
    parser.add_argument(
        "--seconds", type=at_least_one, default=400, help="after which no round begins (default: 400)"
    )
    parser.add_argument(
        "--depths", type=at_least_one, nargs="*", default=[1], help="passes under way (default: 1)"
    )
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS), help="(default: both)")


def at_least_two(text: str) -> int:
    if (count := at_least_one(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}, and must be a number of at least 2")
    return count


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per work and round on stderr. Returns all figures.

    Raises `MixtralError` if a process cannot do its part.
    """
    began = time.monotonic()
    with subject(args) as folder:
        checkpoint = open_checkpoint(folder)
        context = room(args, checkpoint.config)
        report: dict[str, Any] = {"checkpoint": checkpoint.description, "context": context}
        report["hops"] = measure_hops(args.rounds)
        hop = next(row["ring_us"] for row in report["hops"] if row["bytes"] == ROW)
        report |= {"memory": [], "idle": [], "speed": []}
        for kind in args.kinds:
            deadline = began + args.seconds * (SHARE if kind == KINDS[0] else 1)
            slots = None if kind == KINDS[0] else checkpoint.config.experts // 2
            found = measure(kind, slots, folder, context, hop, deadline, args)
            for name in ("memory", "idle", "speed"):
                report[name] += found.pop(name)
            report |= found
        return report


@contextmanager
def subject(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of the model to measure. A random one is made if need be."""
    if args.model:
        if args.folder:
            raise OptionError("--folder is for a random model; leave it out, or leave out --model")
        yield args.model
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / CONFIG).exists():
            random_native(dataclasses.replace(SHAPE, layers=args.layers), folder, DEFAULT)
        yield folder


def room(args: argparse.Namespace, config: ModelConfig) -> int:
    """The context that all works need. Raises `OptionError` if the model has less, or fewer layers than there
    are ranks."""
    context = Works.context(args.long * CHUNK, args.tokens)
    if context > config.context:
        raise OptionError(
            f"prompts of {args.long} chunks and turns of {args.tokens} tokens take a context of {context}, "
            f"and the model's is {config.context}; take fewer"
        )
    if args.ranks > config.layers:
        raise OptionError(
            f"{args.ranks} ranks are more than the model's layers ({config.layers}); take fewer"
        )
    return context


def measure(
    kind: str,
    slots: int | None,
    folder: Path,
    context: int,
    hop: float,
    deadline: float,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All works in all ways, with all experts resident or with so many slots in each layer. `hop`: of a row,
    in microseconds. No more rounds begin after the `deadline`."""
    threads = Way(f"{args.ranks} threads", 1, args.ranks)
    ranks = Way(f"{args.ranks} ranks", args.ranks, 1)
    ways = [threads, ranks] if slots else [Way("1 thread", 1, 1), threads, ranks]
    limited = [dataclasses.replace(ranks, name=f"{ranks.name}, {n} under way", depth=n) for n in args.depths]
    options: dict[str, Any] = {"context": context, "parallel": args.texts}
    options |= {"offload": "never"} if slots is None else {"offload": "always", "slots": slots}
    with ExitStack() as stack:
        crews = {}
        for way in ways:
            crews[way.name] = Crew(way, str(folder), stack, **options)
            crews[way.name].ask("prompt", tokens=min(CHUNK, context), seed=0)
            say(f"{kind}, {way.name}: loaded")
        memory = [{"experts": kind} | row for crew in crews.values() for row in crew.memory()]
        crews |= {way.name: crews[ranks.name] for way in limited}
        works = Works(kind, [*ways, *limited], crews, args)
        bandwidths = [[read_bandwidth(1), read_bandwidth(args.ranks)] for _ in works.rounds(deadline)]
        report: dict[str, Any] = {
            "memory": memory,
            "idle": [
                {"experts": kind, "way": way.name, "processors": crews[way.name].idle_share} for way in ways
            ],
            "speed": works.speeds(threads, ranks),
        }
        report |= {f"rounds, {kind}": len(bandwidths), f"same_ids, {kind}": works.same}
        if slots is None:
            size = crews[threads.name].about["bytes_per_token"]
            one, all_ranks = (statistics.median(found) for found in zip(*bandwidths, strict=True))
            report["layers_of_ranks"] = crews[ranks.name].about["layers"]
            report["token"] = token(size, one, args.ranks * hop / 1e3, works.decoded(ranks), args.tokens)
            report["token"]["gb_per_s_of_threads"] = all_ranks / 1e9
        return report


def token(
    size: int, bandwidth: float, hops: float, answers: Sequence[dict[str, Any]], tokens: int
) -> dict[str, float]:
    """Where the time of a token goes that ranks decode one after the other, in milliseconds.

    `answers` are those of `Crew.ask` to decode so many `tokens`. A token reads `size` bytes.
    """

    def each(values: Sequence[float]) -> float:
        return statistics.median(values) / tokens * 1e3

    measured = each([found["seconds"] for found in answers])
    waited = each([found["timed"][0] for found in answers])
    others = each([sum(found["timed"][1:]) for found in answers])
    reading = size / bandwidth * 1e3
    return {
        "mb": size / 1e6,
        "gb_per_s_of_one_thread": bandwidth / 1e9,
        "reading_ms": reading,
        "hops_ms": hops,
        "predicted_ms": reading + hops,
        "hops_share_predicted": hops / (reading + hops),
        "measured_ms": measured,
        "rank_0_ms": measured - waited,
        "other_ranks_ms": others,
        "passing_ms": waited - others,
        "passing_share": (waited - others) / measured,
    }
