"""What each part of the expert cache is worth: decoding with the whole of it, and with less and less.

    full            LRU slots, guessed experts copied early
    no prefetch     LRU slots
    no cache        nothing kept: a token's experts are copied in every layer
    whole layers    all experts of a layer are copied before it is computed, as device maps do

The modes take turns over the same model, slots and ids. Beside them stands the bound: a token takes no less
than computing alone does, nor than the bytes that the cache's misses have to move over the link.

On a CPU, the link is by default as fast as makes these two equal, which is where overlap is worth most, and
one core is left to it: computing takes the others.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from runtime.errors import MixtralError, OptionError
from runtime.experts.copying import HostLink
from runtime.planning.footprint import Plan
from runtime.process.threads import choose_threads, computing
from runtime.shell.arguments import at_least_one
from runtime.stats import Stats
from tools.bench.decode import make_trace, random_ids
from tools.bench.figures import bound, device_memory, traffic
from tools.bench.play import Stage, seconds
from tools.bench.routing import MAKERS
from tools.bench.subject import Subject, give_back, make_cache, make_subject
from tools.bench.subject import add_arguments as add_subject
from tools.bench.ways import LADDER, make_ways

MODES = LADDER
SLOTS = 4
FORGETTING = ("no cache", "whole layers")
WARM_UP = 16  # tokens before the first that count, so that slots hold what they hold in a long text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument(
        "--steadiness",
        type=float,
        default=8.0,
        help="of the random model's residual stream: its first value, in units of what a layer adds. Trained "
        "models change it slowly, which is what lookahead lives on (default: 8)",
    )
    parser.add_argument(
        "--sweep",
        type=numbers,
        default=(),
        metavar="N,N,..",
        help="measure these --slots one after the other",
    )
    parser.add_argument(
        "--routing",
        type=names(("own", *MAKERS)),
        default=("own",),
        metavar="NAME,..",
        help="who chooses experts: the model's own gates, chance (uniform), or a made-up trace that repeats "
        "itself as Mixtral's does (synthetic); one or more (default: own)",
    )
    parser.add_argument(
        "--modes", type=names(MODES), default=MODES, metavar="NAME,..", help=f"(default: {','.join(MODES)})"
    )
    parser.add_argument("--tokens", type=at_least_one, default=32, help="per turn (default: 32)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="turns of each mode (default: 5)")
    parser.add_argument("--seconds", type=float, help="begin with no row that would end after these")


def numbers(text: str) -> tuple[int, ...]:
    return tuple(at_least_one(part) for part in text.split(","))


def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """For argparse: some of these names, with commas between.

    >>> names(("a", "b c"))("b c,a")
    ('b c', 'a')
    """

    def parse(text: str) -> tuple[str, ...]:
        for part in text.split(","):
            if part not in known:
                raise argparse.ArgumentTypeError(f"{part!r}, and must be of {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per turn on stderr. Returns all figures: where there are several numbers of
    slots or routings, under "rows"."""
    start = time.perf_counter()
    defaults: dict[str, Any] = {"offload": "always"}
    if args.sweep:
        defaults["slots"] = args.sweep[0]
    elif getattr(args, "vram", None) is None:
        defaults["slots"] = SLOTS
    with computing(getattr(args, "threads", None) or max(choose_threads() - 1, 1)):  # one copies
        subject = make_subject(args, args.tokens + WARM_UP, **defaults)
        try:
            if subject.store is None:
                raise OptionError("all experts are resident; leave out --offload never")
            if args.shape:
                subject.model.embed_tokens.weight.mul_(args.steadiness * subject.config.hidden**0.5)
            rows: list[dict[str, Any]] = []
            longest = 0.0  # seconds that a row took: the next may take as long
            for slots, routing in product(args.sweep or [None], args.routing):
                begun = time.perf_counter() - start
                if args.seconds is None or begun + longest < args.seconds:
                    measured = row(subject, slots, routing, args)
                    rows.append({"begun_after_s": begun, "routing": routing} | measured)
                    longest = max(longest, time.perf_counter() - start - begun)
            return subject.describe() | (rows[0] if len(rows) == 1 else {"rows": rows})
        finally:
            subject.close()


def row(subject: Subject, slots: int | None, routing: str, args: argparse.Namespace) -> dict[str, Any]:
    """One number of slots (None: as planned) under one routing; or why there are no figures for it."""
    give_back(subject.setup.device)  # the slots of the row before
    try:
        plan = subject.setup.plan if slots is None else subject.plan(slots)
        return measure(subject, plan, routing, args)
    except (MixtralError, torch.OutOfMemoryError) as error:
        if slots is None or len(args.sweep) == 1:
            raise
        return {"slots": slots, "error": " ".join(str(error).split())}


def measure(subject: Subject, plan: Plan, routing: str, args: argparse.Namespace) -> dict[str, Any]:
    """All modes in turns, over one cache, in which they are used one after the other."""
    tokens, config = args.tokens, subject.config
    ids = [
        random_ids(config, (tokens + WARM_UP) * (n + 1))[0, -tokens - WARM_UP :].tolist()
        for n in range(args.repeats)
    ]
    cache = make_cache(subject, plan)
    stage = Stage(
        subject,
        make_ways(cache, ("computing", *args.modes)),
        cache,
        make_trace(subject, routing, tokens + WARM_UP),
    )

    def turn(way: str, repeat: int) -> tuple[float, Stats]:
        """Seconds per token, and what was counted meanwhile."""
        player = stage.use(way)
        # Where nothing is kept, a token leaves what sixteen would, and takes long enough.
        player.decode(ids[repeat][WARM_UP - 1 if way in FORGETTING else 0 : WARM_UP])
        before = stage.count()
        taken = seconds(lambda: player.decode(ids[repeat][WARM_UP:]))
        return taken / tokens, stage.count() - before

    try:
        first = turn(args.modes[0], 0)
        memory = device_memory(plan, subject.setup.device)  # before there is more than an engine has
        for way in stage.ways:
            stage.use(way).decode(ids[0][:2])  # graphs are captured
        link = choose_link(subject, lambda way: turn(way, 0), first[1], plan.blob_bytes, tokens)
        if subject.setup.device.type == "cpu":
            cache.copies.link = HostLink(link)  # it is idle now
        turns: dict[str, list[tuple[float, Stats]]] = {way: [] for way in stage.ways}
        for repeat in range(args.repeats):
            for way, taken in turns.items():
                taken.append(turn(way, repeat))
            shown = ", ".join(f"{way} {1 / taken[-1][0]:.2f}" for way, taken in turns.items())
            slots = min(plan.slots_per_layer)
            print(f"{repeat + 1} of {args.repeats}: {slots} slots, {routing}: {shown}", file=sys.stderr)
        return report(turns, link, plan, tokens) | memory | {"graphs": stage.graphs()}
    finally:
        stage.close()


def choose_link(
    subject: Subject, turn: Callable[[str], tuple[float, Stats]], counted: Stats, blob: int, tokens: int
) -> float:
    """Bytes per second: as measured; on a CPU, if nothing else was asked for, what makes copying the misses
    take as long as computing."""
    if subject.setup.device.type != "cpu" or subject.options.link_gbps:
        return subject.rates.link
    computing = statistics.median(turn("computing")[0] for _ in range(3))
    return counted.misses / tokens * blob / computing if counted.misses else subject.rates.link


def report(
    turns: dict[str, list[tuple[float, Stats]]], link: float, plan: Plan, tokens: int
) -> dict[str, Any]:
    """Medians. Misses are the policy's own: guesses do not change them."""
    by_mode = {}
    for mode, taken in turns.items():
        total = sum((counted for _, counted in taken), Stats())
        by_mode[mode] = traffic(total, len(taken) * tokens, plan.blob_bytes)
    rates = {mode: statistics.median(1 / seconds for seconds, _ in taken) for mode, taken in turns.items()}
    cached = next((mode for mode in turns if mode in ("full", "no prefetch")), None)
    figures = by_mode[cached] if cached else {}
    least = bound(figures.get("missed_bytes_per_token", 0.0), link, 1 / rates["computing"])
    limit = 1e3 / least["bound_ms"]
    return {
        "slots": list(plan.slots_per_layer),
        "link_gb_per_s": link / 1e9,
        "hit_ratio": figures.get("hit_ratio", 0.0),
        "lookahead_recall": figures.get("lookahead_recall", 0.0),
        "wasted_share_of_bytes": figures.get("wasted_share_of_bytes", 0.0),
        "computing_ms_per_token": least["computing_ms"],
        "copying_ms_per_token": least["copying_ms"],
        "bound_tokens_per_s": limit,
        "tokens_per_s": rates,
        "share_of_bound": {mode: rates[mode] / limit for mode in rates if mode != "computing"},
        "modes": {mode: by_mode[mode] for mode in rates if mode != "computing"},
    }
