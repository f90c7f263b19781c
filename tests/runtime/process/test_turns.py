"""Finalizers, signal handlers and forks in the middle of a request: nothing hangs, and no token is wrong."""

import ast
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime import Engine, EngineOptions, RequestError, SamplingParams
from runtime.experts.trace import Header, Miss, TraceWriter
from runtime.process.turns import Turns

PROMPT = [5, 6, 7]
PARAMS = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
KINDS: dict[str, dict[str, Any]] = {
    "resident": {"offload": "never"},
    "offloaded": {"offload": "always", "slots": 2, "prefetch": 2},
}


@pytest.fixture(params=KINDS)
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    options = EngineOptions(device="cpu", dtype="float32", **KINDS[request.param])
    with Engine.load(checkpoint, options) as engine:
        yield engine


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """End the test run if a test hangs. The main thread would wait in C for what its own frames hold."""
    ended = threading.Event()

    def watch() -> None:
        if not ended.wait(300):
            traceback.print_stack(sys._current_frames()[threading.main_thread().ident or 0])
            os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    ended.set()
    watcher.join()


def ids(engine: Engine, params: SamplingParams = PARAMS) -> list[int]:
    return [token.id for token in engine.generate(PROMPT, params)]


@contextlib.contextmanager
def in_a_step(engine: Engine, act: Callable[[], object], after: int = 2) -> Iterator[None]:
    """Inside, the thread that computes calls `act` once in the middle of a forward."""
    norm, left = engine.model.norm.forward, [after]

    def forward(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act()
        return norm(*args)

    model = engine.model
    model.norm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.norm.forward


def test_a_half_taken_generator_is_collected_in_the_middle_of_a_step(engine: Engine) -> None:
    expected = ids(engine)

    def abandon() -> None:
        tokens = engine.generate(PROMPT, PARAMS)
        next(tokens)
        cycle: dict[str, Any] = {"tokens": tokens}
        cycle["itself"] = cycle

    collected = []
    for _ in range(3):
        gc.disable()
        try:
            abandon()
            with in_a_step(engine, lambda: collected.append(gc.collect())):
                assert ids(engine) == expected
        finally:
            gc.enable()
    assert len(collected) == 3 and all(collected)
    assert len(engine.runner.idle_kvs) == 1


def test_generators_in_cycles_and_no_care_taken(engine: Engine) -> None:
    expected = ids(engine)
    for _ in range(30):
        tokens = engine.generate(PROMPT, PARAMS)
        next(tokens)
        cycle: dict[str, Any] = {"tokens": tokens}
        cycle["itself"] = cycle
        del tokens, cycle
        assert ids(engine) == expected


def test_what_a_handler_may_ask_for_in_the_middle_of_a_step(engine: Engine) -> None:
    expected, seen = ids(engine), list[Any]()

    def handler(number: int, frame: Any) -> None:
        seen.append(engine.stats().new_tokens)
        session = engine.session()
        session.close()
        for ask in (lambda: ids(engine), lambda: engine.logits(PROMPT)):
            with pytest.raises(RequestError, match="still serving another request") as caught:
                ask()
            assert "\n" not in str(caught.value)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with in_a_step(engine, lambda: os.kill(os.getpid(), signal.SIGUSR1)):
            assert ids(engine) == expected
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(seen) == 1 and ids(engine) == expected
    assert len(engine.logits(PROMPT)) == len(PROMPT)  # with the KV cache made in the middle of that forward


def test_a_session_closed_in_the_middle_of_its_step_keeps_its_cache(engine: Engine) -> None:
    """Another session may begin at once, and must not get the KV cache that the forward still writes to."""
    expected, others = ids(engine), list[Any]()
    session = engine.session()
    tokens = session.complete(PROMPT, PARAMS)

    def act() -> None:
        session.close()
        others.append(engine.session())

    got = []
    with in_a_step(engine, act), pytest.raises(RequestError, match="the session is closed"):
        for token in tokens:
            got.append(token.id)
    assert got == expected[: len(got)] and others[0].kv is not session.kv
    assert [token.id for token in others[0].complete(PROMPT, PARAMS)] == expected


def test_closed_in_the_middle_of_a_step(engine: Engine) -> None:
    got = []
    with in_a_step(engine, engine.close), pytest.raises(RequestError, match="the engine is closed; load"):
        for token in engine.generate(PROMPT, PARAMS):
            got.append(token.id)
    assert len(got) == 1
    assert not hasattr(engine, "model") and not engine.runner.idle_kvs
    if engine.runner.cache:
        assert engine.runner.cache.copies.ended and not hasattr(engine.runner.cache, "pool")
    engine.close()
    assert engine.stats().new_tokens == 1


def test_closed_by_another_thread_in_the_middle_of_a_step(engine: Engine) -> None:
    closing = threading.Thread(target=engine.close)

    def act() -> None:
        closing.start()
        while not engine.runner.closed:
            time.sleep(1e-3)
        assert hasattr(engine, "model")

    with in_a_step(engine, act), pytest.raises(RequestError, match="the engine is closed; load"):
        ids(engine)
    closing.join(30)
    assert not closing.is_alive() and not hasattr(engine, "model")


def test_closed_by_a_finalizer_in_the_copy_thread(checkpoint: Path) -> None:
    options = EngineOptions(device="cpu", dtype="float32", **KINDS["offloaded"])
    engine = Engine.load(checkpoint, options)
    assert engine.runner.cache is not None
    engine.runner.cache.copies.finished = lambda ticket: engine.close()  # a finalizer may come anywhere there
    with pytest.raises(RequestError, match="the engine is closed; load"):
        ids(engine)
    engine.runner.cache.copies.thread.join(30)
    assert engine.runner.cache.copies.ended and not hasattr(engine, "model")


def test_a_recording_left_by_a_finalizer_in_the_middle_of_a_step(checkpoint: Path, tmp_path: Path) -> None:
    options = EngineOptions(device="cpu", dtype="float32", **KINDS["offloaded"])
    with Engine.load(checkpoint, options) as engine:
        expected = ids(engine)
        recording = [engine.recording(tmp_path / "trace")]
        recording[0].__enter__()
        with in_a_step(engine, recording.clear):
            assert ids(engine) == expected
        assert engine.runner.cache is not None and engine.runner.cache.ledger.recorder is None


def test_a_trace_closed_in_the_middle_of_an_event(tmp_path: Path) -> None:
    header = Header(layers=1, experts=1, experts_per_token=1, slots=(1,), spares=0, policy="lru", seed=0,
                    expert_bytes=1)  # fmt: skip
    writer = TraceWriter.open(tmp_path / "trace", header)
    file = writer.file
    assert file is not None

    class Closing:
        def __getattr__(self, name: str) -> Any:
            writer.close()
            return getattr(file, name)

    writer.file = Closing()  # type: ignore[assignment]
    writer.add(Miss(step=1, layer=0, expert=0))
    assert file.closed
    writer.add(Miss(step=2, layer=0, expert=0))


def test_turns_are_given_back_whatever_happens() -> None:
    turns = Turns()
    with pytest.raises(KeyboardInterrupt):
        turns.take(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert turns.take(lambda: 1) == 1 and not turns.taken
    with pytest.raises(RequestError, match="still serving"):
        turns.take(lambda: turns.take(lambda: 1))
    other = threading.Thread(target=turns.take, args=(lambda: 1,))
    other.start()
    other.join(30)
    assert not other.is_alive()


def loops_under_locks(source: str) -> list[int]:
    """Lines of `while` loops directly inside of a lock's `with`."""
    return [
        inner.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.With)
        and any(ast.unparse(item.context_expr).endswith((".lock", ".turn")) for item in node.items)
        for inner in ast.walk(node)
        if isinstance(inner, ast.While)
    ]


def test_no_loop_stands_directly_under_a_lock() -> None:
    """In CPython 3.13.0 the jump back of a `while` is outside of the range that its `with` protects. An
    interrupt there leaves the lock taken."""
    assert loops_under_locks("with a.lock, b:\n    while x:\n        z()") == [2]
    assert loops_under_locks("with a.lock:\n    z()\nwhile x:\n    z()") == []
    folder = Path(runtime.__file__).parent
    found = {file.name: loops_under_locks(file.read_text("utf-8")) for file in folder.rglob("*.py")}
    assert "copying.py" in found and not {name: lines for name, lines in found.items() if lines}


FORKED = """
import os, sys, threading, time, warnings
warnings.simplefilter("ignore")
from runtime import Engine, EngineOptions, RequestError, SamplingParams
from runtime.experts import arena

options = {"offload": sys.argv[2], "slots": 2 if sys.argv[2] == "always" else None}
engine = Engine.load(sys.argv[1], EngineOptions(device="cpu", dtype="float32", threads=2, **options))
params = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
tokens, session = engine.generate([5, 6, 7], params), engine.session()
first = next(tokens)
held = threading.Event(), threading.Event()
def hold():  # the turn during the fork
    def work():
        held[0].set()
        held[1].wait()
    engine.runner.alone(work)
threading.Thread(target=hold).start()
held[0].wait()
child = os.fork()
if child == 0:
    try:
        for ask in (lambda: next(tokens), lambda: engine.generate([1], params), engine.session,
                    lambda: engine.logits([1]), lambda: next(session.complete([1], params))):
            try:
                ask()
                os._exit(3)
            except RequestError as error:
                assert "does not work in its fork" in str(error) and "\\n" not in str(error), error
        began = time.monotonic()
        session.close()
        engine.stats()
        arena.unregister([1], None, engine.runner.turns.process)  # asks no driver
        engine.close()
        del tokens, session, engine
        assert time.monotonic() - began < 30
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(4)
held[1].set()
deadline = time.monotonic() + 90
while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
    time.sleep(0.01)
if done == (0, 0):
    os.kill(child, 9)
assert done[1] == 0, done
assert len([first, *tokens]) == 4
engine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("offload", ["never", "always"])
def test_a_fork_is_refused_at_once_and_ends_quietly(checkpoint: Path, offload: str) -> None:
    program = [sys.executable, "-c", FORKED, str(checkpoint), offload]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
