"""Use a server on the demo model as many clients do, and badly, and check what becomes of it.

    python -m dev.soak --requests 2000

A third of the requests is cut off. Some clients have wrong keys, send broken bodies or read slowly, and there
are more of them than the queue has room for. Every text has to be what the same request gives alone, and
memory, threads and open files must not grow. Then it measures how long a short request waits while long
prompts run.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time

from dev.soak.client import Client, Report, soak
from dev.soak.known import write_alone
from dev.soak.process import Held, figure, serving
from runtime import Engine, EngineOptions
from runtime.errors import MixtralError
from runtime.shell.arguments import at_least_one, new_parser
from runtime.shell.command import put, run
from runtime.units import format_bytes

SECRET = "sesame"
WORDS = ("--device", "cpu", "--context", "1024", "--parallel", "4", "--queue", "4")
KNOWN = 60
WARM = 300  # requests after which nothing may grow any more
GROWTH = 16 << 20  # bytes that an allocator may still take


def main(argv: list[str] | None = None) -> int:
    return run(lambda: check(argv))


def check(argv: list[str] | None) -> None:
    parser = new_parser("dev.soak", __doc__)
    for name, default in (("--requests", 2000), ("--clients", 12), ("--seed", 1)):
        parser.add_argument(
            name, type=at_least_one, default=default, metavar="N", help="default: %(default)s"
        )
    args = parser.parse_args(argv)
    with Engine.load(None, EngineOptions(device="cpu", context=1024)) as engine:
        known = write_alone(engine, KNOWN, args.seed)
    with serving(WORDS, SECRET) as (process, port):
        warm = soak(port, SECRET, known, min(WARM, args.requests), args.clients, args.seed)
        before, began = settled(process.pid, port), time.perf_counter()
        report = soak(port, SECRET, known, args.requests, args.clients, args.seed + 1000)
        seconds, after = time.perf_counter() - began, settled(process.pid, port)
        report.faults[:0] = warm.faults
        put(described(report, args.requests, seconds, before, after))
        put(waiting(port))
    if report.faults or after.memory - before.memory > GROWTH or after.threads > before.threads:
        raise MixtralError("the server is not as it should be")
    if after.files > before.files:
        raise MixtralError(f"{after.files - before.files} files stayed open")


def settled(process: int, port: int) -> Held:
    """What the server holds once it has nothing to do and its connections are closed."""
    end = time.monotonic() + 60
    while figure(port, SECRET, "mixtral_requests_running") + figure(port, SECRET, "mixtral_requests_queued"):
        if time.monotonic() > end:
            raise MixtralError("requests are still under way after a minute")
        time.sleep(0.1)
    time.sleep(1)
    return Held.of(process)


def described(report: Report, requests: int, seconds: float, before: Held, after: Held) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.outcomes.items()))
    lines = [f"{requests} requests in {seconds:.1f} s: {kinds}", *report.faults[:10]]
    lines[0] += f"; {report.full} times no place; {len(report.faults)} faults"
    lines.append(
        f"memory {format_bytes(before.memory)} and then {format_bytes(after.memory)}, "
        f"threads {before.threads} and {after.threads}, files {before.files} and {after.files}"
    )
    return "\n".join(lines) + "\n"


def waiting(port: int, times: int = 20) -> str:
    """How long a short request waits for its first token, alone and while two long prompts are computed."""
    client = Client(port, SECRET, (), Report(), random.Random(0))

    def ask(prompt: str) -> float:
        began = time.perf_counter()
        client.ask(json.dumps({"prompt": prompt, "max_tokens": 1, "cache_prompt": False}).encode(), SECRET)
        return time.perf_counter() - began

    alone = [ask("x") for _ in range(times)]
    long = [ask("x = [1, 2, 3]\n" * 80) for _ in range(3)]
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            ask("x = [1, 2, 3]\n" * 80)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    beside = [ask("x") for _ in range(times)]
    stop.set()
    for thread in threads:
        thread.join()
    middle, most = statistics.median(beside), max(beside)
    return (
        f"first token of a short request: {statistics.median(alone):.3f} s alone; {middle:.3f} s, at most "
        f"{most:.3f} s, while two long prompts are computed, of {statistics.median(long):.3f} s each\n"
    )
