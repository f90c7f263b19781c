import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import RequestError
from runtime.ranks.frames import DTYPES, frame_bytes
from runtime.ranks.lost import Lost
from runtime.ranks.meeting import Meeting
from runtime.ranks.ring import FRAMES, Ring
from tests.leftovers import handles, until
from tests.runtime.ranks.together import succeed, together

SMALL = frame_bytes(rows=4, width=16, dtype=torch.float32, header=8)


@contextmanager
def ringing(meeting: Meeting) -> Iterator[Ring]:
    ring = Ring(meeting, SMALL, least=0)
    try:
        yield ring
    finally:
        ring.close()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_frames_go_round(size: int) -> None:
    """Of all kinds, each changed by every rank on its way, and back at rank 0 as arithmetic says."""
    kinds: list[torch.Tensor | None] = [None, torch.zeros(0, 16)]
    for dtype in DTYPES:
        kinds += [(torch.arange(n * 16) % 97).view(n, 16).to(dtype) for n in (1, 4, 5, 300)]

    def work(meeting: Meeting) -> Any:
        back = []
        with ringing(meeting) as ring:
            for number, rows in enumerate(kinds):
                if meeting.rank == 0:
                    ring.send([number, -1], rows)
                header, got = ring.receive()
                if meeting.rank == 0:
                    back.append((header, got))
                else:
                    ring.send([*header, meeting.rank], None if got is None else got + meeting.rank)
        return back

    back = succeed(size, work)[0]
    assert len(back) == len(kinds)
    for number, (rows, (header, got)) in enumerate(zip(kinds, back, strict=True)):
        assert header == [number, -1, *range(1, size)]
        if rows is None:
            assert got is None
        else:
            assert got.dtype == rows.dtype and torch.equal(got, rows + sum(range(size)))


def test_rows_that_are_views_arrive_as_they_look() -> None:
    base = torch.arange(1200.0).view(40, 30)
    views = [base[:4, :16].t()[:, :4], base.t(), base[::2], base[3:5, 1:9]]

    def work(meeting: Meeting) -> Any:
        with ringing(meeting) as ring:
            for view in views:
                ring.send([], view)
            return [ring.receive()[1] for _ in views]

    for got in succeed(2, work):
        assert all(torch.equal(a, b) for a, b in zip(got, views, strict=True))


def test_a_sender_far_ahead_waits_and_nothing_is_mixed_up() -> None:
    """Frames and larger rows, many more than may be under way; the receiver is slow."""

    def work(meeting: Meeting) -> Any:
        with ringing(meeting) as ring:
            if meeting.rank == 0:
                for number in range(100):
                    ring.send([number], torch.full((1 + number % 7, 16), float(number)))
                return ring.receive()
            time.sleep(0.2)
            for number in range(100):
                header, rows = ring.receive()
                assert header == [number] and rows is not None
                assert rows.shape == (1 + number % 7, 16) and bool((rows == number).all())
            ring.send([100])

    assert succeed(2, work)[0] == ([100], None)


def test_rows_received_stay_when_more_come() -> None:
    def work(meeting: Meeting) -> Any:
        with ringing(meeting) as ring:
            for number in range(50):
                ring.send([number], torch.full((2, 16), float(number)))
                kept.setdefault(meeting.rank, []).append(ring.receive()[1])

    kept: dict[int, list[Any]] = {}
    succeed(2, work)
    assert all(bool((rows == number).all()) for got in kept.values() for number, rows in enumerate(got))


def test_what_was_sent_before_closing_arrives() -> None:
    def work(meeting: Meeting) -> Any:
        with ringing(meeting) as ring:
            if meeting.rank == 1:
                return [ring.receive() for _ in range(12)]
            for number in range(12):
                ring.send([number], torch.ones(5 if number % 4 == 3 else 1, 16))

    assert [header for header, _ in succeed(2, work)[1]] == [[number] for number in range(12)]


def test_a_rank_that_has_closed_is_named() -> None:
    def work(meeting: Meeting) -> Any:
        with ringing(meeting) as ring:
            if meeting.rank == 0:
                ring.receive()

    started = time.monotonic()
    error = together(3, work)[0]
    assert isinstance(error, Lost) and str(error) == f"rank 2 ({os.uname().nodename}) has closed"
    assert time.monotonic() - started < 30


def test_nothing_is_left_after_closing() -> None:
    def there() -> set[object]:
        return {*threading.enumerate(), *handles()}

    def work(meeting: Meeting) -> Any:
        with ringing(meeting) as ring:
            ring.send([1], torch.ones(9, 16))
            return ring.receive()[0]

    if not Path("/proc/self/fd").exists():
        pytest.skip("counts descriptors in /proc")
    succeed(2, work)  # whatever a process has once
    before = there()
    for _ in range(3):
        assert succeed(3, work) == [[1]] * 3
    until(lambda: not there() - before, lambda: there() - before)


def test_mistakes_are_refused() -> None:
    def work(meeting: Meeting) -> Any:
        ring = Ring(meeting, SMALL, least=0)
        for header, rows in (
            ([0] * 1000, None),
            ([0], torch.ones(3)),
            ([0], torch.ones(2, 2, dtype=torch.float64)),
        ):
            with pytest.raises(ValueError, match="frame"):
                ring.send(header, rows)
        for _ in range(FRAMES):  # the mistakes have cost no frame
            ring.send([5])
        assert [ring.receive()[0] for _ in range(FRAMES)] == [[5]] * FRAMES
        ring.close()
        with pytest.raises(RequestError, match="closed"):
            ring.send([0])
        ring.close()

    succeed(2, work)
