"""The thread that serves requests."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue

import pytest

from runtime import Engine, EngineOptions, RequestError, SamplingParams
from runtime.answer import Token
from runtime.batching.batch import Work
from runtime.batching.scheduler import QueueFull
from runtime.batching.service import MISTAKE, STOPPING, Counts, Service

LONG = SamplingParams(max_new_tokens=200, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(options=EngineOptions(device="cpu", context=256, parallel=2)) as engine:
        yield engine


def ask(engine: Engine, text: str, params: SamplingParams, reuse: bool = False) -> Work:
    ids = engine.tokenizer.encode(text)
    return Work(ids, params, engine.tokenizer.stream(ids), reuse)


def collect(results: "Queue[Token | RequestError]") -> list[Token | RequestError]:
    """All results up to the last."""
    got = [results.get(timeout=60)]
    while isinstance(got[-1], Token) and got[-1].finish is None:
        got.append(results.get(timeout=60))
    return got


def test_requests_from_many_threads(engine: Engine) -> None:
    texts = [f"def f{n}(" for n in range(8)]
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3)
    expected = [list(engine.generate(text, params)) for text in texts]
    got: dict[int, list[Token | RequestError]] = {}

    def client(n: int) -> None:
        results: Queue[Token | RequestError] = Queue()
        service.submit(ask(engine, texts[n], params), results.put)
        got[n] = collect(results)

    with Service(engine) as service:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert service.counts() == Counts(0, 0)
    assert [got[n] for n in range(8)] == expected
    assert not service.thread.is_alive()


def test_who_goes_away_frees_its_place_within_a_step(engine: Engine) -> None:
    with Service(engine, queue=1) as service:
        results: list[Queue[Token | RequestError]] = [Queue() for _ in range(4)]
        handles = [service.submit(ask(engine, "x = ", LONG), r.put) for r in results[:3]]
        assert isinstance(results[0].get(timeout=60), Token)
        with pytest.raises(QueueFull, match="2 requests are being served and 1 waits"):
            service.submit(ask(engine, "x = ", LONG), results[3].put)
        handles[0].cancel()
        handles[0].cancel()
        assert isinstance(results[2].get(timeout=60), Token)  # the one that waited
        assert not handles[1].ended
        service.submit(ask(engine, "x = ", LONG), results[3].put).cancel()
    with pytest.raises(RequestError, match="stopping"):
        service.submit(ask(engine, "x = ", LONG), results[3].put)
    assert results[3].empty()
    last = None
    while not results[1].empty():
        last = results[1].get()
    assert isinstance(last, RequestError) and str(last) == STOPPING


def test_close_waits_for_what_runs(engine: Engine) -> None:
    results: Queue[Token | RequestError] = Queue()
    service = Service(engine)
    service.submit(ask(engine, "x = ", SamplingParams(max_new_tokens=30, ignore_eos=True)), results.put)
    began = time.monotonic()
    service.close(60)
    got = collect(results)
    assert len(got) == 30 and isinstance(got[-1], Token) and got[-1].finish == "length"
    assert time.monotonic() - began < 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_leaves_the_service_alone(engine: Engine) -> None:
    """Its thread is the parent's, and whatever it locks stays locked in the child."""
    results: Queue[Token | RequestError] = Queue()
    with Service(engine) as service:
        handle = service.submit(ask(engine, "x = ", LONG), results.put)
        results.get(timeout=60)
        with holding(service.changed):
            child = os.fork()
        if not child:
            try:
                handle.cancel()
                service.close(60)
                with pytest.raises(RequestError, match="fork"):
                    service.submit(ask(engine, "x = ", LONG), print)
                os._exit(0)
            finally:
                os._exit(1)
        end = time.monotonic() + 90
        while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.01)
        if found == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert found == (child, 0)
        handle.cancel()


@contextmanager
def holding(lock: threading.Condition) -> Iterator[None]:
    """Inside, another thread holds a lock."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_deliverer_that_fails_ends_nothing_else(engine: Engine) -> None:
    def fail(result: object) -> None:
        raise ValueError("mine")

    results: Queue[Token | RequestError] = Queue()
    with Service(engine) as service:
        handle = service.submit(ask(engine, "x = ", LONG), fail)
        service.submit(ask(engine, "y = ", SamplingParams(max_new_tokens=5)), results.put)
        assert isinstance(collect(results)[-1], Token)
        assert handle.ended


@pytest.mark.parametrize(
    "error", [RequestError("short of memory"), ValueError("mine"), BaseException("a panic")]
)
def test_the_service_outlives_whatever_fails(engine: Engine, error: BaseException) -> None:
    """The first KV cache cannot be made, then a forward fails."""
    params = SamplingParams(max_new_tokens=5, temperature=0)
    expected = list(engine.generate("x = ", params))

    def fail(*_: object) -> None:
        raise error

    def served() -> list[Token | RequestError]:
        results: Queue[Token | RequestError] = Queue()
        service.submit(ask(engine, "x = ", params), results.put)
        return collect(results)

    with Service(engine) as service:
        for place, name in ((service.batch.texts, "make"), (engine.runner, "finish")):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, name, fail)
                (failed,) = served()
            said = str(error) if isinstance(error, RequestError) else MISTAKE
            assert isinstance(failed, RequestError) and str(failed) == said
            assert service.counts() == Counts(0, 0)
            assert served() == expected
