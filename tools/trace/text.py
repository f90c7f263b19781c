"""A summary as tables."""

from typing import Any

from runtime.units import format_bytes
from tools.text import table
from tools.trace.statistics import replayed

CHANNELS = {
    "to_slots": "host memory to slots",
    "written_back": "slots to host memory",
    "read": "files to host memory",
}
AGREES = {
    True: "A simulation of this policy gives the same hits, misses and victims, one by one.",
    False: "warning: a simulation of this policy gives other hits, misses or victims.",
}


def as_text(report: dict[str, Any]) -> str:
    """The report of `tools.trace.statistics.summarize`, for people."""
    steps = "decode steps" if report["steps"]["decode"] else "prefill steps"
    sections = [
        about(report),
        recorded(report),
        f"Hit ratio by layer, {steps}\n{by_layer(report)}",
        f"Hit ratio by slots per layer, {steps} of the same trace replayed\n{by_slots(report)}",
    ]
    if report["recall"]:
        sections.append(f"Recall of the lookahead gate by guesses, {steps}\n{by_guesses(report)}")
    if report["tiers"]:
        sections.append(tiers(report))
    return "\n\n".join([*sections, costs(report)])


def about(report: dict[str, Any]) -> str:
    trace, steps = report["trace"], report["steps"]
    slots = " or ".join(map(str, sorted(set(trace["slots"]))))
    return (
        f"{trace['layers']} layers of {trace['experts']} experts, {trace['experts_per_token']} per token; "
        f"{slots} slots per layer, {trace['spares']} spare; policy {trace['policy']}\n"
        f"{steps['prefill']} prefill steps of {steps['prefill_tokens']} tokens in all, "
        f"{steps['decode']} decode steps"
    )


def recorded(report: dict[str, Any]) -> str:
    rows = []
    for name in ("decode", "prefill", "all"):
        row = report["recorded"][name]
        counts = {"hits": str(row["hits"]), "misses": str(row["misses"])}
        rows.append({"steps": name} | counts | {"ratio": share(row["hit_ratio"])})
    unknown = f"The policy {report['trace']['policy']} is not one that can be simulated here."
    verdict = AGREES.get(report["replay_agrees"], unknown)
    return f"Hit ratio as recorded\n{table(rows, '  ')}\n{verdict}"


def by_layer(report: dict[str, Any]) -> str:
    layers = zip(report["trace"]["slots"], report["recorded"]["by_layer"], strict=True)
    rows = [{"layer": n, "slots": slots, "ratio": share(hits)} for n, (slots, hits) in enumerate(layers)]
    return table(rows, "  ")


def by_slots(report: dict[str, Any]) -> str:
    ratios = report["replay"].items()
    rows = [
        {"slots": slots} | {name: share(by_slots[slots - 1]) for name, by_slots in ratios}
        for slots in sorted(replayed(report["trace"]["experts"]))
    ]
    return table(rows, "  ")


def by_guesses(report: dict[str, Any]) -> str:
    recalls = report["recall"]
    rows = [
        {"guesses": n + 1}
        | {f"{distance} ahead": share(r[n] if n < len(r) else None) for distance, r in recalls.items()}
        for n in range(max(map(len, recalls.values())))
    ]
    return table(rows, "  ")


def costs(report: dict[str, Any]) -> str:
    guesses, moved, seconds = report["guesses"], report["bytes"], report["seconds"]
    placed = f"{format_bytes(moved['placed'])} of what the host computed, " if moved["placed"] else ""
    return (
        f"guesses  {guesses['issued']} issued, {guesses['used']} used, {guesses['wasted']} wasted\n"
        f"copied   {format_bytes(moved['demand'])} on demand, {placed}"
        f"{format_bytes(moved['guess'])} for guesses, of which {format_bytes(moved['wasted'])} wasted\n"
        f"time     {seconds['copying']:.3f} s copying, {seconds['stalled']:.3f} s waiting for copies"
    )


def tiers(report: dict[str, Any]) -> str:
    trace, found, misses = report["trace"], report["tiers"], report["tiers"]["misses"]
    every = trace["layers"] * trace["experts"]
    rows = [
        {"from, to": CHANNELS[name], "experts": moved["experts"], "bytes": format_bytes(moved["bytes"])}
        | {"seconds busy": f"{moved['seconds']:.3f}"}
        for name, moved in found["channels"].items()
    ]
    verdict = {
        True: "A simulation of host memory gives the same sources and drops, one by one.",
        False: "warning: a simulation of host memory gives other sources or drops.",
    }.get(found["agrees"], "The policy is not one that can be simulated here.")
    return (
        f"Tiers: {sum(trace['slots'])} slots, {trace['berths']} berths for {every} experts\n"
        f"{table(rows, '  ')}\n"
        f"misses   {misses['host']} were in host memory, {misses['file']} only in files, the host computed "
        f"{misses['compute']}\n"
        f"read     {found['channels']['read']['experts']}, of which {found['read_for_guesses']} for guesses\n"
        f"dropped  {found['drops']} from host memory\n{verdict}"
    )


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
