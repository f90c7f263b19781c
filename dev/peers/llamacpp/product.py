"""One quantized matrix next to ggml's, called through llama.cpp's own library in the layout that it uses.

The matrices are w1's and w2's shape. Each turn multiplies the same rows with several of them, which together
are larger than a processor's caches.
"""

import argparse
from typing import Any

from dev.peers.llamacpp.models import add_side_arguments
from dev.peers.llamacpp.sides import our_side, their_side
from dev.peers.llamacpp.turns import Turns
from model.shapes import SHAPES
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

COPIES = 8  # matrices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_side_arguments(parser)
    parser.add_argument("--experts", metavar="FORMAT", default="4", help="of ours (default: 4)")
    parser.add_argument(
        "--rows", type=at_least_one, nargs="+", default=[1, 4, 16, 64], help="(default: 1 4 16 64)"
    )
    parser.add_argument("--rounds", type=at_least_one, default=15, help="(default: 15)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per shape on stderr. Returns all figures.

    Raises `MixtralError` if a side cannot do its part.
    """
    shape = SHAPES[args.shape]
    table = []
    with our_side() as ours, their_side(args.python) as theirs:
        for outputs, inputs in ((shape.ffn, shape.hidden), (shape.hidden, shape.ffn)):
            say(f"{outputs} x {inputs}")
            sizes = {"outputs": outputs, "inputs": inputs, "copies": COPIES, "threads": args.threads}
            made = (
                ours.ask("prepare", format=args.experts, **sizes),
                theirs.ask("prepare", quant=args.quant, **sizes),
            )
            for rows in args.rows:
                turns = Turns()
                for side in (ours, theirs):
                    side.ask("batch", rows=rows)
                    side.ask("product")
                for _ in range(args.rounds):
                    turns.take(ours, theirs, "product")
                times = (seconds / COPIES * 1e3 for seconds in turns.seconds())
                row = {"matrix": f"{outputs} x {inputs}", "rows": rows}
                table.append(row | dict(zip(("ours", "theirs"), times, strict=True)) | turns.compare(COPIES))
    return {
        "ours": f"{args.experts} by {made[0]['kind']}, {made[0]['bytes'] / 1e6:.1f} MB a matrix",
        "theirs": f"{args.quant} in {made[1]['kind']}, {made[1]['bytes'] / 1e6:.1f} MB a matrix",
        "threads": args.threads,
        "ms_per_product": table,
    }
