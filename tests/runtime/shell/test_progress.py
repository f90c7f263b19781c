"""Progress: nothing of short work, a line a minute in a log, a bar on a terminal."""

from types import SimpleNamespace

import pytest

from runtime.shell import progress as module
from runtime.shell.progress import bar, byte_progress, progress


def test_a_log_gets_two_lines_of_long_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress(100, "scoring", " tokens") as advance:
        for _ in range(100):
            advance(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    with byte_progress(4096, "loading", done=1024) as advance:
        for _ in range(1024):
            advance(3)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "loading: 1.0 KiB of 4.0 KiB"
    assert last.startswith("loading: done, 4.0 KiB in ")


def test_a_log_gets_a_line_a_minute_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "PATIENCE", 1.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    with progress(1000, "scoring", " tokens", done=400) as advance:
        for _ in range(150):  # a token a second, up to the last 450 at once
            now += 1
            advance(1)
        advance(450)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 401 of 1,000 tokens",
        "scoring: 461 of 1,000 tokens, 9 min left",
        "scoring: 521 of 1,000 tokens, 8 min left",
        "scoring: done, 1,000 tokens in 2 min",
    ]


def test_work_that_fails_is_not_said_to_be_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    with pytest.raises(ZeroDivisionError), progress(2, "scoring", " tokens") as advance:
        advance(1)
        raise ZeroDivisionError
    assert capsys.readouterr().err == "scoring: 1 of 2 tokens\n"


def test_a_bar_within_a_bar_moves_no_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with bar(10, "quantizing", "", 0, str), bar(4, "downloading", "", 0, str) as advance:
        advance(4)
    shown = capsys.readouterr().err
    assert "quantizing" in shown and "downloading" in shown
    assert not set("\n\x1b") & set(shown)
