"""What every benchmark of a model reports beside its speed: what crossed the link, how fast that could have
been, and what the device's memory came to."""

from typing import Any

import torch

from runtime.planning.planner import Plan
from runtime.stats import Stats


def traffic(counted: Stats, tokens: int, blob: int) -> dict[str, float]:
    """Of the experts, per decoded token; blobs of so many bytes.

    >>> counted = Stats(hits=6, misses=2, used_guesses=1, recalled=3, recallable=4, copied_bytes=30, wasted_bytes=10)
    >>> figures = traffic(counted, tokens=4, blob=10)
    >>> figures["hit_ratio"], figures["missed_bytes_per_token"], figures["copied_bytes_per_token"]
    (0.75, 5.0, 7.5)
    >>> figures["lookahead_recall"], figures["wasted_share_of_bytes"]
    (0.75, 0.3333333333333333)
    """  # noqa: E501
    return {
        "hit_ratio": counted.hits / max(counted.hits + counted.misses, 1),
        "misses_per_token": counted.misses / tokens,
        "missed_bytes_per_token": counted.misses / tokens * blob,
        "copied_bytes_per_token": counted.copied_bytes / tokens,
        "wasted_bytes_per_token": counted.wasted_bytes / tokens,
        "wasted_share_of_bytes": counted.wasted_bytes / max(counted.copied_bytes, 1),
        "lookahead_recall": counted.recalled / max(counted.recallable, 1),
        "misses_guessed": counted.used_guesses / max(counted.misses, 1),
        "stall_ms_per_token": counted.stall_seconds / tokens * 1e3,
    }


def bound(missed_bytes: float, link: float, computing: float) -> dict[str, float]:
    """What a token, or a prompt, takes at least: the misses' bytes over the link, or computing alone, in
    seconds.

    >>> bound(3e9, link=1e9, computing=2.0)["bound_ms"], bound(1e9, link=1e9, computing=2.0)["bound_ms"]
    (3000.0, 2000.0)
    """
    copying = missed_bytes / link
    return {
        "computing_ms": computing * 1e3,
        "copying_ms": copying * 1e3,
        "bound_ms": max(computing, copying) * 1e3,
    }


def device_memory(plan: Plan, device: torch.device) -> dict[str, Any]:
    """The most that PyTorch took of a GPU since the last measurement, beside the plan; nothing on a CPU.

    What is no tensor (the driver's context, kernels, graphs) is told by the difference between what the
    device lacks and what PyTorch holds: other programs' memory is part of it.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peak, other = torch.cuda.max_memory_reserved(device), total - free - torch.cuda.memory_reserved(device)
    report = {
        "peak_reserved_bytes": peak,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "outside_pytorch_bytes": other,
        "planned_bytes": plan.device_bytes,
        "planned_driver_bytes": plan.driver_bytes,
        "peak_over_plan": (peak + other) / plan.device_bytes,
        "peak_reserved_over_plan": peak / (plan.device_bytes - plan.driver_bytes),
    }
    return {"device_memory": report}
