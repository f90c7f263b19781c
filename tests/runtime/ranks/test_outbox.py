"""Ctrl-C at any moment of a send: the next rank gets a frame with its rows, or neither."""

import sys
from collections.abc import Iterator
from itertools import count
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.ranks import outbox
from runtime.ranks.edge import FRAMES, ROWS, Edge
from runtime.ranks.outbox import Outbox

LARGE = torch.ones(64, 64)  # does not fit the frame


def make(sent: list[int]) -> Outbox:
    """An outbox of 3 frames and 2 larger messages. Gloo's part is played by a list of tags."""

    def send(messages: list[torch.Tensor], other: int, tag: int) -> Any:
        sent.append(tag)
        return SimpleNamespace(wait=lambda time: None)

    edge: Any = object.__new__(Edge)
    edge.other, edge.group = 1, SimpleNamespace(send=send)
    return Outbox(edge, 1024, 3, 2, lambda: None)


def interrupted_at(number: int) -> Any:
    """A trace function that interrupts before the instruction of this number of the outbox's own code."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != outbox.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    return trace


def outcomes() -> Iterator[tuple[Outbox, list[int], bool]]:
    """Sends that were interrupted at each instruction, and one that was not."""
    before = sys.gettrace()
    for number in count(1):
        sent: list[int] = []
        box, whole = make(sent), False
        sys.settrace(interrupted_at(number))
        try:
            box.send([7], LARGE)
            whole = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        box.finish()
        box.thread.join(10)
        yield box, sent, whole
        if whole:
            return


def test_an_interrupt_never_parts_a_frame_from_its_rows() -> None:
    ends = set()
    for box, sent, whole in outcomes():
        assert sent in ([], [FRAMES, ROWS])
        if sent:
            assert (box.frames.qsize(), box.permits.qsize()) == (3, 2), "all can be used again"
        ends.add((bool(sent), whole))
    assert ends == {(False, False), (True, False), (True, True)}


def test_an_interrupt_while_too_many_are_under_way() -> None:
    box, waits = make([]), []

    def get() -> None:
        waits.append(True)
        raise KeyboardInterrupt

    box.permits = SimpleNamespace(get=get)  # type: ignore[assignment]
    for _ in range(9):
        with pytest.raises(KeyboardInterrupt):
            box.send([7], LARGE)
    assert len(waits) == 9 and box.frames.qsize() == 3
