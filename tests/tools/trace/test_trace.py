"""The trace tool: its simulation against the runtime's slot tables, its optimum against brute force, its
figures and sums against traces worked out by hand, and what it refuses."""

import dataclasses
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.experts.policy import POLICIES, make_policy
from runtime.experts.slots import SlotTable
from runtime.experts.trace import (
    Copy,
    Event,
    Guess,
    Header,
    Hit,
    Miss,
    Ranking,
    Routing,
    Stall,
    TraceWriter,
    UsedGuess,
    WastedGuess,
)
from tools.trace import command as tool
from tools.trace.read import Trace
from tools.trace.replay import optimum, replay
from tools.trace.statistics import recall, replay_agrees, replayed, summarize
from tools.trace.text import as_text

E = 6
NEEDS = st.lists(st.lists(st.integers(0, E - 1), min_size=1, max_size=4, unique=True).map(tuple), max_size=80)


def header(layers: int = 1, slots: int = 2, policy: str = "lru", seed: int = 0) -> Header:
    return Header(layers, E, 2, (slots,) * layers, 1, policy, seed, expert_bytes=100)


def events_of(needs: list[tuple[int, ...]], table: SlotTable, layer: int = 0) -> list[Event]:
    """What a runtime records that follows the slot table's rules."""
    events: list[Event] = []
    for step, need in enumerate(needs):
        events.append(Routing(step, layer, 1, need))
        hits = [e for e in need if table.find(e) is not None]
        pinned = [table.hit(e) for e in hits]
        events += [Hit(step, layer, e) for e in hits]
        for e in (e for e in need if e not in hits):
            if not table.has_room:
                table.release(pinned.pop(0))
            slot, evicted = table.place(e)
            table.ready(slot)
            pinned.append(slot)
            events.append(Miss(step, layer, e, evicted))
        for slot in pinned:
            table.release(slot)
    return events


@given(needs=NEEDS, slots=st.integers(1, E), policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 3))
def test_the_simulation_repeats_the_slot_table_access_by_access(
    needs: list[tuple[int, ...]], slots: int, policy: str, seed: int
) -> None:
    events: list[Event] = []
    for layer in range(2):
        table = SlotTable(range(slots), make_policy(policy, seed, layer))
        events += events_of(needs if layer == 0 else needs[::-1], table, layer)
    assert replay_agrees(Trace(header(2, slots, policy, seed), events, truncated=False))
    for i, event in enumerate(events):
        if isinstance(event, Miss):
            other = Miss(event.step, event.layer, event.expert, (event.evicted or 0) + 1)
            changed = [*events[:i], other, *events[i + 1 :]]
            assert not replay_agrees(Trace(header(2, slots, policy, seed), changed, truncated=False))
            break


@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulation_repeats_a_long_run(policy: str) -> None:
    """Long enough for counts to decay many times, with favourites that change."""
    chance = random.Random(1)
    favourites = [chance.sample(range(E), E) for _ in range(4)]
    needs = [
        tuple(sorted({favourites[i // 100][chance.randrange(4)], chance.randrange(E)})) for i in range(400)
    ]
    events = events_of(needs, SlotTable(range(3), make_policy(policy, 0, 0)))
    assert replay_agrees(Trace(header(1, 3, policy), events, truncated=False))


def fewest_misses(needs: list[tuple[int, ...]], slots: int) -> int:
    """By trying every choice of what to keep after each step."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for need in needs:
        following: dict[frozenset[int], int] = {}
        for resident, misses in states.items():
            missing = set(need) - resident
            union = resident | set(need)
            for kept in map(frozenset, itertools.combinations(union, min(slots, len(union)))):
                if len(need) > slots or kept >= set(need):
                    total = misses + len(missing)
                    following[kept] = min(following.get(kept, total), total)
        states = following
    return min(states.values())


@given(needs=NEEDS.map(lambda needs: needs[:9]), slots=st.integers(1, E))
def test_the_optimum_is_what_brute_force_finds(needs: list[tuple[int, ...]], slots: int) -> None:
    hits = optimum(needs, slots)
    assert sum(map(len, needs)) - sum(hits) == fewest_misses(needs, slots)
    assert len(hits) == len(needs)


@given(needs=NEEDS, slots=st.integers(1, E))
def test_no_policy_beats_the_optimum(needs: list[tuple[int, ...]], slots: int) -> None:
    best = sum(optimum(needs, slots))
    for policy in POLICIES:
        assert sum(access.hit for step in replay(needs, slots, policy) for access in step) <= best


def worked_example() -> list[Event]:
    """A prompt of 3 tokens and 4 decoded ones, through one layer with 2 slots under LRU."""
    table = SlotTable(range(2), make_policy("lru", 0, 0))
    events = events_of([(0, 1, 2), (1, 2), (1, 3), (3, 4), (1, 3)], table)
    events[0] = Routing(0, 0, 3, (0, 1, 2), (0.5, 1.5, 1.0))
    # Prefill: 3 misses, 1 and 2 remain. Then (1, 2): 2 hits; (1, 3): hit, miss; (3, 4) and (1, 3) the same.
    rankings = {1: (1, 2, 3), 2: (3, 5, 1), 3: (5, 0, 2), 4: (3, 1, 0)}
    events += [Ranking(step, 0, 1, experts) for step, experts in rankings.items()]
    events += [
        Guess(2, 0, 3, 1, 0),
        UsedGuess(2, 0, 3),
        Guess(3, 0, 5, 1, 0),
        WastedGuess(4, 0, 5, 60),
        Copy(0, 0, 0, "demand", 100, 0.25),
        Copy(2, 0, 3, "guess", 100, 0.5),
        Copy(3, 0, 5, "guess", 60, 0.25),
        Stall(0, 0, 0, 0.125),
    ]
    return events


def test_sums_are_those_of_a_worked_example() -> None:
    report = summarize(Trace(header(), worked_example(), truncated=False))
    assert report["steps"] == {"decode": 4, "prefill": 1, "prefill_tokens": 3}
    assert report["recorded"] == {
        "decode": {"hits": 5, "misses": 3, "hit_ratio": 5 / 8},
        "prefill": {"hits": 0, "misses": 3, "hit_ratio": 0.0},
        "all": {"hits": 5, "misses": 6, "hit_ratio": 5 / 11},
        "by_layer": [5 / 8],
    }
    assert report["replay_agrees"] is True
    assert report["replay"]["lru"][1] == 5 / 8
    # With all in slots, only the first uses of 3 and of 4 miss after the prompt.
    assert all(ratios[E - 1] == 6 / 8 and len(ratios) == E for ratios in report["replay"].values())
    # Among the first 1, 2, 3: of (1, 2) 1, 2, 2; of (1, 3) 1, 1, 2; of (3, 4) none; of (1, 3) 1, 2, 2.
    assert report["recall"] == {1: [3 / 8, 5 / 8, 6 / 8]}
    assert report["guesses"] == {"issued": 2, "used": 1, "wasted": 1}
    assert report["bytes"] == {"demand": 100, "guess": 160, "placed": 0, "wasted": 60}
    assert report["seconds"] == {"copying": 1.0, "stalled": 0.125}


def test_of_many_experts_some_numbers_of_slots_are_replayed() -> None:
    many = dataclasses.replace(header(), experts=100)
    events: list[Event] = [Routing(0, 0, 1, tuple(range(100))), *(Miss(0, 0, e) for e in range(100))]
    report = summarize(Trace(many, events, truncated=False))
    for ratios in report["replay"].values():
        assert [slots for slots, ratio in enumerate(ratios, 1) if ratio is not None] == sorted(replayed(100))
        assert len(ratios) == 100 and ratios[99] == 0.0
    assert len(replayed(100)) == 32 and as_text(report).count("0.000") >= 32


def test_without_decode_steps_ratios_are_of_the_prompt() -> None:
    events: list[Event] = [Routing(0, 0, 5, (0, 1)), Miss(0, 0, 0), Miss(0, 0, 1), Ranking(0, 0, 2, (1,))]
    report = summarize(Trace(header(), events, truncated=False))
    assert report["recorded"]["decode"]["hit_ratio"] is None
    assert report["recorded"]["by_layer"] == [0.0]
    assert recall(Trace(header(), events, truncated=False)) == {2: [0.5]}


def write(path: Path, events: list[Event], head: Header | None = None) -> Path:
    writer = TraceWriter.open(path, head or header())
    for event in events:
        writer.add(event)
    writer.close()
    return path


def test_summary_prints_tables_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", worked_example())
    assert tool.main(["summary", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for row in (
        "decode     5       3  0.625",
        "A simulation of this policy gives the same",
        "1 used, 1 wasted",
    ):
        assert row in out
    assert tool.main(["summary", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recall"] == {"1": [0.375, 0.625, 0.75]} and report["trace"]["policy"] == "lru"
    write(path, [Routing(0, 0, 1, (0,)), Hit(0, 0, 0)])
    assert tool.main(["summary", str(path)]) == 0
    assert "warning: a simulation of this policy gives other hits" in capsys.readouterr().out
    write(path, [Routing(0, 0, 1, (0,)), Miss(0, 0, 0)], header(policy="mine"))
    assert tool.main(["summary", str(path)]) == 0
    assert "The policy mine is not one that can be simulated here." in capsys.readouterr().out


def test_a_cut_trace_is_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", worked_example())
    path.write_bytes(path.read_bytes()[:-10])
    assert tool.main(["summary", str(path)]) == 0
    assert capsys.readouterr().err == f"warning: {path}: the last line is incomplete and left out\n"


def test_what_cannot_be_read_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, bare = tmp_path / "empty", write(tmp_path / "bare", [])
    empty.touch()
    for path, reason in (
        (tmp_path / "none", ": No such file or directory"),
        (tmp_path, ": Is a directory"),
        (empty, ":1: the file is empty; a trace begins with a header"),
        (bare, ": there is a header and no events; nothing was generated"),
    ):
        assert tool.main(["summary", str(path)]) == 1
        assert capsys.readouterr().err == f"error: {path}{reason}\n"
    with pytest.raises(SystemExit) as usage:
        tool.main(["plot", str(bare)])
    assert usage.value.code == 2


def test_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, out = write(tmp_path / "t.jsonl", worked_example()), tmp_path / "new" / "figures"
    assert tool.main(["plot", str(path), "--out", str(out)]) == 0
    names = ["experts.png", "hit_ratio.png", "recall.png"]
    assert capsys.readouterr().out.splitlines() == [str(out / name) for name in names]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert tool.main(["plot", str(path), "--out", str(out), "--layers", "1"]) == 1
    assert capsys.readouterr().err == "error: there is no layer 1; the trace's layers are 0 to 0\n"


def test_figures_that_cannot_be_drawn_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "t.jsonl", worked_example())
    monkeypatch.setattr("tools.trace.plot.MAX_PIXELS", 10**5)
    assert tool.main(["plot", str(path), "--out", str(tmp_path / "figures")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: 4 tokens through 1 layers of 6 experts make a figure of 900 x 346 pixels, too"
    )
    assert not list((tmp_path / "figures").iterdir())


def test_figures_are_not_written_through_links(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine")
    for name in ("experts.png", "hit_ratio.png.part"):
        (tmp_path / name).symlink_to(thesis)
    path = write(tmp_path / "t.jsonl", worked_example())
    assert tool.main(["plot", str(path), "--out", str(tmp_path)]) == 0
    assert thesis.read_text() == "mine" and not (tmp_path / "experts.png").is_symlink()


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.jsonl", worked_example())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert tool.main(["plot", str(path), "--out", str(tmp_path)]) == 1
    message = "error: figures need matplotlib; install it by: pip install matplotlib\n"
    assert capsys.readouterr() == ("", message)
