"""Ranks that are killed, stopped and interrupted: what the others say, how soon, and how they end."""

import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests.runtime.ranks.processes import HOST, Process, Starter, free_port

SOON = 20.0  # seconds, and less than a timeout; ranks need some hundredths on an idle machine


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    starter = Starter(tmp_path_factory.mktemp("ranks"))
    yield starter
    starter.close()


@pytest.fixture
def starter(process: Starter) -> Iterator[Starter]:
    yield process
    process.tidy()


def all_say(ranks: list[Process], line: str, since: float, within: float) -> None:
    """Each rank notices in time, says nothing but the one line, and ends in order."""
    for rank in ranks:
        status = rank.end()
        said = re.fullmatch(r"ready\nlost ([0-9.]+): (.*)\n", rank.text())
        assert said and said[2] == line and status == 3, (status, rank.text())
        assert float(said[1]) - since < within


@pytest.mark.parametrize(
    ("part", "killed", "quick"),
    [
        ("round", 0, True), ("round", 1, True), ("round", 2, True), ("idle", 1, True),
        ("large", 0, True), ("large", 1, False), ("computing", 2, True),
    ],
)  # fmt: skip
def test_a_killed_rank_is_named_at_once(starter: Starter, part: str, killed: int, quick: bool) -> None:
    """Long before the timeout. Rank 0 hosts the store, and its loss is no other than any."""
    ranks = starter.ready(part, part, part, timeout=30, quick=quick)
    time.sleep(0.1)
    since = ranks[killed].kill(signal.SIGKILL)
    assert ranks.pop(killed).end() == -signal.SIGKILL
    all_say(ranks, f"rank {killed} ({HOST}) has ended; the output there may say why", since, SOON)


@pytest.mark.parametrize(
    ("part", "stopped", "quick"),
    [
        ("round", 0, True), ("idle", 1, True), ("computing", 2, True), ("large", 1, True),
        pytest.param("large", 1, False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_stopped_rank_is_lost_after_the_timeout(
    starter: Starter, part: str, stopped: int, quick: bool
) -> None:
    """Its connections stay open. When it goes on, it says the same as the others."""
    ranks = starter.ready(part, part, part, timeout=3.0, quick=quick)
    time.sleep(0.1)
    since = ranks[stopped].kill(signal.SIGSTOP)
    line = f"rank {stopped} ({HOST}) has not answered for 3 s; stopped, or cut off from the network?"
    other = ranks.pop(stopped)
    all_say(ranks, line, since, 3 + SOON)
    since = other.kill(signal.SIGCONT)
    all_say([other], line, since, SOON)


def test_an_interrupted_rank_stops_waiting(starter: Starter) -> None:
    """Ctrl-C in `receive`. The others hear that it has ended."""
    ranks = starter.ready("idle", "idle", timeout=30)
    time.sleep(0.1)
    since = ranks[0].kill(signal.SIGINT)
    all_say(ranks[1:], f"rank 0 ({HOST}) has ended; the output there may say why", since, 2 * SOON)
    assert ranks[0].end() in (1, -signal.SIGINT)  # a forked program's own end differs between versions
    assert ranks[0].text().endswith("KeyboardInterrupt\n")


def test_a_rank_that_ends_without_a_word(starter: Starter) -> None:
    ranks = starter.ready("exits", "idle", "idle", timeout=30, quick=True)
    line = f"rank 0 ({HOST}) has ended; the output there may say why"
    all_say(ranks[1:], line, time.monotonic(), 10)
    assert ranks[0].end() == 0 and ranks[0].text() == "ready\n"


def test_a_mistake_of_a_rank_is_its_own_traceback(starter: Starter) -> None:
    ranks = starter.ready("idle", "raises", timeout=30, quick=True)
    all_say(ranks[:1], f"rank 1 ({HOST}) has ended; the output there may say why", time.monotonic(), 10)
    assert ranks[1].end() == 1
    assert ranks[1].text().endswith("ZeroDivisionError: a mistake of the program\n")
    assert ranks[1].text().count("Traceback") == 1


def test_a_failure_is_told_in_its_own_words(starter: Starter) -> None:
    ranks = starter.ready("idle", "idle", "fails", "idle", timeout=30, quick=True)
    assert ranks.pop(2).end() == 4
    all_say(ranks, "rank 2: /x: no such folder", time.monotonic(), 10)


def test_a_rank_that_closes_is_no_loss_until_it_is_needed(starter: Starter) -> None:
    """Rank 1 computes, and needs nobody."""
    ranks = starter.ready("leaves", "computing", "idle", timeout=3.0, quick=True)
    assert ranks[0].end() == 0 and ranks[0].text() == "ready\nthreads: 1\n"
    time.sleep(4)
    assert ranks[1].text() == ranks[2].text() == "ready\n"
    ranks[1].kill(signal.SIGKILL)
    line = f"rank 1 ({HOST}) has ended; the output there may say why"
    all_say(ranks[2:], line, time.monotonic(), SOON)


def test_a_fork_of_a_rank_is_refused_and_ends(starter: Starter) -> None:
    ranks = starter.ready("forks", "forks", timeout=30)
    for rank in ranks:
        assert rank.end() == 0
        first, said, ended = rank.text().splitlines()
        assert first == "ready" and ended == "fork ended 0"
        assert re.fullmatch(r"fork: the ranks are connected to process \d+, not to its fork \d+", said)


@pytest.mark.parametrize("agent", [False, True])
def test_engines_one_after_the_other_and_at_once(starter: Starter, agent: bool) -> None:
    port = free_port()
    if agent:
        host = starter.start({"store": port})
        host.await_text("ready")
    ranks = starter.ranks("leaves", "leaves", agent=port if agent else None, before=3, beside=2, quick=True)
    for rank in ranks:
        assert rank.end() == 0 and rank.text() == "ready\nthreads: 1\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_store_is_not_needed_after_the_meeting(starter: Starter, number: int) -> None:
    port = free_port()
    host = starter.start({"store": port})
    host.await_text("ready")
    ranks = starter.ready("round", "round", agent=port, timeout=0.5, quick=True)
    host.kill(number)
    time.sleep(1.2)
    assert [rank.text() for rank in ranks] == ["ready\n"] * 2
    since = ranks[0].kill(signal.SIGKILL)
    all_say(ranks[1:], f"rank 0 ({HOST}) has ended; the output there may say why", since, SOON)
