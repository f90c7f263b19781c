"""What the report says of the server, in lines."""

import statistics
from collections.abc import Mapping, Sequence

from dev.harness.serving.process import Held


def told(
    counts: Mapping[str, int],
    metrics: Mapping[str, float],
    held: Sequence[Held],
    warm: int,
    waits: Mapping[str, Sequence[float]],
) -> list[str]:
    """`counts` are those of requests. The server holds `held` after each case, and is warm after so many.
    `waits` are seconds until a first token, by what else the server does."""
    others = (
        ("whole", "came through"),
        ("cut in a text", "cut off in a text"),
        ("cut before", "cut off before it"),
        ("full", "found the queue full"),
        ("refused", "refused as they should be"),
        ("watched", "watched the experts"),
    )
    asked = f"{counts['asked']} requests: " + ", ".join(f"{counts[name]} {said}" for name, said in others)
    reused, new = metrics["reused_tokens_total"], metrics["new_tokens_total"]
    prompts = metrics["prompt_tokens_total"] + reused
    share = reused / prompts if prompts else 0.0
    lines = [asked, f"{prompts:.0f} prompt tokens, {share:.0%} found in KV caches; {new:.0f} new tokens"]
    for number in sorted({1, min(warm, len(held)), len(held)} - {0}):
        now = held[number - 1]
        lines.append(
            f"after case {number} it holds {now.memory / 2**20:.1f} MiB, {now.threads} threads, "
            f"{now.handles} handles"
        )
    for name, seconds in waits.items():
        if seconds:
            middle, worst = statistics.median(seconds), max(seconds)
            lines.append(
                f"first token of a short request {name}: median {middle:.3f} s, worst {worst:.3f} s, "
                f"{len(seconds)} times"
            )
    return lines
