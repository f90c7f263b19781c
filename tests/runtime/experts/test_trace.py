"""What was recorded is read back, whatever happens to the writer."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.experts.trace import (
    Copy,
    Drop,
    Event,
    Guess,
    Header,
    Hit,
    Miss,
    Ranking,
    Read,
    Routing,
    Stall,
    TraceError,
    TraceWriter,
    UsedGuess,
    WastedGuess,
    WriteBack,
)
from tools.trace.read import read_trace

HEADER = Header(
    layers=3,
    experts=8,
    experts_per_token=2,
    slots=(4, 4, 3),
    spares=2,
    policy="lru",
    seed=7,
    expert_bytes=1000,
    berths=9,
    spare_berths=2,
    options={"lookahead": 1, "link_gbps": None},
)

STEP, LAYER, EXPERT = st.integers(0, 1 << 40), st.integers(0, 2), st.integers(0, 7)
EXPERTS = st.lists(EXPERT, min_size=1, max_size=8, unique=True).map(tuple)
BYTES, SECONDS = st.integers(0, 1 << 50), st.floats(0, 1e9)
DISTANCE, KIND = st.integers(1, 2), st.sampled_from(["demand", "guess"])
EVENTS = st.lists(
    st.one_of(
        st.builds(Routing, STEP, LAYER, st.integers(1, 512), EXPERTS),
        EXPERTS.flatmap(
            lambda e: st.builds(
                Routing, STEP, LAYER, st.just(1), st.just(e), st.tuples(*[st.floats(0, 1)] * len(e))
            )
        ),
        st.builds(Ranking, STEP, LAYER, DISTANCE, EXPERTS),
        st.builds(Hit, STEP, LAYER, EXPERT),
        st.builds(Miss, STEP, LAYER, EXPERT, st.none() | EXPERT, st.sampled_from(["host", "file"])),
        st.builds(Guess, STEP, LAYER, EXPERT, DISTANCE, EXPERT),
        st.builds(UsedGuess, STEP, LAYER, EXPERT),
        st.builds(WastedGuess, STEP, LAYER, EXPERT, BYTES),
        st.builds(Copy, STEP, LAYER, EXPERT, KIND, BYTES, SECONDS),
        st.builds(Read, STEP, LAYER, EXPERT, KIND, BYTES, SECONDS),
        st.builds(WriteBack, STEP, LAYER, EXPERT, BYTES, SECONDS),
        st.builds(Drop, STEP, LAYER, EXPERT),
        st.builds(Stall, STEP, LAYER, EXPERT, SECONDS),
    ),
    max_size=20,
)


@given(events=EVENTS)
def test_what_is_written_reads_back(events: list[Event], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    writer = TraceWriter.open(path, HEADER)
    for event in events:
        writer.add(event)
    writer.close()
    trace = read_trace(path)
    assert (trace.header, trace.events, trace.truncated) == (HEADER, events, False)


@given(events=EVENTS, lost=st.integers(1, 400))
def test_a_file_cut_anywhere_gives_the_events_before_the_cut(
    events: list[Event], lost: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    writer = TraceWriter.open(path, HEADER)
    for event in events:
        writer.add(event)
    writer.close()
    lines = path.read_bytes().splitlines(keepends=True)
    data = b"".join(lines)[: max(len(lines[0]), sum(map(len, lines)) - lost)]
    path.write_bytes(data)
    trace = read_trace(path)
    whole = data.count(b"\n") - 1
    assert trace.events[:whole] == events[:whole]
    assert len(trace.events) == whole + (data[-1:] == b"}") and trace.truncated == (data[-1:] not in b"}\n")


def test_events_from_many_threads_are_all_there_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter.open(path, HEADER)

    def record(layer: int) -> None:
        for step in range(500):
            writer.add(Stall(step, layer, expert=step % 8, seconds=0.5))

    threads = [threading.Thread(target=record, args=(layer,)) for layer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    events = read_trace(path).events
    for layer in range(3):
        assert [e for e in events if e.layer == layer] == [Stall(s, layer, s % 8, 0.5) for s in range(500)]
    assert len(events) == 1500


def test_a_process_that_dies_loses_its_last_step_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    program = f"""
import os
from runtime.experts.trace import Header, Hit, TraceWriter
writer = TraceWriter.open({str(path)!r}, Header(3, 8, 2, (4, 4, 4), 2, "lru", 0, 1000))
for step in range(5):
    for layer in range(3):
        writer.add(Hit(step, layer, expert=1))
os._exit(1)
"""
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program], cwd=root, timeout=300)
    steps = [event.step for event in read_trace(path).events]
    assert steps[:12] == [step for step in range(4) for _ in range(3)]


class FullDisk(io.StringIO):
    """Takes `room` lines."""

    name = "full.jsonl"

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def write(self, text: str) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        self.room -= 1
        return super().write(text)


def test_a_full_disk_ends_the_recording_and_not_the_request() -> None:
    file = FullDisk(room=3)
    writer = TraceWriter(file, HEADER)
    for step in range(4):
        writer.add(Hit(step, layer=0, expert=1))
    assert len(file.getvalue().splitlines()) == 3
    with pytest.raises(TraceError, match=r"^full\.jsonl: No space left on device; the trace ends at step"):
        writer.close()
    writer.add(Hit(9, layer=0, expert=1))
    writer.close()


def test_late_events_and_a_second_close_do_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter.open(path, HEADER)
    writer.close()
    writer.add(Hit(0, 0, 0))
    writer.close()
    assert read_trace(path).events == []


def test_no_such_folder_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere.trace\.jsonl: No such file or directory$"):
        TraceWriter.open(tmp_path / "nowhere" / "trace.jsonl", HEADER)


def test_an_event_is_one_short_line() -> None:
    file = io.StringIO()
    writer = TraceWriter(file, HEADER)
    writer.add(Miss(123456, 31, 7, 5))
    lines = file.getvalue().splitlines()
    assert json.loads(lines[0])["format"] == "mixtral-trace"
    start = '{"event": "miss", "step": 123456, "layer": 31, "expert": 7, "evicted": 5, "source": "host"'
    assert len(lines) == 2 and lines[1].startswith(start) and len(lines[1]) < 120
