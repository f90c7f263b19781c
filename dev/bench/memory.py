"""Whether memory stays level over many prompts of different lengths: resident memory against the plan.

Each dtype is measured twice, with all experts resident and with experts offloaded, each time in a process of
its own. Prompts are random ids of 1 to --longest tokens, each followed by two new tokens. Figures are in
bytes. `grown` is the peak as a share above the size after the tenth prompt. `planned` is what the plan says,
and `taken` is the peak less the size before loading. For a small model, most of `taken` is the libraries' own
code, which counts as memory when it is first used.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dev.bench.load import resident
from runtime.engine import DEMO, Engine
from runtime.errors import DeviceError
from runtime.options import EngineOptions, SamplingParams
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say

SETTLED = 10  # prompts, after which memory should not grow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?", default=DEMO, help="folder (default: the demo model)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: these two)")
    parser.add_argument("--prompts", type=at_least_one, default=1000, help="(default: 1000)")
    parser.add_argument("--longest", type=at_least_one, default=600, help="tokens (default: 600)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="(default: 1)")
    parser.add_argument("--offload", choices=("never", "always"), help="only so (default: both)")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per combination on stderr. Returns all figures.

    Raises `DeviceError` where the system does not tell resident memory.
    """
    if args.in_process:
        return measure(args, args.dtypes[0], args.offload)
    rows = {}
    for dtype in args.dtypes:
        for offload in [args.offload] if args.offload else ["never", "always"]:
            words = [sys.executable, "-m", "dev.bench", "memory", str(args.model), "--in-process", "--json"]
            words += ["--dtypes", dtype, "--offload", offload, "--prompts", str(args.prompts)]
            words += ["--longest", str(args.longest), "--threads", str(args.threads)]
            row = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
            rows[f"{dtype}, {row['experts']}"] = row
            say(describe(row))
    return {"rows": rows}


def measure(args: argparse.Namespace, dtype: str, offload: str) -> dict[str, Any]:
    """One dtype, and one way of holding experts, in this process."""
    options = EngineOptions(
        device="cpu", dtype=dtype, offload=offload, threads=torch.get_num_threads(), context=args.longest + 8
    )
    before = resident_bytes()
    with Engine.load(args.model, options) as engine:
        loaded = resident_bytes()
        sizes = sizes_over_prompts(engine, args.prompts, args.longest)
        plan = engine.plan
        settled = sizes[min(SETTLED, len(sizes)) - 1]
        return {
            "dtype": dtype,
            "experts": "resident" if plan.resident else "offloaded",
            "prompts": len(sizes),
            "loaded": loaded,
            "settled": settled,
            "most": max(sizes),
            "end": sizes[-1],
            "grown": max(sizes[SETTLED - 1 :], default=settled) / settled - 1,
            "planned": plan.device_bytes + plan.arena_bytes,
            "taken": max(sizes) - before,
        }


def sizes_over_prompts(engine: Engine, prompts: int, longest: int, seed: int = 0) -> list[int]:
    """Bytes of resident memory after each prompt; each has 1 to `longest` tokens."""
    chance = random.Random(seed)
    params = SamplingParams(max_new_tokens=2, temperature=0.7, seed=0, ignore_eos=True)
    last = engine.tokenizer.vocab_size - 1
    sizes = []
    for _ in range(prompts):
        ids = [chance.randint(3, last) for _ in range(chance.randint(1, longest))]
        for _ in engine.generate(ids, params):
            pass
        sizes.append(resident_bytes())
    return sizes


def resident_bytes() -> int:
    size = resident("VmRSS")
    if size is None:
        raise DeviceError("this system does not tell resident memory; Linux does")
    return size


def describe(row: dict[str, Any]) -> str:
    """A row as one line, in MiB."""
    names = ("loaded", "settled", "most", "end", "planned", "taken")
    sizes = ", ".join(f"{name} {row[name] / 2**20:.1f}" for name in names)
    about = f"{row['dtype']}, {row['experts']}, {row['prompts']} prompts"
    return f"{about}: {sizes} MiB; grown {row['grown']:.1%}"
