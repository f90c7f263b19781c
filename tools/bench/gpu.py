"""All that is to be measured on a GPU, within minutes, and the tables of it: the link, decoding with all
experts resident and with few slots, the ladder, a long prompt, peak memory under a limit, and the same shape
by Transformers with accelerate.

Each part is a process of its own. What a part prints goes to DIR/<part>.json and DIR/<part>.log when it is
done, and DIR/tables.md is written anew: whatever ends the run, the parts before it are there. A part that
fails, or takes longer than its share of the time, is a line in the tables and stops no other.

Without a GPU everything but the last two runs at reduced size, to be tested: --shape quarter --layers 2.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.shapes import SHAPES
from runtime.errors import DeviceError
from runtime.planning.device import find_device
from runtime.shell.arguments import at_least_one
from tools.bench.tables import tables

ROOT = Path(__file__).resolve().parent.parent.parent  # where `python -m dev...` finds its module
FULL = ("mixtral-8x7b", "mixtral-8x22b")
SECONDS = 460.0  # for all parts
LEAST = 5.0  # seconds, less than which no part is begun with
LIMITS = ("12GiB", "16GiB")


@dataclass(frozen=True)
class Part:
    """A command that prints JSON, and how many seconds it may take."""

    name: str
    words: tuple[str, ...]  # behind `python -m`
    seconds: float
    needs: str | None = None  # why it cannot be run here


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and in a line why that is not all; None if it is."""

    out: str
    log: str
    error: str | None = None


Runner = Callable[[tuple[str, ...], float], Outcome]  # (words behind `python -m`, seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results")
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b", help="(default: mixtral-8x7b)")
    parser.add_argument("--layers", type=at_least_one, help="(default: the shape's)")
    parser.add_argument("--tokens", type=at_least_one, default=32, help="to decode per turn (default: 32)")
    parser.add_argument(
        "--prompt", type=at_least_one, default=2048, help="of the long prompt (default: 2048)"
    )
    parser.add_argument("--device", help="(default: cuda if there is one)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for all parts (default: {SECONDS:.0f})"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all parts, printing a line for each on stderr. Returns what became of each.

    Raises `DeviceError` if there is no GPU and the size is not reduced.
    """
    return run_parts(args, run_process)


def run_parts(args: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    on_gpu = find_device(args.device).type == "cuda"  # whose memory is its parts' alone
    if not on_gpu and args.shape in FULL and args.layers is None:
        raise DeviceError(
            "there is no GPU here to measure; at reduced size most of this runs on a CPU, which tests it and "
            "no more: --shape quarter --layers 2"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    start, results = time.perf_counter(), {}
    for part in parts(args, on_gpu):
        left = args.seconds - (time.perf_counter() - start)
        results[part.name] = result = run_part(part, left, runner, args.out)
        (args.out / f"{part.name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (args.out / "tables.md").write_text(tables(results))
        print(f"{part.name}: {result['seconds']:.1f} of at most {min(part.seconds, max(left, 0)):.0f} s: "
              f"{result.get('error', 'done')}", file=sys.stderr)  # fmt: skip
    return {
        "out": str(args.out),
        "seconds": time.perf_counter() - start,
        "parts": {name: result.get("error", "done") for name, result in results.items()},
    }


def run_part(part: Part, left: float, runner: Runner, out: Path) -> dict[str, Any]:
    """Its report, or an "error"; in both cases the "command", the "seconds" that it took, and of what it
    warned: of graphs that cannot be made, or memory that is not locked, without which figures mislead."""
    about: dict[str, Any] = {"command": " ".join(("python -m", *part.words)), "seconds": 0.0}
    if part.needs:
        return about | {"error": f"not run: {part.needs}"}
    if left < LEAST:
        return about | {"error": "not run: out of time"}
    start = time.perf_counter()
    try:
        outcome = runner(part.words, min(part.seconds, left))
        (out / f"{part.name}.log").write_text(outcome.log)
        about["warnings"] = warnings_in(outcome.log)
        report = {"error": outcome.error} if outcome.error else {"report": json.loads(outcome.out)}
    except Exception as error:  # whatever it is, it is this part's
        report = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return about | {"seconds": time.perf_counter() - start} | report


def run_process(words: tuple[str, ...], seconds: float) -> Outcome:
    """`python -m` with these words, which is killed when its time is over."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        log = (error.stderr or b"").decode(errors="replace")
        return Outcome("", log, f"not done within {seconds:.0f} s{last_line(log)}")
    if done.returncode != 0:
        return Outcome(done.stdout, done.stderr, f"failed ({done.returncode}){last_line(done.stderr)}")
    return Outcome(done.stdout, done.stderr)


def warnings_in(log: str) -> list[str]:
    """Each that this project gives, once.

    >>> warnings_in("x.py:7: RuntimeWarning: too slow\\n  it()\\nx.py:7: RuntimeWarning: too slow\\n")
    ['too slow']
    """
    return list(dict.fromkeys(re.findall(r"\bRuntimeWarning: (.*)", log)))


def last_line(log: str) -> str:
    """The last that names an error, since some have advice behind them; or else the last.

    >>> last_line("one\\n\\n  two\\n"), last_line("")
    (': two', '')
    >>> last_line("torch.AcceleratorError: CUDA error: an illegal access\\nCompile with this and that")
    ': torch.AcceleratorError: CUDA error: an illegal access'
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error:|[\w.]*(Error|Exception|Interrupt)\b", line)]
    return f": {(errors or lines)[-1][:300]}" if lines else ""


def parts(args: argparse.Namespace, on_gpu: bool) -> list[Part]:
    """In the order in which they are worth having, should time run out."""
    device = ("--device", args.device) if args.device else ()
    layers = ("--layers", str(args.layers)) if args.layers else ()
    shape = ("--shape", args.shape, *layers, *device)
    few = SHAPES[args.shape].experts
    slots = [n for n in (4, 2, 3, 6, 5, 7) if SHAPES[args.shape].experts_per_token <= n < few] or [few]
    sweep, middle = ",".join(map(str, slots)), str(slots[0])

    def bench(*words: str) -> tuple[str, ...]:
        return ("tools.bench", *words, "--json")

    def resident(experts: str, seconds: float) -> Part:
        tokens = ("--prompt", "128", "--tokens", str(4 * args.tokens), "--repeats", "3")
        words = bench(
            "decode", *shape, "--attention", "4", "--experts", experts, "--offload", "never", *tokens
        )
        return Part(f"decode-{experts}", words, seconds)

    def limited(vram: str) -> Part:
        tokens = ("--prompt", str(args.prompt), "--tokens", str(args.tokens), "--repeats", "1")
        words = bench("decode", *shape, "--vram", vram, "--enforce", "--routing", "synthetic", *tokens)
        return Part(f"memory-{vram}", words, 60, None if on_gpu else "a CPU's memory has no limit to keep")

    modes, budget = ("--modes", "full", "--repeats", "2"), 150.0
    turns = ("--tokens", str(args.tokens), "--routing", "synthetic,own", "--seconds", str(budget - 25))
    brief = ("--tokens", str(max(args.tokens // 4, 1)), "--repeats", "2", "--routing", "synthetic")
    return [
        Part("link", bench("link", *device, "--repeats", "3"), 60),
        resident("4", 90),
        resident("2g64", 60),
        Part("offload", bench("offload", *shape, "--sweep", sweep, *modes, *turns), budget),
        Part("ladder", bench("offload", *shape, "--slots", middle, *brief), 90),
        Part("prefill", bench("prefill", *shape, "--slots", middle, "--tokens", str(args.prompt)), 60),
        limited(LIMITS[0]),
        Part("naive", naive(args.shape, device), 100, why_not_naive(on_gpu)),
        resident("3g128", 60),
        limited(LIMITS[1]),
    ]  # fmt: skip


def naive(shape: str, device: tuple[str, ...]) -> tuple[str, ...]:
    """Two layers, one of each kind, are enough for the sum that stands for all."""
    words = ("--layers", "2", "--tokens", "3", "--vram", LIMITS[0])
    return ("dev.peers.accelerate", "--shape", shape, *words, *device, "--json")


def why_not_naive(on_gpu: bool) -> str | None:
    """Why Transformers cannot be measured here: it is no dependency of the tools, and so not imported."""
    if not on_gpu:
        return "on a CPU nothing is moved"
    missing = [name for name in ("accelerate", "transformers") if importlib.util.find_spec(name) is None]
    if not (ROOT / "dev" / "peers" / "accelerate.py").exists():
        missing.append("dev/peers/accelerate.py")
    return f"{' and '.join(missing)} missing" if missing else None
