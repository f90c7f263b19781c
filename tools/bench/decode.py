"""Speed of a model: tokens per second of prompts and of decoding, against what the machine allows.

Decoding reads the trunk's weights and the chosen experts' once for every token, and computes little. So no
program can decode faster than memory delivers those bytes, at the bandwidth measured in the same run. Where
experts are offloaded (--slots, --vram), a token also takes no less than its missed experts' bytes take on the
link, and no less than computing alone.

Ids are random, and the model runs as the engine runs it: on a GPU, a token's step is a CUDA graph. The
tokenizer and the sampler are left out.
"""

import argparse
import statistics
from typing import Any

import torch

from model.config import ModelConfig
from model.linear import PackedLinear
from model.mixtral import Mixtral
from model.moe import SparseMoE
from model.quant.expert import BlobExperts
from model.quant.product import QuantizedLinear
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from tools.bench.figures import Turn, bound, device_memory, median_seconds, rates, traffic
from tools.bench.link import measure_memory
from tools.bench.stage import Player, Stage, random_ids, staged
from tools.bench.subject import add_arguments as add_subject
from tools.bench.ways import InPlace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_subject(parser)
    parser.add_argument("--prompt", type=at_least_one, default=128, help="tokens (default: 128)")
    parser.add_argument("--tokens", type=at_least_one, default=32, help="to decode after it (default: 32)")
    parser.add_argument("--repeats", type=at_least_one, default=5, help="whose median counts (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per repeat on stderr. Returns all figures.

    Raises `OptionError`, `DeviceError` or `ModelError` before anything is loaded or made.
    """
    with staged(args, args.prompt + args.tokens) as stage:
        return stage.subject.describe() | measure(stage, args.prompt, args.tokens, args.repeats)


def measure(stage: Stage, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians and bests of `repeats`, in each of which all ways take a prompt and its continuation in turn.
    On a CPU, whose speed others may share, every repeat measures the bandwidth of memory again."""
    subject, plan = stage.subject, stage.subject.plan
    ids = random_ids(subject.config, prompt + tokens).to(plan.device)
    text, continuation = ids[:, :prompt], ids[0, prompt:].tolist()
    first, *others = stage.ways
    warm_up(stage.use(first), ids, prompt)
    memory = device_memory(plan)  # before there is more than an engine has
    for way in others:
        warm_up(stage.use(way), ids, prompt)
    prompts: dict[str, list[Turn]] = {way: [] for way in stage.ways}
    turns: dict[str, list[Turn]] = {way: [] for way in stage.ways}
    bandwidths = [subject.memory]
    for repeat in range(repeats):
        if plan.device.type == "cpu":
            bandwidths.append(measure_memory(plan.device, 1))
        for way in stage.ways:
            taken = stage.play(way, lambda p: p.prompt(text), lambda p: p.decode(continuation))
            prompts[way].append(taken[0])
            turns[way].append(taken[1])
        say(
            f"{repeat + 1} of {repeats}: prompt {prompt / prompts[first][-1].seconds:,.1f} tokens/s, "
            f"decode {tokens / turns[first][-1].seconds:,.2f} tokens/s"
        )
    decoding = rates(tokens, turns[first])
    report = {
        "prompt": rates(prompt, prompts[first]),
        "decode": decoding,
        "memory": memory_bound(subject.model, bandwidths, decoding["tokens_per_s"]),
        "graphs": stage.graphs(),
    }
    return report | memory | (offloaded(stage, turns, tokens) if stage.cache is not None else {})


def offloaded(stage: Stage, turns: dict[str, list[Turn]], tokens: int) -> dict[str, Any]:
    """What crossed the link, and the bound that this sets. Every repeat has the same misses."""
    plan = stage.subject.plan
    moved = traffic(turns["full"][-1].counted, tokens, plan.blob_bytes)
    full, computing = (median_seconds(turns[way]) / tokens for way in ("full", "computing"))
    least = bound(moved["missed_bytes_per_token"], stage.subject.link, computing, full)
    return {"slots": list(plan.slots_per_layer), "experts": moved, "bound": least}


def warm_up(player: Player, ids: torch.Tensor, prompt: int) -> None:  # ids [1, P + 1 or more]
    """Have first calls make what later ones reuse, such as a decoder's graphs."""
    player.prompt(ids[:, : min(prompt, player.chunk)])
    player.kv.truncate(0)
    player.decode(ids[0, :2].tolist())


def memory_bound(model: Mixtral, bandwidths: list[float], tokens_per_s: float) -> dict[str, float]:
    """The speed at which each weight is read once per token, and how near decoding comes to it."""
    size = bytes_per_token(model)
    limit = statistics.median(bandwidths) / size
    return {
        "weight_bytes_per_token": size,
        "bandwidth_bytes_per_s": statistics.median(bandwidths),
        "bound_tokens_per_s": limit,
        "decode_share_of_bound": tokens_per_s / limit,
    }


def bytes_per_token(model: Mixtral) -> int:
    """Bytes of weights, as they are in memory, that decoding one token reads: one row of the embeddings, the
    chosen experts, and everything else."""
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
