"""Speed of a model: tokens per second of prompts and of decoding, against what the machine allows.

At batch 1 every new token reads the trunk's weights and its chosen experts' once, and hardly computes. So the
bytes to read over the bandwidth of memory, measured in the same run, is the time that no program can beat.
Where experts are offloaded (--slots, --vram), neither can it beat the bytes of those that miss over the link,
nor what it takes to compute alone.

Ids are random and the model is run as the engine runs it: on a GPU step by step as CUDA graphs. The tokenizer
and the sampler are left out.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from model.config import ModelConfig
from model.linear import PackedLinear
from model.mixtral import Mixtral
from model.moe import SparseMoE
from model.quant.expert import BlobExperts
from model.quant.product import QuantizedLinear
from runtime.shell.arguments import at_least_one
from runtime.stats import Stats
from tools.bench.figures import bound, device_memory, traffic
from tools.bench.forced import Trace
from tools.bench.link import measure_memory
from tools.bench.play import Player, Stage, seconds
from tools.bench.routing import MAKERS
from tools.bench.subject import Subject, make_cache, make_subject
from tools.bench.subject import add_arguments as add_subject
from tools.bench.ways import InPlace, make_ways


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument("--prompt", type=at_least_one, default=128, help="tokens (default: 128)")
    parser.add_argument("--tokens", type=at_least_one, default=32, help="to decode after it (default: 32)")
    parser.add_argument(
        "--repeats", type=at_least_one, default=5, help="the median of these counts (default: 5)"
    )
    add_routing(parser)


def add_routing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--routing",
        choices=("own", *MAKERS),
        default="own",
        help="who chooses decoded tokens' experts: the model's own gates, chance, or a made-up trace that "
        "repeats itself as Mixtral's does (default: own)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per repeat on stderr. Returns all figures.

    Raises `OptionError`, `DeviceError` or `ModelError` before anything is loaded or made.
    """
    subject = make_subject(args, args.prompt + args.tokens)
    stage = set_up(subject, ("full", "computing"), args.routing, args.prompt + args.tokens)
    try:
        report = subject.describe() | {"routing": args.routing}
        return report | measure(stage, args.prompt, args.tokens, args.repeats)
    finally:
        stage.close()
        subject.close()


def set_up(subject: Subject, ways: tuple[str, ...], routing: str, positions: int) -> Stage:
    """The subject, to be played in these ways, or as it is where all experts are resident; routed for so many
    positions."""
    trace = make_trace(subject, routing, positions)
    if subject.store is None:
        return Stage(subject, {}, None, trace)
    cache = make_cache(subject, subject.setup.plan)
    return Stage(subject, make_ways(cache, ways), cache, trace)


def make_trace(subject: Subject, routing: str, positions: int) -> Trace | None:
    """None where the model's own gates choose."""
    c, options = subject.config, subject.options
    if routing == "own":
        return None
    choices = MAKERS[routing](c.layers, c.experts, c.experts_per_token, positions)
    distance = options.lookahead if options.prefetch and subject.store is not None else 0
    return Trace.make(choices, c.experts, distance, subject.setup.device)


def measure(stage: Stage, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians and best of `repeats`, in each of which a prompt and its continuation take turns; on a CPU,
    whose speed others may share, with the bandwidth of memory too."""
    setup, ids = stage.subject.setup, random_ids(stage.subject.config, prompt + tokens)
    first, *others = list(stage.ways) or ["resident"]
    warm_up(stage.use(first), ids, prompt)
    memory = device_memory(setup.plan, setup.device)  # before there is more than an engine has
    for way in others:
        warm_up(stage.use(way), ids, prompt)
    turns: dict[str, list[Turn]] = {way: [] for way in (first, *others)}
    bandwidths = [stage.subject.rates.memory]
    for repeat in range(repeats):
        if setup.device.type == "cpu":
            bandwidths.append(measure_memory(setup.device, 1))
        for way, taken in turns.items():
            taken.append(turn(stage, way, ids, prompt))
        last = turns[first][-1]
        print(
            f"{repeat + 1} of {repeats}: prompt {prompt / last.prompt:,.1f} tokens/s, "
            f"decode {tokens / last.decode:,.2f} tokens/s",
            file=sys.stderr,
        )
    decodes = [taken.decode for taken in turns[first]]
    report = {
        "prompt": rates(prompt, [taken.prompt for taken in turns[first]]),
        "decode": rates(tokens, decodes),
        "memory": memory_bound(stage, bandwidths, tokens / statistics.median(decodes)),
        "graphs": stage.graphs(),
    } | memory
    return report | offloaded(stage, turns, tokens) if stage.cache is not None else report


@dataclass(frozen=True)
class Turn:
    """Seconds of a prompt and of its continuation, and what became of experts in the latter."""

    prompt: float
    decode: float
    counted: Stats


def turn(stage: Stage, way: str, ids: torch.Tensor, prompt: int) -> Turn:  # ids [1, P + T]
    player, there = stage.use(way), ids[:, :prompt].to(stage.subject.setup.device)
    taken = seconds(partial(player.prompt, there))
    before = stage.count()
    decoding = seconds(partial(player.decode, ids[0, prompt:].tolist()))
    return Turn(taken, decoding, stage.count() - before)


def offloaded(stage: Stage, turns: dict[str, list[Turn]], tokens: int) -> dict[str, Any]:
    """What crossed the link, and what that allows. Every repeat has the same misses."""
    plan = stage.subject.setup.plan
    moved = traffic(turns["full"][-1].counted, tokens, plan.blob_bytes)
    full, computing = (
        statistics.median(taken.decode for taken in turns[way]) / tokens for way in ("full", "computing")
    )
    least = bound(moved["missed_bytes_per_token"], stage.subject.rates.link, computing)
    share = {"share_of_bound": least["bound_ms"] / (full * 1e3)}
    return {"slots": list(plan.slots_per_layer), "experts": moved, "bound": least | share}


def random_ids(config: ModelConfig, count: int) -> torch.Tensor:  # [1, count] int64
    return torch.randint(config.vocab, (1, count), generator=torch.Generator().manual_seed(0))


def warm_up(player: Player, ids: torch.Tensor, prompt: int) -> None:  # ids [1, P + 1 or more]
    """First calls make what later ones re-use: a decoder captures its graphs."""
    player.prompt(ids[:, : min(prompt, player.chunk)].to(player.model.embed_tokens.weight.device))
    player.kv.truncate(0)
    player.decode(ids[0, :2].tolist())


def memory_bound(stage: Stage, bandwidths: list[float], tokens_per_s: float) -> dict[str, float]:
    """What reading each weight once allows."""
    size = bytes_per_token(stage.subject.model)
    limit = statistics.median(bandwidths) / size
    return {
        "weight_bytes_per_token": size,
        "bandwidth_bytes_per_s": statistics.median(bandwidths),
        "best_bandwidth_bytes_per_s": max(bandwidths),
        "bound_tokens_per_s": limit,
        "decode_share_of_bound": tokens_per_s / limit,
    }


def rates(tokens: int, taken: list[float]) -> dict[str, float]:
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / statistics.median(taken),
        "best_tokens_per_s": tokens / min(taken),
    }


def bytes_per_token(model: Mixtral) -> int:
    """Bytes of weights that decoding one token reads, as they are kept in memory: of the embeddings one row,
    of the experts the chosen ones."""
    embeddings = model.embed_tokens.weight
    size = embeddings[0].nbytes - embeddings.nbytes
    for name, parameter in model.named_parameters():
        size += 0 if ".experts." in name else parameter.nbytes
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            size += sum(tensor.nbytes for tensor in module.memory.values())
        elif isinstance(module, PackedLinear):
            size += module.packed.numel() * module.packed.element_size()
        elif isinstance(module, SparseMoE):
            size += model.config.experts_per_token * expert_bytes(module, model.config)
    return size


def expert_bytes(module: SparseMoE, config: ModelConfig) -> int:
    if isinstance(module.experts, BlobExperts | InPlace):
        return module.experts.blobs[0].nbytes
    parameters = (parameter for name, parameter in module.named_parameters() if not name.startswith("gate."))
    return sum(parameter.nbytes for parameter in parameters) // config.experts
