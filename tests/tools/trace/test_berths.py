"""Traces of runs in which host memory has fewer berths than there are experts: the simulation against the
runtime's berths and against recorded runs, sums and figures, and traces of earlier programs."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import Engine, EngineOptions, SamplingParams
from runtime.engine import DEMO
from runtime.experts.berths import Berths
from runtime.experts.policy import POLICIES, make_policy
from runtime.experts.trace import (
    Copy,
    Drop,
    Event,
    Guess,
    Header,
    Hit,
    Miss,
    Read,
    Routing,
    TraceWriter,
    UsedGuess,
    WastedGuess,
    WriteBack,
)
from tests.quantized import quantize_folder
from tools.trace import command as tool
from tools.trace.berths import berths_agree
from tools.trace.read import Trace, read_trace
from tools.trace.statistics import places, summarize
from tools.trace.text import as_text

LAYERS, E = 2, 5


def header(berths: int = 4, policy: str = "lru", there: tuple[int, ...] = ()) -> Header:
    return Header(LAYERS, E, 2, (2,) * LAYERS, 2, policy, 0, 100, berths, min(2, berths), there)


class Run:
    """Random misses, victims and guesses, and what the runtime's berths make of them."""

    def __init__(self, berths: int, policy: str, seed: int) -> None:
        self.chance = random.Random(seed)
        self.berths = Berths(berths, make_policy(policy, 0, LAYERS), min(2, berths), LAYERS * E)
        there = self.chance.sample(range(LAYERS * E), self.chance.randint(0, berths))
        self.berths.restore(dict(enumerate(there)))
        self.header = header(berths, policy, tuple(there))
        self.slots: list[list[int]] = [[] for _ in range(LAYERS)]
        self.guesses: dict[int, bool] = {}  # and whether each was read
        self.events: list[Event] = []

    def go(self, steps: int) -> Trace:
        for step in range(steps):
            layer = step % LAYERS
            self.end_guesses(step, layer)
            need = self.chance.sample(range(E), 2)
            self.events.append(Routing(step, layer, 1, tuple(need)))
            for expert in need:
                if expert in self.slots[layer]:
                    self.events.append(Hit(step, layer, expert))
                else:
                    self.miss(step, layer, expert, need)
            self.guess(step, (layer + 1) % LAYERS)
        return Trace(self.header, self.events, truncated=False)

    def take(self, step: int, key: int) -> None:
        dropped = self.berths.take(key)[1]
        if dropped is not None:
            self.events.append(Drop(step, *divmod(dropped, E)))

    def miss(self, step: int, layer: int, expert: int, need: list[int]) -> None:
        key, evicted = layer * E + expert, None
        source = "host" if self.berths.find(key) is not None else "file"
        if source == "file":
            self.take(step, key)
        guessed = self.guesses.pop(key, None) is not None
        self.berths.lift(key)
        if len(self.slots[layer]) == 2:
            evicted = next(e for e in self.slots[layer] if e not in need or e == self.slots[layer][0])
            self.slots[layer].remove(evicted)
            if not self.berths.sink(layer * E + evicted):
                self.take(step, layer * E + evicted)
        self.slots[layer].append(expert)
        self.events.append(Miss(step, layer, expert, evicted, source))
        if guessed:
            self.events.append(UsedGuess(step, layer, expert))

    def guess(self, step: int, layer: int) -> None:
        expert = self.chance.randrange(E)
        key = layer * E + expert
        if expert in self.slots[layer] or key in self.guesses or not self.berths.can_hold(key):
            return
        self.guesses[key] = self.berths.find(key) is None
        if self.guesses[key]:
            self.take(step, key)
        self.berths.hold(key)
        self.events.append(Guess(step, layer, expert, 1, 0))

    def end_guesses(self, step: int, layer: int) -> None:
        for key, read in list(self.guesses.items()):
            if key // E == layer and self.chance.random() < 0.5:
                del self.guesses[key]
                if read:
                    self.berths.vacate(key)
                else:
                    self.berths.let_go(key)
                self.events.append(WastedGuess(step, layer, key % E, 0))


@given(st.integers(2, LAYERS * E - 1), st.sampled_from(sorted(POLICIES)), st.integers(0, 10**6))
def test_the_simulation_repeats_the_runtimes_berths(berths: int, policy: str, seed: int) -> None:
    trace = Run(berths, policy, seed).go(60)
    assert berths_agree(trace)
    events, chance = trace.events, random.Random(seed)
    misses = [i for i, event in enumerate(events) if isinstance(event, Miss)]
    at = chance.choice(misses)
    wrong = dataclasses.replace(events[at], source="host" if events[at].source == "file" else "file")
    assert not berths_agree(Trace(trace.header, [*events[:at], wrong, *events[at + 1 :]], truncated=False))
    drops = [i for i, event in enumerate(events) if isinstance(event, Drop)]
    if drops:
        at = chance.choice(drops)
        assert not berths_agree(Trace(trace.header, events[:at] + events[at + 1 :], truncated=False))


def test_a_worked_example() -> None:
    """Three berths of which two doubles are left alone; 0, 1 and 2 of layer 0 are there."""
    small = header(3, there=(0, 1, 2))
    events: list[Event] = [
        Miss(0, 0, 0),  # 0 is a double, 1 and 2 are singles
        Miss(0, 0, 1),  # 0 and 1 are doubles
        Drop(0, 0, 2),  # for 7, which comes from its file
        Miss(0, 1, 2, None, "file"),  # three doubles: 0, 1 and 7
        Miss(1, 1, 3, None, "file"),  # takes the berth of 0, the oldest
        Miss(1, 0, 4, 0, "file"),  # takes that of 1; then 0 leaves its slot, and takes that of 7
        Drop(2, 0, 0),  # the only single goes for 1, which leaves its slot and had no berth
        Miss(2, 0, 2, 1, "file"),
    ]
    # Two are doubles before the last miss, 8 and 4, and 0 is single. So 0 is dropped for 2. Then three are
    # doubles, and 1 takes the berth of 8.
    assert berths_agree(Trace(small, events, truncated=False))
    assert berths_agree(Trace(dataclasses.replace(small, berths=0), events, truncated=False)) is None
    assert berths_agree(Trace(dataclasses.replace(small, policy="mine"), events, truncated=False)) is None
    for impossible in (
        WastedGuess(3, 0, 4, 0),
        Miss(3, 0, 2),
        Miss(3, 1, 0, 4, "file"),
        Guess(3, 0, 4, 1, 0),
    ):
        assert berths_agree(Trace(small, [*events, impossible], truncated=False)) is False


def example() -> list[Event]:
    return [
        Routing(0, 0, 1, (0, 1)),
        Miss(0, 0, 0, None, "file"),
        Read(0, 0, 0, "demand", 100, 0.5),
        Copy(0, 0, 0, "demand", 100, 0.25),
        Miss(0, 0, 1, None, "file"),
        Routing(1, 0, 1, (0, 2)),
        Hit(1, 0, 0),
        Read(1, 1, 3, "guess", 100, 0.25),
        Miss(1, 0, 2, 1, "file"),
        WriteBack(1, 0, 1, 100, 0.125),
        Drop(1, 1, 4),
    ]


def test_sums_of_tiers() -> None:
    trace = Trace(header(), example(), truncated=False)
    found = summarize(trace)["tiers"]
    assert found == {
        "misses": {"host": 0, "file": 3, "compute": 0},
        "agrees": False,
        "channels": {
            "to_slots": {"experts": 1, "bytes": 100, "seconds": 0.25},
            "written_back": {"experts": 1, "bytes": 100, "seconds": 0.125},
            "read": {"experts": 2, "bytes": 200, "seconds": 0.75},
        },
        "read_for_guesses": 1,
        "drops": 1,
    }
    assert places(trace) == [{"in a file": 2}, {"in a slot": 1, "in a file": 1}]
    text = as_text(summarize(trace))
    assert "Tiers: 4 slots, 4 berths for 10 experts" in text
    assert "warning: a simulation of host memory gives other sources or drops." in text
    complete = summarize(Trace(dataclasses.replace(trace.header, berths=0), example(), truncated=False))
    assert complete["tiers"] is None and "Tiers" not in as_text(complete)


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for head, there in ((header(), True), (header(0), False)):
        path, out = tmp_path / "t.jsonl", tmp_path / f"figures-{head.berths}"
        writer = TraceWriter.open(path, head)
        for event in example():
            writer.add(event)
        writer.close()
        assert tool.main(["plot", str(path), "--out", str(out)]) == 0
        assert (out / "tiers.png").is_file() == there


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(DEMO, tmp_path_factory.mktemp("demo") / "native", "3g128")


@pytest.mark.parametrize(("berths", "policy"), [(43, "lru"), *((8, policy) for policy in POLICIES)])
def test_a_recorded_run_agrees(native: Path, berths: int, policy: str, tmp_path: Path) -> None:
    options = EngineOptions(
        device="cpu", offload="always", slots=3, berths=berths, policy=policy, lookahead=2, prefetch=2
    )
    path, params = tmp_path / "t.jsonl", SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    with Engine.load(native, options) as engine:
        with engine.recording(path):
            for prompt in ("def ", "import os, sys\n"):
                assert len(list(engine.generate(prompt, params))) == 12
        counted = engine.stats()
    trace = read_trace(path)
    report = summarize(trace)
    assert report["replay_agrees"] and report["tiers"]["agrees"]
    assert sum(report["tiers"]["misses"].values()) == counted.misses
    assert report["tiers"]["misses"]["file"] > 0
    if berths == 43:  # with the slots there is room for all: what was needed once is not read again
        first: dict[tuple[int, int], int] = {}
        for event in trace.events:
            if isinstance(event, Miss):
                first.setdefault((event.layer, event.expert), event.step)
        reads = [event for event in trace.events if isinstance(event, Read)]
        assert all(event.step <= first.get((event.layer, event.expert), event.step) for event in reads)
        assert reads and not report["tiers"]["drops"]
    else:
        assert report["tiers"]["drops"] > 0 and report["tiers"]["channels"]["written_back"]["experts"] > 0


@pytest.mark.parametrize("misses", ("compute", "auto"))
def test_a_run_in_which_the_host_computes_agrees(native: Path, misses: str, tmp_path: Path) -> None:
    options = EngineOptions(
        device="cpu", offload="always", slots=3, berths=8, policy="lfu", lookahead=1, misses=misses,
        link_gbps=1, disk_gbps=1, cpu_gbps=1,
    )  # fmt: skip
    path, params = tmp_path / "t.jsonl", SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True)
    with Engine.load(native, options) as engine, engine.recording(path):
        assert len(list(engine.generate("def ", params))) == 16
    report = summarize(read_trace(path))
    assert report["replay_agrees"] and report["tiers"]["agrees"]
    assert report["tiers"]["misses"]["compute"] > 0 and report["tiers"]["drops"] > 0
    assert "the host computed" in as_text(report)


def test_traces_of_earlier_programs_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    writer = TraceWriter.open(path, header(0))
    events: list[Event] = [Routing(0, 0, 1, (0, 1)), Miss(0, 0, 0), Miss(0, 0, 1)]
    for event in events:
        writer.add(event)
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, name in [
        (0, "berths"),
        (0, "spare_berths"),
        (0, "in_berths"),
        (2, "source"),
        (3, "source"),
        (2, "placed"),
    ]:
        del lines[line][name]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace = read_trace(path)
    assert trace.events == events and trace.header == header(0)
    assert tool.main(["summary", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "Tiers" not in out and err == ""
