"""Interrupts of rank 0, and closing in threads that a forward waits for. Rank 0 is the main thread."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from runtime import Engine, RequestError
from runtime.engine import DEMO
from runtime.process.shelter import Shelter
from runtime.ranks.meeting import Meeting
from runtime.ranks.pipeline import Pipeline
from runtime.ranks.starting import start_rank
from tests.runtime.experts.interrupts import Thrown, hammer_requests
from tests.runtime.ranks.engines import options_for


@contextmanager
def leading(folder: Path, **options: Any) -> Iterator[Engine]:
    """Rank 0 of two, in this thread."""
    its, store = options_for((5, 3), device="cpu", threads=1, context=64, **options), HashStore()
    failed = list[BaseException]()

    def follow() -> None:
        try:
            with Engine(*start_rank(folder, its, None, None, None, None, Meeting(store, 1, 2, 20))) as engine:
                engine.follow()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=follow)
    thread.start()
    with Engine(*start_rank(folder, its, None, None, None, None, Meeting(store, 0, 2, 20))) as engine:
        yield engine
    thread.join(20)
    assert not thread.is_alive() and not failed, failed


def test_many_interrupts_leave_nothing_to_repair() -> None:
    with leading(DEMO) as engine:
        hammer_requests(60, engine, [5, 6, 7])
        passes = engine.runner.passes
        assert isinstance(passes, Pipeline)
        passes.shelter.do(lambda: None)  # what the last interrupt left comes to its end
        assert not passes.shelter.lock.locked()


def test_closing_where_a_forward_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a finalizer may, which the garbage collector calls in any thread."""
    take = Pipeline.take
    close: Callable[[], None] | None = None

    def closing(self: Pipeline) -> None:
        nonlocal close
        if close is not None:
            assert threading.current_thread() is not threading.main_thread()
            closes, close = close, None
            closes()
        take(self)

    monkeypatch.setattr(Pipeline, "take", closing)
    with leading(DEMO) as engine:
        close = engine.close
        with pytest.raises(RequestError, match="the engine is closed"):
            list(engine.generate([5, 6, 7]))
        assert not hasattr(engine.runner, "model"), "the forward released everything when it ended"


def test_what_is_sheltered_is_done_once() -> None:
    shelter, done, thrown = Shelter(), list[int](), Thrown()
    asked = 0

    def ask() -> None:
        nonlocal asked
        number = asked
        asked += 1
        assert shelter.do(lambda: done.append(number) or number) == number

    while thrown.count < 200:
        thrown.until(ask)
    with pytest.raises(ZeroDivisionError):
        shelter.do(lambda: 1 // 0)
    shelter.close()
    shelter.thread.join(10)
    assert shelter.do(lambda: 5) == 5 and not shelter.thread.is_alive()
    assert done == sorted(set(done)) and len(done) > 200
