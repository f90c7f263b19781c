"""Measurements that the project's own choices rest on, one per subcommand:

    python -m dev.bench load MODEL | --bytes 2GB    seconds to load and to the first token, and peak memory
    python -m dev.bench memory [MODEL]              a process's memory over many prompts, against the plan
    python -m dev.bench solver                      seconds per matrix, against hqq on the whole matrix
    python -m dev.bench tiers                       decoding with fewer berths in host memory than experts
    python -m dev.bench misses                      decoding with missed experts copied, computed, and both
    python -m dev.bench ranks                       layers over ranks, against one process
    python -m dev.bench sources                     memory, disk and time of quantizing each kind of model
    python -m dev.bench requantize                  errors of quantizing again what others quantized
    python -m dev.bench kv                          perplexity with keys and values in 16 bits and in 8
    python -m dev.bench quality                     size and held-out perplexity in 21 pairs of formats

The report goes to stdout, with the machine, as text or as JSON with --json.
"""

from dev.bench import kv, load, memory, misses, quality, ranks, requantize, solver, sources, tiers
from runtime.shell.command import run
from tools.bench.command import make_parser, measure

BENCHMARKS = {
    "load": load, "memory": memory, "solver": solver, "tiers": tiers, "misses": misses, "sources": sources,
    "requantize": requantize, "kv": kv, "ranks": ranks,
    "quality": quality,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    return run(lambda: measure(make_parser("dev.bench", __doc__, BENCHMARKS).parse_args(argv)))
