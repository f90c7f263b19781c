"""A summary as tables."""

from collections.abc import Sequence
from typing import Any

from runtime.units import format_bytes
from tools.trace.statistics import replayed


def as_text(report: dict[str, Any]) -> str:
    """What `tools.trace.statistics.summarize` found, for people."""
    trace, steps, recorded = report["trace"], report["steps"], report["recorded"]
    of = "decode steps" if steps["decode"] else "prefill steps"
    slots = sorted(set(trace["slots"]))
    parts = [
        f"{trace['layers']} layers of {trace['experts']} experts, {trace['experts_per_token']} per token; "
        f"{' or '.join(map(str, slots))} slots per layer, {trace['spares']} spare; policy {trace['policy']}",
        f"{steps['prefill']} prefill steps of {steps['prefill_tokens']} tokens in all, "
        f"{steps['decode']} decode steps",
        "",
        "Hit ratio as recorded",
        table(
            ["steps", "hits", "misses", "ratio"],
            [
                [name, recorded[name]["hits"], recorded[name]["misses"], share(recorded[name]["hit_ratio"])]
                for name in ("decode", "prefill", "all")
            ],
        ),
        {
            True: "A simulation of this policy gives the same hits, misses and victims, one by one.",
            False: "warning: a simulation of this policy gives other hits, misses or victims.",
            None: f"The policy {trace['policy']} is not one that can be simulated here.",
        }[report["replay_agrees"]],
        "",
        f"Hit ratio by layer, {of}",
        table(
            ["layer", "slots", "ratio"],
            [
                [layer, slots, share(hits)]
                for layer, (slots, hits) in enumerate(zip(trace["slots"], recorded["by_layer"], strict=True))
            ],
        ),
        "",
        f"Hit ratio by slots per layer, {of} of the same trace replayed",
        table(
            ["slots", *report["replay"]],
            [
                [slots, *map(share, ratios)]
                for slots, ratios in enumerate(zip(*report["replay"].values(), strict=True), start=1)
                if slots in replayed(trace["experts"])
            ],
        ),
        "",
    ]
    if report["recall"]:
        ahead = [f"{d} ahead" for d in report["recall"]]
        most = max(map(len, report["recall"].values()))
        rows = [
            [g + 1, *(share(r[g]) if g < len(r) else "-" for r in report["recall"].values())]
            for g in range(most)
        ]
        parts += [f"Recall of the lookahead gate by guesses, {of}", table(["guesses", *ahead], rows), ""]
    guesses, moved, seconds = report["guesses"], report["bytes"], report["seconds"]
    parts += [
        f"guesses  {guesses['issued']} issued, {guesses['used']} used, {guesses['wasted']} wasted",
        f"copied   {format_bytes(moved['demand'])} on demand, {format_bytes(moved['guess'])} for guesses, "
        f"of which {format_bytes(moved['wasted'])} wasted",
        f"time     {seconds['copying']:.3f} s copying, {seconds['stalled']:.3f} s waiting for copies",
    ]
    return "\n".join(parts)


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """
    >>> print(table(["slots", "lru"], [[1, "0.250"], [10, "1.000"]]))
      slots    lru
          1  0.250
         10  1.000
    """
    cells = [titles, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("".join(f"  {c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in cells)
