"""Copies that fail, crawl or are abandoned: one clear error, no wrong token before it, and a right answer to
the next request."""

import _thread
import gc
import os
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import Engine, EngineOptions, RequestError, SamplingParams
from runtime.experts import copying
from runtime.experts.link import HostLink
from runtime.experts.tickets import TransferError
from tests.leftovers import handles, workers

COUNT = 12


def taken(engine: Engine, prompt: Any, count: int, seed: int = 0) -> tuple[list[Any], BaseException | None]:
    """The tokens of a request until it ends or fails, and the error."""
    params = SamplingParams(max_new_tokens=count, temperature=1, top_p=1, seed=seed, ignore_eos=True)
    got: list[Any] = []
    try:
        for token in engine.generate(prompt, params):
            got.append((token.id, token.logprob))
    except (RequestError, KeyboardInterrupt) as error:
        return got, error
    return got, None


def order(cache: Any, layer: int, demand: bool) -> None:
    """Order a copy of an expert that has no slot to slot 0."""
    table = cache.residency.tables[layer]
    expert = next(e for e in range(cache.store.experts) if table.find(e) is None)
    label = (0, layer, expert, "demand" if demand else "guess")
    cache.store.claim(label)
    cache.residency.send(label, 0)


def fails_cleanly(rig: Any, prompt: list[int], link: Any) -> bool:
    """Make a request that may fail, then one that must not. Returns whether the first failed."""
    expected = rig.tokens(prompt, COUNT)
    got, error = taken(rig.engine, prompt, COUNT)
    link.fails = lambda n, demand: False
    assert got == expected[: len(got)]
    if error is None:
        assert len(got) == COUNT
    else:
        assert isinstance(error, TransferError) and "\n" not in str(error)
        assert "an expert could not be copied to the device (the bus is on strike)" in str(error)
    assert taken(rig.engine, prompt, COUNT) == (expected, None)
    return error is not None


@pytest.mark.parametrize("lookahead", [0, 2])
def test_every_piece_may_be_the_one_that_fails(rig: Any, faulty: Any, lookahead: int) -> None:
    prompt, piece, failed = rig.ids(3), rig.form.blob_bytes // 2, 0
    for k in (*range(12), *range(12, 130, 9)):
        link = faulty(lambda n, demand, k=k: n == k, piece)
        with rig.cached(3, lookahead=lookahead, prefetch=2, link=link):
            failed += fails_cleanly(rig, prompt, link)  # not if it was that of a wrong guess
    assert failed > 5


def test_only_guesses_fail(rig: Any, faulty: Any) -> None:
    link = faulty(lambda n, demand: not demand, rig.form.blob_bytes // 3)
    prompt = rig.ids(7)
    with rig.cached(2, lookahead=2, prefetch=2, link=link) as cache:
        for _ in range(20):
            got, error = taken(rig.engine, prompt, COUNT)
            assert got == rig.tokens(prompt, COUNT)[: len(got)]
            assert error is None or isinstance(error, TransferError)  # the guess had come true by then
        assert cache.ledger.counters.guesses > 20


def test_a_failed_guess_that_comes_true_is_copied_anew(rig: Any, faulty: Any) -> None:
    link = faulty(lambda n, demand: not demand, rig.form.blob_bytes)
    prompt = rig.ids(7)
    with rig.cached(2, lookahead=1, prefetch=2, link=link) as cache:
        guess = cache.residency.guess

        def then_wait(*args: Any) -> None:
            guess(*args)
            for ticket in list(cache.residency.tickets.values()):
                while not ticket.complete and not ticket.error:
                    time.sleep(1e-5)

        cache.residency.guess = then_wait
        assert taken(rig.engine, prompt, COUNT) == (rig.tokens(prompt, COUNT), None)
        assert cache.ledger.counters.guesses > 20 and cache.ledger.counters.used_guesses == 0


def test_half_of_all_pieces_fail(rig: Any, faulty: Any) -> None:
    chance, prompt = random.Random(0), rig.ids(2)
    rate = [0.0]
    link = faulty(lambda n, demand: chance.random() < rate[0], rig.form.blob_bytes // 2)
    with rig.cached(3, lookahead=2, prefetch=3, link=link):
        outcomes = []
        for turn in range(60):
            rate[0] = (0.0, 0.01, 0.5)[turn % 3]
            got, error = taken(rig.engine, prompt, COUNT, seed=turn % 2)
            assert got == rig.tokens(prompt, COUNT, turn % 2)[: len(got)]
            outcomes.append(error is None)
        assert all(outcomes[::3]) and not any(outcomes[2::3])


def test_a_very_slow_link_changes_nothing(rig: Any) -> None:
    with rig.cached(2, prefetch=2, link=HostLink(4e6)) as cache:
        assert taken(rig.engine, rig.ids(2), 4) == (rig.tokens(rig.ids(2), 4), None)
        assert cache.ledger.counters.stall_seconds > 0


def test_a_failed_turn_of_a_session(rig: Any, faulty: Any) -> None:
    """The session goes on where the failed request left it. Its KV cache holds nothing of the failed
    forward."""
    fail = [False]
    link = faulty(lambda n, demand: fail[0] and demand, rig.form.blob_bytes)
    params = SamplingParams(max_new_tokens=6, temperature=1, seed=1, ignore_eos=True)
    prompt = rig.ids(20)
    expected = [token.id for token in rig.resident.generate(prompt, params)]
    with rig.cached(2, link=link), rig.engine.session() as session:
        tokens = session.complete(prompt, params)
        made = [next(tokens).id for _ in range(3)]
        fail[0] = True
        with pytest.raises(TransferError):
            made += [token.id for token in tokens]
        fail[0] = False
        assert made == expected[:3]
        assert [token.id for token in session.complete(prompt, params)] == expected


# --- ends


class Gate(HostLink):
    """Moves nothing until a test opens it."""

    def __init__(self) -> None:
        super().__init__()
        self.reached_it, self.open = threading.Event(), threading.Event()

    def move(self, *args: Any) -> None:
        self.reached_it.set()
        assert self.open.wait(60)
        super().move(*args)


@pytest.mark.parametrize("opens", [True, False])
def test_closing_while_a_request_waits(variant: Callable[..., Path], opens: bool) -> None:
    engine = Engine.load(variant(), EngineOptions(device="cpu", dtype="float32", offload="always", slots=2))
    assert engine.runner.cache
    engine.runner.cache.copies.link = gate = Gate()
    outcome: list[Any] = []
    request = threading.Thread(target=lambda: outcome.append(taken(engine, [5, 6, 7], 4)))
    request.start()
    assert gate.reached_it.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    request.join(60)
    ((got, error),) = outcome  # though the link has not moved
    assert got == [] and isinstance(error, RequestError)
    assert str(error) == "the engine is closed; load it again"
    gate.open.set()
    closing.join(60)
    assert not closing.is_alive() and not engine.runner.cache.copies.thread.is_alive()
    with pytest.raises(RequestError, match="the engine is closed"):
        engine.generate([1])
    engine.close()
    assert engine.stats().copied_bytes >= 0


def test_closing_does_not_wait_for_ever_and_memory_stays_until_the_piece_has_passed(
    variant: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "LIMIT", 0.1)
    engine = Engine.load(variant(), EngineOptions(device="cpu", dtype="float32", offload="always", slots=2))
    assert engine.runner.cache
    engine.runner.cache.copies.link = gate = Gate()
    order(engine.runner.cache, layer=0, demand=True)
    assert gate.reached_it.wait(60)
    copies, arena = engine.runner.cache.copies, weakref.ref(engine.runner.cache.store.arena)
    engine.close()
    assert copies.closed and not copies.ended and not hasattr(engine.runner.cache, "pool")
    del engine
    gc.collect()
    assert arena() is not None and hasattr(arena(), "berths"), "a piece of it is under way"
    gate.open.set()
    copies.thread.join(60)
    gc.collect()
    assert copies.ended and arena() is None


def test_no_thread_outlives_its_engine_and_no_memory(variant: Callable[..., Path]) -> None:
    folder, before = variant(), workers()
    options = EngineOptions(device="cpu", dtype="float32", offload="always", slots=2, link_gbps=0.001)
    for closed in (True, False):
        engine = Engine.load(folder, options)
        assert [t.name for t in workers() - before] == ["expert-copies"]
        tokens = engine.generate([1, 2, 3])
        next(tokens)
        cache = engine.runner.cache
        assert cache
        order(cache, layer=1, demand=False)  # never waited for
        thread = cache.copies.thread
        if closed:
            engine.close()
            assert not workers() - before
            assert not hasattr(cache, "pool") and not hasattr(cache.store.arena, "berths")
        del engine, cache, tokens
        gc.collect()
        thread.join(60)
        assert not workers() - before


def test_a_request_left_midway(rig: Any) -> None:
    prompt = rig.ids(7)
    with rig.cached(2, prefetch=2) as cache:
        tokens = rig.engine.generate(prompt, SamplingParams(max_new_tokens=50, seed=1))
        next(tokens), next(tokens)
        tokens.close()
        assert not cache.residency.tickets
        assert taken(rig.engine, prompt, COUNT) == (rig.tokens(prompt, COUNT), None)


def test_interrupted_while_waiting_for_a_copy(rig: Any) -> None:
    gate, prompt = Gate(), rig.ids(7)
    with rig.cached(2, link=gate):

        def interrupt() -> None:
            assert gate.reached_it.wait(60)
            time.sleep(0.05)
            _thread.interrupt_main()
            gate.open.set()

        thread = threading.Thread(target=interrupt)
        thread.start()
        got, error = taken(rig.engine, prompt, COUNT)
        thread.join()
        assert isinstance(error, KeyboardInterrupt) and got == []
        assert taken(rig.engine, prompt, COUNT) == (rig.tokens(prompt, COUNT), None)


def test_interrupted_between_any_two_lines(rig: Any) -> None:
    """Ctrl-C comes at every 23rd line of the bookkeeping in turn."""
    files = ("cache.py", "residency.py", "slots.py", "policy.py")
    prompt, left = rig.ids(3), [0]
    main = threading.main_thread()

    def watch(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files) or "experts" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return watch

    expected, failed = rig.tokens(prompt, 3), 0
    with rig.cached(2, "lru", lookahead=2, prefetch=2, link=HostLink()) as cache:
        assert threading.current_thread() is main
        for n in range(1, 2400, 23):
            left[0] = n
            sys.settrace(watch)
            try:
                got, error = taken(rig.engine, prompt, 3)
            finally:
                sys.settrace(None)
            failed += isinstance(error, KeyboardInterrupt)
            assert got == expected[: len(got)]
            assert taken(rig.engine, prompt, 3) == (expected, None)
            slots = sorted(
                [slot for table in cache.residency.tables for slot in table.slots]
                + cache.residency.spares.free
            )
            assert slots == list(range(len(cache.residency.last_use)))
    assert failed > 60


# --- many at once, and for long


def test_two_threads_get_what_each_would_get_alone(rig: Any, jitter: Any) -> None:
    prompts = [rig.ids(n, seed=n) for n in (5, 40, 3, 17)]
    expected = [rig.tokens(prompt, 30, seed) for seed, prompt in enumerate(prompts)]
    with rig.cached(3, lookahead=2, prefetch=2, link=jitter(1, rig.form.blob_bytes)):
        outcomes: dict[int, Any] = {}

        def serve(seed: int) -> None:
            outcomes[seed] = taken(rig.engine, prompts[seed], 30, seed)

        workers = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert [outcomes[seed] for seed in range(4)] == [(tokens, None) for tokens in expected]


def footprint() -> tuple[int, set[str]]:
    """Resident memory in KiB; the numbers of threads and of file handles with what these are of."""
    with open("/proc/self/status") as file:
        values = dict(line.split(":", 1) for line in file)
    return int(values["VmRSS"].split()[0]), {*os.listdir("/proc/self/task"), *handles()}


@pytest.mark.slow
def test_thousands_of_tokens_leave_nothing_behind(rig: Any, faulty: Any) -> None:
    chance = random.Random(1)
    link = faulty(lambda n, demand: chance.random() < 2e-4, rig.form.blob_bytes // 2)
    marks, made = [], 0
    with rig.cached(3, lookahead=2, prefetch=2, link=link):
        while made < 4000:
            with rig.engine.session() as session:
                for _ in range(chance.randint(1, 3)):
                    prompt = rig.ids(chance.randint(1, 60), chance.randint(0, 9))
                    tokens = session.complete(prompt, SamplingParams(max_new_tokens=80, ignore_eos=True))
                    try:
                        for _ in range(chance.randint(1, 80)):
                            if next(tokens, None) is None:
                                break
                            made += 1
                    except TransferError:
                        pass
            link.pieces.clear()
            gc.collect()
            marks.append((made, *footprint()))
    middle = next(mark for mark in marks if mark[0] >= 2000)
    print("tokens, RSS in KiB:", [mark[:2] for mark in (marks[0], middle, marks[-1])])
    assert marks[-1][1] - middle[1] < 4 << 10  # over the second 2000 tokens
    assert not marks[-1][2] - middle[2]
    assert taken(rig.engine, rig.ids(3), 5)[0] == rig.tokens(rig.ids(3), 5)
    assert torch.is_inference_mode_enabled() is False
