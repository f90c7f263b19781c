"""What each part of the expert cache is worth: decoding with the whole of it, and with less and less, over a
link as fast as one chooses.

    full            LRU slots, guessed experts copied early
    no prefetch     LRU slots
    no cache        nothing kept: a token's experts are copied in every layer
    whole layers    all experts of a layer are copied before it is computed, as device maps do

The modes take turns over the same model and ids. Beside them stands the bound: a token takes no less than
computing alone does, nor than the bytes that the cache's misses have to move over the link.

By default the link is as fast as makes these two equal, which is where overlap is worth most. One core is
left to the link: computing takes the others.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.kv_cache import KVCache
from model.mixtral import Block, Mixtral
from model.moe import Experts, mix
from model.quant.expert import BlobExperts, ExpertFormat
from model.quant.spec import QuantSpec
from runtime.device import choose_dtype
from runtime.errors import OptionError
from runtime.experts.arena import Arena
from runtime.experts.cache import ExpertCache
from runtime.experts.copying import CopyEngine, HostLink
from runtime.experts.lookahead import Lookahead
from runtime.experts.policy import POLICIES, make_policy
from runtime.experts.slots import SlotTable, Spares
from runtime.loader import load_resident
from runtime.planner import count_weights
from tools.benchmarks.decode import decode, seconds
from tools.benchmarks.load import at_least_one
from tools.random_model import SHAPES, random_model

CPU = torch.device("cpu")
MODES = ("full", "no prefetch", "no cache", "whole layers")
WARM_UP = 16  # tokens before the first that count, so that slots hold what they hold in a long text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", type=Path, nargs="?", help="a checkpoint folder")
    source.add_argument("--shape", choices=SHAPES, help="a model of random weights, made in memory")
    parser.add_argument("--layers", type=at_least_one, help="of the random model (default: the shape's)")
    parser.add_argument("--attention", default="4", help="format of the random model's (default: 4)")
    parser.add_argument("--experts", default="4", help="format of the random model's (default: 4)")
    parser.add_argument(
        "--steadiness",
        type=float,
        default=8.0,
        help="of the random model's residual stream: its first value, in units of what a layer adds. Trained "
        "models change it slowly, which is what lookahead lives on (default: 8)",
    )
    parser.add_argument("--slots", type=at_least_one, default=4, help="per layer (default: 4)")
    parser.add_argument("--policy", choices=tuple(POLICIES), default="lru")
    parser.add_argument("--lookahead", type=int, choices=(1, 2), default=1)
    parser.add_argument("--prefetch", type=at_least_one, default=1)
    parser.add_argument(
        "--link-gbps", type=float, help="(default: so that copying takes as long as computing)"
    )
    parser.add_argument("--tokens", type=at_least_one, default=32, help="per turn (default: 32)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="turns of each mode (default: 5)")
    parser.add_argument("--threads", type=at_least_one, default=max((os.cpu_count() or 2) - 1, 1))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: by model)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per mode on stderr. Returns all figures."""
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        model, form, about = make_model(args)
        if not model.config.experts_per_token <= args.slots <= model.config.experts:
            raise OptionError(
                f"--slots is {args.slots}, and must be from {model.config.experts_per_token} "
                f"to {model.config.experts}"
            )
        return about | measure(model, form, args)
    finally:
        torch.set_num_threads(before)


def make_model(args: argparse.Namespace) -> tuple[Mixtral, ExpertFormat, dict[str, Any]]:
    """A resident model on the CPU, whose memory serves as arena besides."""
    if args.shape:
        config = SHAPES[args.shape]
        config = dataclasses.replace(config, layers=args.layers or config.layers)
        formats = QuantSpec.parse(args.attention), QuantSpec.parse(args.experts)
    else:
        checkpoint = open_checkpoint(args.model)
        config, formats = checkpoint.config, (checkpoint.attention, checkpoint.experts)
    quantised = any(spec.quantised for spec in formats)
    dtype = choose_dtype(args.dtype, CPU, sum(count_weights(config)), quantised)
    form = ExpertFormat.choose(config, formats[1], dtype, CPU)
    if args.shape:
        model = random_model(config, *formats, dtype, CPU)
        model.embed_tokens.weight.mul_(args.steadiness * config.hidden**0.5)
        about = f"{args.shape}, {config.layers} layers, random, attention {formats[0]}, experts {formats[1]}"
    else:
        model, about = load_resident(checkpoint, form, dtype, CPU), checkpoint.description
    return model, form, {"model": about, "dtype": str(dtype).removeprefix("torch."), "threads": args.threads}


class ResidentArena:
    """The blobs of a resident model, as an arena."""

    pinned = False

    def __init__(self, layers: Sequence[BlobExperts]) -> None:
        self.layers, self.experts = layers, len(layers[0].blobs)

    def blob(self, layer: int, expert: int) -> Tensor:
        return self.layers[layer].blobs[expert]

    def close(self) -> None:
        """The model keeps its memory."""


def measure(model: Mixtral, form: ExpertFormat, args: argparse.Namespace) -> dict[str, Any]:
    """All modes in turns, over one link. The model is resident again afterwards."""
    blocks = [cast(Block, block) for block in model.layers]
    resident = [cast(BlobExperts, block.block_sparse_moe.experts) for block in blocks]
    arena, config = cast(Arena, ResidentArena(resident)), model.config
    count = min(args.tokens + WARM_UP, config.context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab, (args.repeats, 1, count), generator=generator)
    kv = KVCache.allocate(config, 1, count, model.embed_tokens.weight.dtype, CPU)

    def turn(repeat: int, experts: Sequence[Experts]) -> float:
        """Seconds per token, with these experts."""
        for block, provider in zip(blocks, experts, strict=True):
            block.block_sparse_moe.experts = provider
        kv.truncate(0)
        decode(model, ids[repeat, :, :WARM_UP], kv)
        return seconds(lambda: decode(model, ids[repeat, :, WARM_UP:], kv)) / (count - WARM_UP)

    def make_cache(gbps: float | None, guesses: bool) -> ExpertCache:
        return cache_over(arena, form, blocks, args, gbps, guesses)

    layers = range(config.layers)
    free_link = make_cache(None, guesses=False)
    turn(0, resident)
    computing = statistics.median(turn(repeat, resident) for repeat in range(args.repeats))
    turn(0, [free_link.layer(n) for n in layers])
    missing = free_link.counters.misses / count * form.blob_bytes  # bytes per token
    free_link.close()
    gbps = args.link_gbps or missing / computing / 1e9

    caches = {"full": make_cache(gbps, True), "no prefetch": make_cache(gbps, False)}
    caches["no cache"] = make_cache(gbps, False)
    whole = WholeLayers(arena, form, gbps)
    modes: dict[str, Sequence[Experts]] = {
        "resident": resident,
        "full": [caches["full"].layer(n) for n in layers],
        "no prefetch": [caches["no prefetch"].layer(n) for n in layers],
        "no cache": [partial(forgetting, caches["no cache"], n) for n in layers],
        "whole layers": [partial(whole.apply, n) for n in layers],
    }
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    try:
        for repeat in range(args.repeats):
            for mode, providers in modes.items():
                times[mode].append(turn(repeat, providers))
            print(f"{repeat + 1} of {args.repeats}: " + ", ".join(
                f"{mode} {1 / taken[-1]:.2f}" for mode, taken in times.items()), file=sys.stderr)  # fmt: skip
    finally:
        for block, blobs in zip(blocks, resident, strict=True):
            block.block_sparse_moe.experts = blobs
        for cache in caches.values():
            cache.close()
        whole.copies.close()
    return report(times, caches["full"], gbps, args.repeats * count)


def cache_over(
    arena: Arena,
    form: ExpertFormat,
    blocks: Sequence[Block],
    args: argparse.Namespace,
    gbps: float | None,
    guesses: bool,
) -> ExpertCache:
    """Empty slots over an arena that is shared, with a link of their own."""
    spares = args.lookahead * args.prefetch if guesses else 0
    numbers = iter(range(len(blocks) * args.slots + spares))
    tables = [
        SlotTable(islice(numbers, args.slots), make_policy(args.policy, 0, layer))
        for layer in range(len(blocks))
    ]
    copies = CopyEngine(HostLink(gbps * 1e9 if gbps else None))
    cache = ExpertCache(form, arena, copies, CPU, tables, Spares(numbers), args.prefetch)
    cache.lookahead = Lookahead(blocks, args.lookahead) if guesses else None
    return cache


def report(times: dict[str, list[float]], full: ExpertCache, gbps: float, tokens: int) -> dict[str, Any]:
    """`tokens` is how many each mode has decoded. Misses are the policy's own: guesses do not change them."""
    counters = full.count()
    copying = counters.misses / tokens * full.arena.blob(0, 0).numel() / (gbps * 1e9)
    computing = statistics.median(times["resident"])
    bound = 1 / max(computing, copying)
    rates = {mode: statistics.median(1 / seconds for seconds in taken) for mode, taken in times.items()}
    return {
        "link_gb_per_s": gbps,
        "hit_ratio": counters.hits / (counters.hits + counters.misses),
        "lookahead_recall": counters.recalled / max(counters.recallable, 1),
        "wasted_share_of_bytes": counters.wasted_bytes / max(counters.copied_bytes, 1),
        "computing_ms_per_token": computing * 1e3,
        "copying_ms_per_token": copying * 1e3,
        "bound_tokens_per_s": bound,
        "tokens_per_s": rates,
        "share_of_bound": {mode: rates[mode] / bound for mode in MODES},
    }


def forgetting(cache: ExpertCache, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A layer's experts, none of which stay."""
    y = cache.apply(layer, x, ids, weights)
    table = cache.tables[layer]
    for slot, held in table.slots.items():
        if held.expert is not None:
            table.clear(slot, held.expert)
    return y


class WholeLayers:
    """Every layer is copied as a whole, to the same place, and then computed."""

    def __init__(self, arena: Arena, form: ExpertFormat, gbps: float) -> None:
        self.arena = arena
        self.blobs = torch.empty(arena.experts, form.blob_bytes, dtype=torch.uint8)
        self.experts = [form.bind(blob) for blob in self.blobs]
        self.copies = CopyEngine(HostLink(gbps * 1e9))

    def apply(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tickets = [
            self.copies.submit(self.arena.blob(layer, e), blob, urgent=True)
            for e, blob in enumerate(self.blobs)
        ]
        for ticket in tickets:
            self.copies.wait(ticket)
        return mix(self.experts, x, ids, weights)
