"""Ctrl-C while a thread starts or is awaited, which Python's threading turns into a RuntimeError."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from runtime.process.interrupts import restore_interrupts
from runtime.shell.command import INTERRUPTED, run
from tests.leftovers import until


def interrupted_wait(self: object) -> None:
    """Raise what `Thread.start` does if an interrupt comes as its wait takes the lock again."""
    try:
        raise KeyboardInterrupt
    finally:
        threading.RLock().release()


def test_loading(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())  # other tests' engines have theirs
    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", lambda self, timeout=None: interrupted_wait(self))
        with pytest.raises(KeyboardInterrupt):
            load(offload="always", slots=2)
    until(lambda: not set(threading.enumerate()) - before)


def test_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: interrupted_wait(None)) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), restore_interrupts():
        raise RuntimeError("shapes")
