"""The statistics of a trace: hit ratios as recorded and as other policies would have had, recall of guesses,
bytes and waits.

Every step of the trace is replayed, because each leaves the cache as the next one finds it. Ratios are of
decode steps (those of one token) unless there are none: a chunk of a prompt needs most experts anyway.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from runtime.experts.trace import (
    Copy,
    Drop,
    Event,
    Guess,
    Hit,
    Miss,
    Ranking,
    Read,
    Routing,
    Stall,
    UsedGuess,
    WastedGuess,
    WriteBack,
)
from tools.trace.berths import berths_agree
from tools.trace.read import Trace
from tools.trace.replay import POLICIES, Access, optimum, replay

SOURCES = {"host": "in host memory", "file": "in a file", "compute": "computed by the host"}  # of misses
REPLAYS = 32  # numbers of slots at most; the time of each grows with the square of a step's experts


def summarize(trace: Trace) -> dict[str, Any]:
    """All statistics, as JSON has them. A ratio of nothing is null."""
    header, events = trace.header, trace.events
    layers = routing_by_layer(trace)
    seen = step_tokens(layers)
    prompt = [tokens for tokens in seen.values() if tokens > 1]
    return {
        "trace": asdict(header) | {"truncated": trace.truncated},
        "steps": {"decode": len(seen) - len(prompt), "prefill": len(prompt), "prefill_tokens": sum(prompt)},
        "recorded": recorded_ratios(trace),
        "replay_agrees": replay_agrees(trace),
        "replay": replayed_ratios(layers, header.experts, header.seed),
        "recall": recall(trace),
        "guesses": {
            "issued": count(events, Guess),
            "used": count(events, UsedGuess),
            "wasted": count(events, WastedGuess),
        },
        "bytes": {
            "demand": sum(e.bytes for e in events if isinstance(e, Copy) and e.kind == "demand"),
            "guess": sum(e.bytes for e in events if isinstance(e, Copy) and e.kind == "guess"),
            "placed": sum(e.bytes for e in events if isinstance(e, Copy) and e.kind == "placed"),
            "wasted": sum(e.bytes for e in events if isinstance(e, WastedGuess)),
        },
        "seconds": {
            "copying": sum(e.seconds for e in events if isinstance(e, Copy)),
            "stalled": sum(e.seconds for e in events if isinstance(e, Stall)),
        },
        "tiers": tiers(trace) if header.berths else None,
    }


def tiers(trace: Trace) -> dict[str, Any]:
    """What went on between slots, host memory and files, where host memory lacks some experts."""
    events = trace.events
    sources = [event.source for event in events if isinstance(event, Miss)]
    reads = [event for event in events if isinstance(event, Read)]
    moved: dict[str, Sequence[Copy | Read | WriteBack]] = {
        "to_slots": [event for event in events if isinstance(event, Copy)],
        "written_back": [event for event in events if isinstance(event, WriteBack)],
        "read": reads,
    }
    return {
        "misses": {source: sources.count(source) for source in SOURCES},
        "agrees": berths_agree(trace),
        "channels": {
            name: {
                "experts": len(copies),
                "bytes": sum(event.bytes for event in copies),
                "seconds": sum(event.seconds for event in copies),
            }
            for name, copies in moved.items()
        },
        "read_for_guesses": sum(event.kind == "guess" for event in reads),
        "drops": count(events, Drop),
    }


def count(events: list[Event], kind: type) -> int:
    return sum(isinstance(event, kind) for event in events)


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def routing_by_layer(trace: Trace) -> list[list[Routing]]:
    """The routing of each layer, step by step."""
    layers: list[list[Routing]] = [[] for _ in range(trace.header.layers)]
    for event in trace.events:
        if isinstance(event, Routing):
            layers[event.layer].append(event)
    return layers


def accesses_by_layer(trace: Trace) -> list[dict[int, list[Access]]]:
    """The recorded accesses of each layer by step, in their order."""
    layers: list[dict[int, list[Access]]] = [defaultdict(list) for _ in range(trace.header.layers)]
    for event in trace.events:
        if isinstance(event, Hit):
            layers[event.layer][event.step].append(Access(event.expert, hit=True))
        elif isinstance(event, Miss):
            access = Access(event.expert, hit=False, evicted=event.evicted, placed=event.placed)
            layers[event.layer][event.step].append(access)
    return layers


def computed_by_layer(trace: Trace) -> list[dict[int, dict[int, bool]]]:
    """The experts that the host computed, of each layer by step, and whether each was given a slot."""
    layers: list[dict[int, dict[int, bool]]] = [defaultdict(dict) for _ in range(trace.header.layers)]
    for event in trace.events:
        if isinstance(event, Miss) and event.source == "compute":
            layers[event.layer][event.step][event.expert] = event.placed
    return layers


def places(trace: Trace) -> list[Counter[str]]:
    """For each decoded token, how many of the needed experts were where."""
    tokens, found = step_tokens(routing_by_layer(trace)), defaultdict[int, Counter[str]](Counter)
    for event in trace.events:
        if isinstance(event, Hit | Miss) and tokens.get(event.step) == 1:
            place = "in a slot" if isinstance(event, Hit) else SOURCES[event.source]
            found[event.step][place] += 1
    return list(found.values())


def step_tokens(layers: list[list[Routing]]) -> dict[int, int]:
    """The number of tokens in each step."""
    return {routing.step: routing.tokens for routings in layers for routing in routings}


def counted(layers: list[list[Routing]]) -> set[int]:
    """The steps that ratios count: those of one token, or all if there are none."""
    steps = step_tokens(layers)
    return {step for step, tokens in steps.items() if tokens == 1} or set(steps)


def recorded_ratios(trace: Trace) -> dict[str, Any]:
    routings = routing_by_layer(trace)
    tokens, measured = step_tokens(routings), counted(routings)
    totals = {"decode": [0, 0], "prefill": [0, 0], "all": [0, 0]}  # hits, accesses
    layers = [[0, 0] for _ in range(trace.header.layers)]
    for event in trace.events:
        if isinstance(event, Hit | Miss):
            hit = isinstance(event, Hit)
            kinds = [totals["all"], totals["decode" if tokens.get(event.step) == 1 else "prefill"]]
            for pair in kinds + [layers[event.layer]] * (event.step in measured):
                pair[0] += hit
                pair[1] += 1
    report = {name: {"hits": h, "misses": n - h, "hit_ratio": ratio(h, n)} for name, (h, n) in totals.items()}
    return report | {"by_layer": [ratio(h, n) for h, n in layers]}


def replay_agrees(trace: Trace) -> bool | None:
    """Whether a simulation with the recorded policy and slots agrees with every recorded access. None if the
    policy cannot be simulated."""
    header = trace.header
    if header.policy not in POLICIES:
        return None
    accesses, computed = accesses_by_layer(trace), computed_by_layer(trace)
    for layer, routings in enumerate(routing_by_layer(trace)):
        needs = [routing.experts for routing in routings]
        by_host = [computed[layer].get(routing.step, {}) for routing in routings]
        simulated = replay(needs, header.slots[layer], header.policy, header.seed, layer, by_host)
        if simulated != [accesses[layer].get(routing.step, []) for routing in routings]:
            return False
    return True


def replayed_ratios(layers: list[list[Routing]], experts: int, seed: int) -> dict[str, list[float | None]]:
    """The hit ratio with 1, 2, ... slots in every layer, for each policy and the optimum. None stands for a
    number of slots that is left out."""
    steps = counted(layers)
    accesses = sum(len(r.experts) for routings in layers for r in routings if r.step in steps)
    used = [(layer, routings) for layer, routings in enumerate(layers) if routings]
    ratios: dict[str, list[float | None]] = {name: [None] * experts for name in (*POLICIES, "belady")}
    for slots in replayed(experts):
        for name, by_slots in ratios.items():
            hits = 0
            for layer, routings in used:
                needs = [routing.experts for routing in routings]
                found = replayed_hits(needs, slots, name, seed, layer)
                hits += sum(n for n, r in zip(found, routings, strict=True) if r.step in steps)
            by_slots[slots - 1] = ratio(hits, accesses)
    return ratios


def replayed_hits(needs: list[tuple[int, ...]], slots: int, policy: str, seed: int, layer: int) -> list[int]:
    """The hits of each step in one layer, by a policy or by the optimum, "belady"."""
    if policy == "belady":
        return optimum(needs, slots)
    return [sum(access.hit for access in step) for step in replay(needs, slots, policy, seed, layer)]


def replayed(experts: int) -> set[int]:
    """The numbers of slots with which a trace is replayed: all of them, or `REPLAYS` evenly spread.

    >>> replayed(4), sorted(replayed(256))[:3], max(replayed(256))
    ({1, 2, 3, 4}, [8, 16, 24], 256)
    """
    count = min(experts, REPLAYS)
    return {experts * i // count for i in range(1, count + 1)}


def recall(trace: Trace) -> dict[int, list[float]]:
    """By distance, the shares of needed experts that are among the first 1, 2, ... of the lookahead gate's
    ranking, over the layers and steps that have one."""
    layers = routing_by_layer(trace)
    steps = counted(layers)
    needed = {(r.step, r.layer): r.experts for routings in layers for r in routings if r.step in steps}
    found: dict[int, list[int]] = defaultdict(lambda: [0] * trace.header.experts)
    accesses: dict[int, int] = defaultdict(int)
    longest: dict[int, int] = defaultdict(int)
    for event in trace.events:
        if isinstance(event, Ranking) and (event.step, event.layer) in needed:
            need = needed[event.step, event.layer]
            accesses[event.distance] += len(need)
            longest[event.distance] = max(longest[event.distance], len(event.experts))
            for rank, expert in enumerate(event.experts):
                found[event.distance][rank] += expert in need
    return {
        distance: [sum(found[distance][: g + 1]) / accesses[distance] for g in range(longest[distance])]
        for distance in sorted(accesses)
    }
