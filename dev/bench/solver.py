"""Quantizing one matrix: seconds of our solver against one plain call of hqq's on the whole matrix.

Both run on all threads, in turn. Ours packs its codes, and hqq does not. Errors are relative, |W - W'| / |W|;
those of hqq are of its own result, with scales and zeros in float32.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from model.quant.solve import quantize
from model.quant.spec import QuantSpec
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

STD = 0.02  # of the random weights, about a Mixtral's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=at_least_one, default=14336, help="default: 14336")
    parser.add_argument("--columns", type=at_least_one, default=4096, help="default: 4096")
    parser.add_argument("--threads", type=at_least_one, metavar="N", help="(default: as an engine has)")
    parser.add_argument("--bits", nargs="+", default=["4", "3", "2"], help="formats, like 4 or 3g128")
    parser.add_argument(
        "--runs", type=at_least_one, default=3, help="of each; the median counts (default: 3)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per format on stderr. Returns all figures."""
    specs = [QuantSpec.parse(text) for text in args.bits]
    weight = torch.randn(args.rows, args.columns, generator=torch.Generator().manual_seed(0)) * STD
    report: dict[str, Any] = {"rows": args.rows, "columns": args.columns, "threads": torch.get_num_threads()}
    for spec in specs:
        report[str(spec)] = result = compare(weight, spec, args.runs)
        say(
            f"{spec}: {result['seconds']:.2f} s, hqq {result['hqq_seconds']:.2f} s, "
            f"{result['speedup']:.1f} times as long; "
            f"error {result['error']:.4f}, hqq {result['hqq_error']:.4f}"
        )
    return report


def compare(weight: Tensor, spec: QuantSpec, runs: int) -> dict[str, float]:
    """Median seconds of ours and hqq's, in turn, after one small call of each to warm up."""
    ours, theirs = [], []
    error = hqq_error = 0.0
    solve_by_slices(weight[:64], spec)
    solve_whole(weight[:64], spec)
    for _ in range(runs):
        start = time.perf_counter()
        error = solve_by_slices(weight, spec)
        ours.append(time.perf_counter() - start)
        seconds, hqq_error = solve_whole(weight, spec)
        theirs.append(seconds)
    seconds, hqq_seconds = statistics.median(ours), statistics.median(theirs)
    return {
        "seconds": seconds,
        "hqq_seconds": hqq_seconds,
        "speedup": hqq_seconds / seconds,
        "error": error,
        "hqq_error": hqq_error,
    }


def solve_by_slices(weight: Tensor, spec: QuantSpec) -> float:
    """The error of `quantize` with a worker per thread, as `tools.quantize` calls it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return quantize(weight, spec, pool=pool)[1]
    finally:
        torch.set_num_threads(threads)


def solve_whole(weight: Tensor, spec: QuantSpec) -> tuple[float, float]:
    """Seconds of one call of hqq's Quantizer, packing left out, and the error of its result."""
    from hqq.core.quantize import Quantizer

    start = time.perf_counter()
    codes, meta = Quantizer.quantize(
        weight, nbits=spec.bits, group_size=spec.group_size, axis=1, bitpack=False,
        compute_dtype=torch.float32, device="cpu",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    difference = ((codes - meta["zero"]) * meta["scale"]).view(weight.shape) - weight
    return seconds, float(difference.norm() / weight.norm())
