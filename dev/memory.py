"""Whether memory stays as it is over many prompts of different lengths: resident memory against the plan.

    python -m dev.memory --prompts 1000
    python -m dev.memory --model path/to/checkpoint --dtypes bfloat16 --longest 2000 --json

Each dtype is measured twice, with all experts resident and with experts offloaded, in a process of its own.
The prompts are random ids, of all lengths up to --longest in random order, each with two new tokens. Figures
are in bytes. `grown` is the most that there was beyond what there was after the tenth prompt. `planned` is
what the plan says, and `taken` the most that there was beyond what there was before loading: of a small model
most of that is the libraries' own code, which shows as memory when it is first used.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from runtime.engine import DEMO, Engine
from runtime.options import EngineOptions, SamplingParams

SETTLED = 10  # prompts, after which nothing should come


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.one:
        print(json.dumps(measure(args)))
        return 0
    for dtype in args.dtypes:
        for offload in ("never", "always"):
            words = [sys.executable, "-m", "dev.memory", "--one", "--dtypes", dtype, "--offload", offload]
            words += ["--model", str(args.model), "--prompts", str(args.prompts)]
            words += ["--longest", str(args.longest), "--threads", str(args.threads)]
            row = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
            print(json.dumps(row) if args.json else as_text(row), flush=True)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dev.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, default=DEMO, help="folder (default: the demo model)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: these two)")
    parser.add_argument("--prompts", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--longest", type=int, default=600, help="tokens of a prompt (default: 600)")
    parser.add_argument("--threads", type=int, default=1, help="(default: 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--offload", default="never", help=argparse.SUPPRESS)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One dtype, one way of holding experts, in this process."""
    [dtype] = args.dtypes
    options = EngineOptions(
        device="cpu", dtype=dtype, offload=args.offload, threads=args.threads, context=args.longest + 8
    )
    before = resident_bytes()
    with Engine.load(args.model, options) as engine:
        loaded = resident_bytes()
        sizes = resident_memory_over_prompts(engine, args.prompts, args.longest)
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
            "planned": plan.device_total + plan.arena,
            "taken": max(sizes) - before,
        }


def resident_memory_over_prompts(engine: Engine, prompts: int, longest: int, seed: int = 0) -> list[int]:
    """Bytes of resident memory after each of so many prompts, of 1 to `longest` tokens each."""
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
    """This process's resident memory; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not tell resident memory")


def as_text(row: dict[str, Any]) -> str:
    """A line of MiB."""
    names = ("loaded", "settled", "most", "end", "planned", "taken")
    sizes = ", ".join(f"{name} {row[name] / 2**20:.1f}" for name in names)
    about = f"{row['dtype']}, {row['experts']}, {row['prompts']} prompts"
    return f"{about}: {sizes} MiB; grown {row['grown']:.1%}"


if __name__ == "__main__":
    sys.exit(main())
