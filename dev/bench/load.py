"""Loading a checkpoint: seconds per GB, and memory at the peak over the memory of the model.

Each measurement is a process of its own, so that it reuses no memory. It is taken with the files in the page
cache, and from the disk where the system can drop files from the page cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dev.bench.random_checkpoint import random_checkpoint, shape_of_size
from model.checkpoint.files import weight_files
from model.checkpoint.load import open_checkpoint
from model.mixtral import Mixtral
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from runtime.units import parse_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", type=Path, nargs="?", help="a checkpoint folder")
    source.add_argument(
        "--bytes", help="make a random checkpoint of about this size, like 2GB, and load that"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the model in memory (default: as stored)")
    parser.add_argument(
        "--runs",
        type=at_least_one,
        default=3,
        help="per measurement; the fastest counts (default: 3)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per measurement on stderr. Returns all figures."""
    if args.bytes is None:
        return measure_all(args.model, args.dtype, args.runs)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        random_checkpoint(shape_of_size(parse_bytes(args.bytes)), Path(folder))
        return measure_all(Path(folder), args.dtype, args.runs)


def measure_all(folder: Path, dtype: str | None, runs: int) -> dict[str, Any]:
    checkpoint = open_checkpoint(folder)
    report: dict[str, Any] = {"checkpoint": checkpoint.description}
    measure(folder, dtype)  # into the page cache
    for state in ("warm", "cold"):
        if state == "cold" and not hasattr(os, "posix_fadvise"):
            continue
        results = []
        for _ in range(runs):
            if state == "cold":
                drop_from_page_cache(folder)
            results.append(measure(folder, dtype))
        best = min(results, key=lambda result: result["seconds"])
        report[state] = best | {"seconds_per_gb": best["seconds"] / (checkpoint.bytes / 1e9)}
        say(f"{state}: {describe(report[state])}")
    return report


def describe(result: dict[str, float]) -> str:
    """One measurement in a line."""
    text = f"{result['seconds_per_gb']:.3f} s/GB ({result['seconds']:.2f} s)"
    text += f", and {result['construct_seconds']:.2f} s to make the model"
    if "peak_bytes" in result:
        peak, model = result["peak_bytes"], result["model_bytes"]
        over = peak - model
        text += f"; peak {peak / 1e6:,.1f} MB, {over / 1e6:,.1f} MB ({over / model:.1%}) over the model"
    return text


def drop_from_page_cache(folder: Path) -> None:
    """Ask the system to drop the weights, so that the next read is from the disk or its own cache."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, dtype: str | None) -> dict[str, float]:
    """One load in a fresh process."""
    command = [sys.executable, "-m", "dev.bench.load", str(folder), *([dtype] if dtype else [])]
    result: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def load_once(folder: Path, dtype: torch.dtype | None) -> dict[str, float]:
    """Seconds to check and read a checkpoint, seconds to make the model that it fills, and the peak of memory
    for all of it (Linux only)."""
    baseline = resident("VmRSS")
    start = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    opened = time.perf_counter()
    model = Mixtral(checkpoint.config, dtype or checkpoint.dtype)
    constructed = time.perf_counter()
    checkpoint.load(model)
    result: dict[str, float] = {
        "seconds": opened - start + time.perf_counter() - constructed,
        "construct_seconds": constructed - opened,
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
    peak = resident("VmHWM")
    return result if peak is None or baseline is None else result | {"peak_bytes": peak - baseline}


def resident(field: str) -> int | None:
    """Bytes of this process in memory, now (VmRSS) or at the peak (VmHWM). None without a /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":  # the process that `measure` starts
    print(json.dumps(load_once(Path(sys.argv[1]), DTYPES[sys.argv[2]] if len(sys.argv) > 2 else None)))
