"""What quantizing again costs, after another program has quantized: relative errors on a random matrix.

The matrix is normal, and so are a model's nearly. `lost` is the error of the other program's weights against
the original ones. For each of our formats, `added` is the error of quantizing these again, which
`tools.quantize` reports, and `all` that of the result against the original. `direct` is what the format costs
without a detour.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from model.quant.solve import quantize
from model.quant.spec import QuantSpec
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

FORMATS = ("8", "4", "3g128", "2g64")
DEVIATION = 0.02  # of a Mixtral's weights


def by_hqq(bits: int, group: int, axis: int) -> Callable[[Tensor], Tensor]:
    """hqq's quantizer."""

    def apply(weight: Tensor) -> Tensor:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight.clone()
        return HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu").dequantize().float()

    return apply


def by_gguf(name: str) -> Callable[[Tensor], Tensor]:
    """The package gguf's quantizer."""

    def apply(weight: Tensor) -> Tensor:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[name]
        return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))

    return apply


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "GGUF Q8_0": by_gguf("Q8_0"),
    "GGUF Q4_0": by_gguf("Q4_0"),
    "hqq 4g64": by_hqq(4, 64, 1),
    "hqq 2g16": by_hqq(2, 16, 1),
    "hqq 4g64 along outputs": by_hqq(4, 64, 0),  # mixtral-offloading's attention, but for rounded scales
    "hqq 2g16 along outputs": by_hqq(2, 16, 0),  # and its experts
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=at_least_one, default=1024, help="(default: 1024)")
    parser.add_argument("--columns", type=at_least_one, default=4096, help="(default: 4096)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="(default: 1)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line for each program on stderr. Returns all figures."""
    weight = torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0)) * DEVIATION
    with ThreadPoolExecutor(args.threads) as pool:
        direct = {text: error(weight, ours(weight, text, pool)) for text in FORMATS}
        rows = {}
        for name, program in PROGRAMS.items():
            theirs = program(weight)
            rows[name] = row = {"lost": error(weight, theirs)}
            for text in FORMATS:
                again = ours(theirs, text, pool)
                row |= {f"added by {text}": error(theirs, again), f"all with {text}": error(weight, again)}
            say(f"{name}: {row}")
    return {"direct": direct, "programs": rows}


def ours(weight: Tensor, text: str, pool: ThreadPoolExecutor) -> Tensor:
    made, _ = quantize(weight, QuantSpec.parse(text), "weight", pool)
    return made.dequantize(torch.float32)


def error(weight: Tensor, other: Tensor) -> float:
    """The relative error of other weights."""
    return float((weight - other).norm() / weight.norm())
