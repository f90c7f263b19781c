"""Decoding and prompts next to llama.cpp's, and how near decoding comes to what memory delivers.

A round has each prompt, from an empty KV cache, and after the first prompt some turns of decoding. Ids are
random, and neither side samples.

llama.cpp computes the experts of the last layer for a prompt's last token alone, which saves a quarter of the
experts' work with four layers, and a thirtieth in a whole Mixtral-8x7B. `equal_work` is the ratio with its
prompts' time divided by the share of multiplications that it does.
"""

import argparse
from dataclasses import replace
from typing import Any

from dev.peers.llamacpp.bandwidth import METHOD, read_bandwidth
from dev.peers.llamacpp.models import add_model_arguments, make_pair
from dev.peers.llamacpp.sides import Side, our_side, their_side
from dev.peers.llamacpp.turns import Turns
from model.config import ModelConfig
from model.shapes import SHAPES
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

TURNS = 4  # of decoding in a round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--prompts", type=at_least_one, nargs="+", default=[128, 512, 2048], help="(default: 128 512 2048)"
    )
    parser.add_argument("--tokens", type=at_least_one, default=16, help="decoded in a turn (default: 16)")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="(default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per round on stderr. Returns all figures.

    Raises `MixtralError` if a side cannot do its part.
    """
    with our_side() as ours, their_side(args.python) as theirs:
        pair = make_pair(ours, theirs, args)
        context = max(*args.prompts, args.prompts[0] + TURNS * args.tokens)
        ours.ask("load", path=str(pair.native), threads=args.threads, context=context)
        theirs.ask("load", path=str(pair.gguf), threads=args.threads, context=context)
        about = ours.ask("describe"), theirs.ask("describe", path=str(pair.gguf))
        prompts, decoding, bandwidths = take_turns(ours, theirs, args)
    rows = [compare("decode", decoding, args.tokens)]
    share = work_share(replace(SHAPES[args.shape], layers=args.layers))
    rows += [compare(f"prompt {length}", turns, length, share) for length, turns in prompts.items()]
    limit, decoded = bandwidths[args.threads], decoding.seconds()
    return {
        "model": f"{args.shape}, {args.layers} layers, random",
        "ours": f"{pair.ours}, {about[0]['dtype']}",
        "theirs": f"llama-cpp-python {about[1]['version']}, {pair.theirs}",
        "threads": args.threads,
        "tokens_per_s": rows,
        "read_bandwidth": [
            {"threads": threads, "gb_per_s": best / 1e9, "by": METHOD} for threads, best in bandwidths.items()
        ],
        "weights_of_a_token": [
            {
                "side": side,
                "mb": said["bytes_per_token"] / 1e6,
                "gb_per_s": said["bytes_per_token"] * args.tokens / seconds / 1e9,
                "share_of_bandwidth": said["bytes_per_token"] * args.tokens / seconds / limit,
            }
            for side, said, seconds in zip(("ours", "theirs"), about, decoded, strict=True)
        ],
    }


def take_turns(
    ours: Side, theirs: Side, args: argparse.Namespace
) -> tuple[dict[int, Turns], Turns, dict[int, float]]:
    """The turns of each prompt, those of decoding, and the best bandwidth by number of threads."""
    prompts, decoding = {length: Turns() for length in args.prompts}, Turns()
    bandwidths = dict.fromkeys(sorted({1, args.threads}), 0.0)
    for side in (ours, theirs):  # which makes what later turns reuse
        side.ask("prompt", tokens=args.prompts[0])
        side.ask("decode", tokens=2)
    for number in range(args.rounds):
        for length, turns in prompts.items():
            turns.take(ours, theirs, "prompt", tokens=length)
            if length == args.prompts[0]:
                for _ in range(TURNS):
                    decoding.take(ours, theirs, "decode", tokens=args.tokens)
        bandwidths = {threads: max(best, read_bandwidth(threads)) for threads, best in bandwidths.items()}
        ratio = decoding.compare(args.tokens)["ratio"]
        say(f"{number + 1} of {args.rounds}: decoding {ratio:.2f} times as fast as llama.cpp")
    return prompts, decoding, bandwidths


def compare(work: str, turns: Turns, tokens: int, share: float = 1.0) -> dict[str, Any]:
    """A row of the report; `share` is that of the multiplications which the peer does."""
    (ours, theirs), compared = turns.seconds(), turns.compare(tokens)
    speeds = {"work": work, "ours": tokens / ours, "theirs": tokens / theirs}
    return speeds | compared | {"equal_work": compared["ratio"] / share}


def work_share(shape: ModelConfig) -> float:
    """The share of a prompt's multiplications by weights that is left without the last layer's experts.

    Of one layer that is the share of attention.
    """
    heads = 2 * (shape.heads + shape.kv_heads)  # of q and output, and of k and v
    attention = shape.hidden * heads * shape.head_dim
    experts = 3 * shape.hidden * shape.ffn * shape.experts_per_token
    return 1 - experts / (shape.layers * (attention + experts))
