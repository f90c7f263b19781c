"""All that is to be measured on a GPU, within minutes: the link, decoding with all experts resident and with
few slots, what each part of the cache is worth, a long prompt, peak memory under a limit, and the same shape
by Transformers with accelerate.

Each part is a process of its own. When it is done, its output goes to DIR/<part>.json and DIR/<part>.log, and
DIR/results.txt is written anew, so the results of earlier parts survive. A part that fails or takes too long
says so there and does not stop the others.

Without a GPU, everything but the last two runs at a reduced size, to test the command: --shape quarter
--layers 2.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from model.shapes import SHAPES
from runtime.errors import DeviceError
from runtime.planning.device import find_device
from runtime.shell.arguments import at_least_one
from runtime.shell.command import say
from tools.text import as_text

ROOT = Path(__file__).resolve().parent.parent.parent  # where `python -m dev...` finds its module
PEER = "dev.peers.accelerate"
FULL = ("mixtral-8x7b", "mixtral-8x22b")
SECONDS = 460.0  # for all parts
LEAST = 5.0  # seconds: with less left, no part begins
LIMITS = ("12GiB", "16GiB")


@dataclass(frozen=True)
class Part:
    """A command that prints JSON, and the seconds that it may take."""

    name: str
    words: tuple[str, ...]  # after `python -m`
    seconds: float
    obstacle: str = ""  # why it cannot run here


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and why that is not all of it; "" if it is."""

    out: str
    log: str
    error: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results")
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b", help="(default: mixtral-8x7b)")
    parser.add_argument("--layers", type=at_least_one, help="(default: the shape's)")
    parser.add_argument("--tokens", type=at_least_one, default=32, help="to decode per turn (default: 32)")
    parser.add_argument(
        "--prompt", type=at_least_one, default=2048, help="tokens of the long prompt (default: 2048)"
    )
    parser.add_argument("--device", help="(default: cuda if there is one)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"for all parts (default: {SECONDS:.0f})"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run all parts, printing a line for each on stderr. Returns how each ended.

    Raises `DeviceError` if there is no GPU and the size is not reduced.
    """
    on_gpu = find_device(args.device).type == "cuda"  # found without taking any of its memory
    if not on_gpu and args.shape in FULL and args.layers is None:
        raise DeviceError(
            "there is no GPU here to measure; to test the command on a CPU, reduce the size: --shape quarter "
            "--layers 2"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    start, results = time.perf_counter(), {}
    for part in parts(args, on_gpu):
        left = args.seconds - (time.perf_counter() - start)
        results[part.name] = result = run_part(part, left, args.out)
        (args.out / f"{part.name}.json").write_text(json.dumps(result, indent=2) + "\n")
        (args.out / "results.txt").write_text("\n\n".join(starmap(describe, results.items())) + "\n")
        limit = min(part.seconds, max(left, 0))
        said = result.get("error", "done")
        say(f"{part.name}: {result['seconds']:.1f} of at most {limit:.0f} s: {said}")
    return {
        "out": str(args.out),
        "seconds": time.perf_counter() - start,
        "parts": {name: result.get("error", "done") for name, result in results.items()},
    }


def describe(name: str, result: dict[str, Any]) -> str:
    """A part as text: its command, warnings, and the report that the command prints, or why there is none."""
    warnings = [f"warning: {text}" for text in result.get("warnings", ())]
    shown = as_text(result["report"]) if "report" in result else result["error"]
    return "\n".join([f"## {name}", result["command"], *warnings, "", shown])


def run_part(part: Part, left: float, out: Path) -> dict[str, Any]:
    """A part's "report" or "error", with its "command", its "seconds" and its "warnings": a figure misleads
    where graphs could not be made or memory not be locked."""
    about: dict[str, Any] = {"command": " ".join(("python -m", *part.words)), "seconds": 0.0}
    if part.obstacle or left < LEAST:
        return about | {"error": f"not run: {part.obstacle or 'out of time'}"}
    start = time.perf_counter()
    try:
        outcome = run_process(part.words, min(part.seconds, left))
        (out / f"{part.name}.log").write_text(outcome.log)
        about["warnings"] = warnings_in(outcome.log)
        report = {"error": outcome.error} if outcome.error else {"report": json.loads(outcome.out)}
    except Exception as error:  # any failure is this part's alone
        report = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return about | {"seconds": time.perf_counter() - start} | report


def run_process(words: tuple[str, ...], seconds: float) -> Outcome:
    """Run `python -m` with these words, and kill it when its time is over."""
    command = [sys.executable, "-m", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        log = (error.stderr or b"").decode(errors="replace")
        return Outcome("", log, f"not done within {seconds:.0f} s{last_line(log)}")
    failed = f"failed ({done.returncode}){last_line(done.stderr)}" if done.returncode else ""
    return Outcome(done.stdout, done.stderr, failed)


def warnings_in(log: str) -> list[str]:
    """Each warning of this project, once.

    >>> warnings_in("x.py:7: RuntimeWarning: too slow\\n  it()\\nx.py:7: RuntimeWarning: too slow\\n")
    ['too slow']
    """
    return list(dict.fromkeys(re.findall(r"\bRuntimeWarning: (.*)", log)))


def last_line(log: str) -> str:
    """The last line that names an error, because advice may follow it; without one, the last line.

    >>> last_line("one\\n\\n  two\\n"), last_line("")
    (': two', '')
    >>> last_line("torch.AcceleratorError: CUDA error: an illegal access\\nCompile with this and that")
    ': torch.AcceleratorError: CUDA error: an illegal access'
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error:|[\w.]*(Error|Exception|Interrupt)\b", line)]
    return f": {(errors or lines)[-1][:300]}" if lines else ""


def parts(args: argparse.Namespace, on_gpu: bool) -> list[Part]:
    """All parts, the most valuable first in case time runs out."""
    config = SHAPES[args.shape]
    device = f" --device {args.device}" if args.device else ""
    shape = f"--shape {args.shape}{f' --layers {args.layers}' if args.layers else ''}{device}"
    middle, *others = [n for n in (4, 2, 3, 6, 5, 7) if config.experts_per_token <= n < config.experts]
    decode = f"--tokens {args.tokens} --repeats"

    def bench(name: str, words: str, seconds: float, obstacle: str = "") -> Part:
        return Part(name, ("tools.bench", *words.split(), "--json"), seconds, obstacle)

    def resident(experts: str, seconds: float) -> Part:
        words = f"decode {shape} --attention 4 --experts {experts} --offload never --tokens {4 * args.tokens}"
        return bench(f"decode-{experts}", f"{words} --repeats 3", seconds)

    def limited(vram: str) -> Part:
        words = f"decode {shape} --vram {vram} --enforce --prompt {args.prompt} {decode} 1"
        return bench(f"memory-{vram}", words, 60, "" if on_gpu else "a CPU's memory has no limit to keep")

    # Two layers, one resident and one offloaded, are enough for a sum that stands for all.
    peer = f"--shape {args.shape} --layers 2 --tokens 3 --vram {LIMITS[0]}{device} --json"
    return [
        bench("link", f"link{device} --repeats 3", 60),
        resident("4", 90),
        resident("2g64", 60),
        bench(f"offload-{middle}", f"offload {shape} --slots {middle} {decode} 2", 90),
        bench("prefill", f"prefill {shape} --slots {middle} --tokens {args.prompt}", 60),
        *(bench(f"offload-{n}", f"offload {shape} --slots {n} --modes full {decode} 2", 40) for n in others),
        limited(LIMITS[0]),
        Part("naive", (PEER, *peer.split()), 100, peer_obstacle(on_gpu)),
        resident("3g128", 60),
        limited(LIMITS[1]),
    ]


def peer_obstacle(on_gpu: bool) -> str:
    """Why Transformers cannot be measured here. The tools do not depend on it, so it is not imported."""
    if not on_gpu:
        return "on a CPU nothing is moved"
    missing = [name for name in ("accelerate", "transformers") if importlib.util.find_spec(name) is None]
    if not (ROOT / "dev").is_dir():  # of an installed package
        missing.append(PEER)
    return f"{' and '.join(missing)} missing" if missing else ""
