"""What every benchmark reports beside the speed of a model: the bytes that crossed the link, the time that
they need at least, and the peak of the device's memory."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from runtime.planning.plan import Plan
from runtime.stats import Stats


@dataclass(frozen=True)
class Turn:
    """How long some work took, and what happened to experts meanwhile."""

    seconds: float
    counted: Stats


def median_seconds(turns: Sequence[Turn]) -> float:
    return statistics.median(turn.seconds for turn in turns)


def rates(tokens: int, turns: Sequence[Turn]) -> dict[str, float]:
    """Median and best tokens per second of several turns of `tokens` each.

    >>> rates(10, [Turn(seconds, Stats()) for seconds in (1.0, 2.0, 5.0)])
    {'tokens': 10, 'tokens_per_s': 5.0, 'best_tokens_per_s': 10.0}
    """
    best = min(turn.seconds for turn in turns)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / median_seconds(turns),
        "best_tokens_per_s": tokens / best,
    }


def traffic(counted: Stats, tokens: int, blob: int) -> dict[str, float]:
    """What happened to experts, per decoded token. An expert is `blob` bytes.

    >>> counted = Stats(hits=6, misses=2, recalled=3, recallable=4, copied_bytes=30, wasted_bytes=10)
    >>> figures = traffic(counted, tokens=4, blob=10)
    >>> figures["hit_ratio"], figures["missed_bytes_per_token"], figures["copied_bytes_per_token"]
    (0.75, 5.0, 7.5)
    >>> figures["lookahead_recall"], figures["wasted_share_of_bytes"]
    (0.75, 0.3333333333333333)
    """
    return {
        "hit_ratio": counted.hits / max(counted.hits + counted.misses, 1),
        "misses_per_token": counted.misses / tokens,
        "computed_per_token": counted.computed / tokens,
        "missed_bytes_per_token": counted.misses / tokens * blob,
        "copied_bytes_per_token": counted.copied_bytes / tokens,
        "wasted_share_of_bytes": counted.wasted_bytes / max(counted.copied_bytes, 1),
        "lookahead_recall": counted.recalled / max(counted.recallable, 1),
        "stall_ms_per_token": counted.stall_seconds / tokens * 1e3,
    }


def bound(missed_bytes: float, link: float, computing: float, taken: float | None = None) -> dict[str, float]:
    """The least time of a token or a prompt: either its missed bytes at `link` bytes per second, or
    `computing` seconds, whichever is longer; and its share of the `taken` seconds.

    >>> bound(3e9, link=1e9, computing=2.0)["bound_ms"], bound(1e9, link=1e9, computing=2.0)["bound_ms"]
    (3000.0, 2000.0)
    """
    copying = missed_bytes / link
    least = max(computing, copying)
    times = {"computing_ms": computing * 1e3, "copying_ms": copying * 1e3, "bound_ms": least * 1e3}
    return times if taken is None else times | {"share_of_bound": least / taken}


def device_memory(plan: Plan) -> dict[str, Any]:
    """The peak of PyTorch's memory on a GPU since the last measurement, beside the plan; nothing on a CPU.

    `outside_pytorch_bytes` (the driver's context, kernels, graphs) is what the device lacks beyond what
    PyTorch holds, so it includes the memory of other programs.
    """
    device = plan.device
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peak, other = torch.cuda.max_memory_reserved(device), total - free - torch.cuda.memory_reserved(device)
    report = {
        "peak_reserved_bytes": peak,
        "outside_pytorch_bytes": other,
        "planned_bytes": plan.device_bytes,
        "peak_over_plan": (peak + other) / plan.device_bytes,
    }
    return {"device_memory": report}
