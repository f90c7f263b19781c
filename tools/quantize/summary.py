"""What `tools.quantize` says at its end: how large the errors are, and against what."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from model.checkpoint import open_checkpoint
from model.checkpoint.native import Shard
from tools.quantize.job import Job
from tools.quantize.journal import Errors
from tools.quantize.sources.source import Source

KINDS = {"self_attn": "attention", "experts": "experts", "lm_head": "head"}  # by a part of a matrix's name


def facts(source: Source, shards: list[Shard]) -> dict[str, Any]:
    """What the record says of a source that another program quantized: by what, and for each kind of matrix
    the bits of a weight before and now. Empty for other sources."""
    if source.lossy is None:
        return {}
    weights, before, now = Counter[str](), Counter[str](), Counter[str]()
    for parameter in (parameter for shard in shards for parameter in shard.parameters):
        if (kind := kind_of(parameter.name)) and parameter.spec.quantized:
            weights[kind] += parameter.weights
            before[kind] += 8 * source.size(parameter.name)
            now[kind] += 8 * sum(tensor.bytes for tensor in parameter.tensors)
    bits = {
        kind: {"before": before[kind] / count, "now": now[kind] / count} for kind, count in weights.items()
    }
    return {"lossy": source.lossy, "bits": bits}


def kind_of(name: str) -> str | None:
    """The kind of a matrix, which is a flag of the command; None for what is never quantized.

    >>> kind_of("layers.0.block_sparse_moe.experts.3.w2.weight"), kind_of("norm.weight")
    ('experts', None)
    """
    return next((KINDS[part] for part in name.split(".") if part in KINDS), None)


def summary(job: Job, record: Mapping[str, Any]) -> str:
    """What was made from what, what the errors are measured against, and a line for each kind of matrix."""
    lines = [f"{job.out}: {open_checkpoint(job.out).description}, from {job.source}"]
    if lossy := record.get("lossy"):
        lines.append(f"the source is lossy: {lossy}; errors are against its weights, not the original ones")
    lines += error_lines(record["errors"])
    lines += [
        f"{kind}: {bits['before']:.2f} bits a weight before and {bits['now']:.2f} now, so quantizing again "
        "adds these errors and saves nothing"
        for kind, bits in record.get("bits", {}).items()
        if bits["now"] >= bits["before"]
    ]
    return "\n".join(lines)


def error_lines(errors: Errors) -> Iterator[str]:
    """A line for each kind of matrix, such as `experts.w13`: the mean error, and the worst one with its
    name."""
    kinds: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        kind = ".".join([part for part in name.split(".") if not part.isdecimal()][-2:])
        kinds.setdefault(kind, {})[name] = error
    for kind, by_name in kinds.items():
        worst = max(by_name, key=by_name.__getitem__)
        mean = statistics.fmean(by_name.values())
        yield f"{kind}: relative error {mean:.4f} on average, {by_name[worst]:.4f} at worst in {worst}"
