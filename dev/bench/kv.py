"""Held-out perplexity of the demo with keys and values in 16 bits and in 8, also where some keys are large.

Large models have a few channels of keys that are many times as large as the others, and one scale serves all
K numbers of a key. The demo has none, so they are made: in each kv head, a pair of channels that rotate
together is magnified in keys, and made smaller by the same factor in queries. With 16 bits that changes
nothing, since scores are the same.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dev.bench.quality import first_bytes
from dev.demo.corpus import standard_library
from model.mixtral import Mixtral
from runtime.engine import Engine
from runtime.options import EngineOptions
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from tools.perplexity import Score, score

CHANNEL = 3  # of the first half of a head's; it rotates with that of the other half


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--factors", type=at_least_one, nargs="+", default=[1, 4, 16, 64], metavar="F",
        help="of the magnified channels; 1 leaves the demo as it is (default: 1 4 16 64)",
    )  # fmt: skip
    parser.add_argument(
        "--bytes", type=at_least_one, metavar="N", help="of the text, the first N (default: all)"
    )
    parser.add_argument("--threads", type=at_least_one, metavar="N", help="(default: as an engine has)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all, with a line for each factor on stderr."""
    texts = first_bytes([text for text in standard_library().held_out if text], args.bytes)
    report = {}
    for factor in args.factors:
        wide, coded = (judge(bits, factor, texts, args.threads) for bits in (16, 8))
        change = coded.perplexity / wide.perplexity - 1
        report[str(factor)] = {"16": wide.as_dict(), "8": coded.as_dict(), "change": change}
        perplexities = f"perplexity {wide.perplexity:.4f}, {coded.perplexity:.4f} in 8 bits"
        say(f"{factor} times: {perplexities} ({change:+.3%})")
    return {"text_bytes": sum(len(text.encode()) for text in texts), "by_factor": report}


def judge(bits: int, factor: int, texts: Sequence[str], threads: int | None) -> Score:
    """How well the demo predicts the texts in float32, with channels of its keys magnified."""
    options = EngineOptions(device="cpu", dtype="float32", kv=bits)
    with Engine.load(options=replace(options, threads=threads)) as engine:
        magnify(engine.model, factor)
        window = engine.plan.context
        return sum((score(engine, text, window, window // 2) for text in texts), Score())


@torch.no_grad()
def magnify(model: Mixtral, factor: int) -> None:
    """Multiply a pair of channels of all keys, and divide the queries' by the same."""
    c = model.config
    for block in model.blocks:
        weight = block.self_attn.qkv_proj.weight
        assert isinstance(weight, torch.Tensor)
        heads = weight.view(c.heads + 2 * c.kv_heads, c.head_dim, c.hidden)
        for channel in (CHANNEL, CHANNEL + c.head_dim // 2):
            heads[: c.heads, channel] /= factor
            heads[c.heads : c.heads + c.kv_heads, channel] *= factor
