"""Files that change below a running engine, interrupts, and ends, with experts in three tiers."""

import gc
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import Engine, EngineOptions, RequestError, SamplingParams
from runtime.experts import copying
from runtime.experts import files as module
from runtime.experts.files import OpenFile
from runtime.experts.split import Split
from tests.leftovers import open_below, until, workers
from tests.runtime.experts.interrupts import hammer_requests
from tests.runtime.experts.test_faults import Gate, taken
from tests.runtime.experts.test_tiers import none_lost

COUNT = 10
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "offload": "always", "slots": 2, "berths": 7, "lookahead": 2,
    "prefetch": 2,
}  # fmt: skip


@pytest.fixture
def folder(rigs: Any, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return shutil.copytree(rigs(4).folder, tmp_path / "model")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, EngineOptions(**OPTIONS)) as engine:
        assert engine.plan.berths == 7
        yield engine


# --- files


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(b"\xff" * path.stat().st_size)
    os.replace(other, path)


@pytest.mark.parametrize("change", [replace, Path.unlink, lambda path: path.chmod(0)])
def test_files_that_others_replace_or_remove_are_still_there(
    rigs: Any, engine: Engine, folder: Path, change: Callable[[Path], None]
) -> None:
    """Whoever has a file open keeps it as it was."""
    rig, cache = rigs(4), engine.runner.cache
    assert cache
    params = SamplingParams(max_new_tokens=COUNT, temperature=0, ignore_eos=True)
    for seed in range(3):
        tokens = engine.generate(rig.ids(9, seed), params)
        got = [next(tokens).id]
        read = cache.count().read_bytes
        if seed == 0:
            for path in folder.glob("*.safetensors"):
                change(path)
        got += [token.id for token in tokens]
        assert got == [token.id for token in rig.resident.generate(rig.ids(9, seed), params)]
        assert cache.count().read_bytes > read


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 1000)


@pytest.mark.parametrize("change", [cut, write])
@pytest.mark.parametrize("taken_before", [0, 1, 4])
def test_files_that_change_end_requests_until_the_model_is_loaded_again(
    rigs: Any, engine: Engine, folder: Path, change: Callable[[Path], None], taken_before: int
) -> None:
    rig, kept = rigs(4), {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    prompt = rig.ids(9)
    expected = [token for token, _ in rig.tokens(prompt, 3 * COUNT)]
    params = SamplingParams(max_new_tokens=3 * COUNT, temperature=1, top_p=1, seed=0, ignore_eos=True)
    tokens = engine.generate(prompt, params)
    got = [next(tokens).id for _ in range(taken_before)]
    for path in kept:
        change(path)
    ending = r"^[^\n]*\.safetensors[^\n]*; load the model again$"
    with pytest.raises(RequestError, match=ending):
        got.extend(token.id for token in tokens)  # one by one: those before the error are kept
    assert got == expected[: len(got)]
    with pytest.raises(RequestError, match=ending):
        engine.logits(rig.ids(40))
    for path, data in kept.items():
        path.write_bytes(data)
    with Engine.load(folder, EngineOptions(**OPTIONS)) as again:
        assert taken(again, prompt, COUNT) == (rig.tokens(prompt, COUNT), None)


# --- interrupts


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no such timer")
def test_interrupts_at_random_instructions(rigs: Any, engine: Engine) -> None:
    before = workers()
    rig = rigs(4)
    hammer_requests(60, engine, rig.ids(3))
    assert taken(engine, rig.ids(3), COUNT) == (rig.tokens(rig.ids(3), COUNT), None)
    assert engine.runner.cache
    none_lost(engine.runner.cache)
    assert len(workers() - before) <= module.READERS


@pytest.mark.parametrize("split", [None, Split(1.5, 1.0, demand=True)])
def test_interrupted_between_any_two_lines(rigs: Any, split: Split | None) -> None:
    """Ctrl-C comes at every 97th line of the bookkeeping in turn. What the host computes depends on what is
    in slots, which are empty at first."""
    files = ("residency.py", "slots.py", "policy.py", "store.py", "berths.py", "tickets.py", "copying.py")
    rig, left, failed = rigs(4), [0], 0
    prompt = rig.ids(3)
    main = threading.get_ident()

    def watch(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files) or threading.get_ident() != main:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return watch

    guesses = {"lookahead": 2 if split is None else 0, "prefetch": 2}
    with rig.cached(2, berths=7, **guesses, split=split) as cache:
        expected = rig.tokens(prompt, 3) if split is None else taken(rig.engine, prompt, 3)[0]
        for n in range(1, 4200, 97):
            if split is not None:
                cache.residency.forget()
            left[0] = n
            sys.settrace(watch)
            try:
                got, error = taken(rig.engine, prompt, 3)
            finally:
                sys.settrace(None)
            failed += isinstance(error, KeyboardInterrupt)
            assert got == expected[: len(got)]
            if split is not None:
                cache.residency.forget()
            assert taken(rig.engine, prompt, 3) == (expected, None)
            if split is None:  # otherwise one may still be on its way to a slot
                none_lost(cache)
    assert failed > 20


# --- ends


class ReadGate:
    """Reads nothing until a test opens it."""

    def __init__(self) -> None:
        self.reached_it, self.open = threading.Event(), threading.Event()
        self.original = module.read_at

    def __call__(self, file: OpenFile, memory: memoryview, offset: int) -> int:
        self.reached_it.set()
        assert self.open.wait(60)
        return self.original(file, memory, offset)


@pytest.mark.parametrize("channel", ["up", "back", "reads"])
def test_closing_while_a_channel_is_busy(
    rigs: Any, folder: Path, channel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, before = rigs(4).ids(9), workers()

    def close_busy() -> None:
        engine = Engine.load(folder, EngineOptions(**OPTIONS))
        cache = engine.runner.cache
        assert cache and cache.store.files and len(workers() - before) >= 3 and open_below(folder)
        gate: Any = ReadGate() if channel == "reads" else Gate()
        if channel == "reads":
            monkeypatch.setattr(module, "read_at", gate)
        else:
            getattr(cache.store.channels, channel).link = gate
        outcome: list[Any] = []
        request = threading.Thread(target=lambda: outcome.append(taken(engine, prompt, 4 * COUNT)))
        request.start()
        assert gate.reached_it.wait(60)
        closing = threading.Thread(target=engine.close)
        closing.start()
        request.join(60)
        ((_, error),) = outcome  # though the channel has not moved
        assert isinstance(error, RequestError) and str(error) == "the engine is closed; load it again"
        gate.open.set()
        closing.join(60)
        assert not closing.is_alive() and not workers() - before
        assert not hasattr(cache, "pool") and not hasattr(cache.store.arena, "berths")
        assert not cache.store.files.files, "closed"

    close_busy()
    gc.collect()
    assert open_below(folder) == [], "those of mappings are closed with the last tensor"


def test_closing_does_not_wait_for_ever_for_a_read(
    rigs: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory stays until the read has ended, and its file stays open."""
    monkeypatch.setattr(copying, "LIMIT", 0.1)
    before, gate = workers(), ReadGate()
    engine = Engine.load(folder, EngineOptions(**OPTIONS))
    cache = engine.runner.cache
    assert cache and cache.store.files
    monkeypatch.setattr(module, "read_at", gate)
    request = threading.Thread(target=taken, args=(engine, rigs(4).ids(9), COUNT))
    request.start()
    assert gate.reached_it.wait(60)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 30 and workers() - before
    assert cache.store.files.files and hasattr(cache.store.arena, "berths")
    gate.open.set()
    request.join(60)
    until(lambda: not workers() - before, workers)
    assert not cache.store.files.files


@pytest.mark.parametrize("closed", [True, False])
def test_no_thread_outlives_its_engine_and_no_file_stays_open(rigs: Any, folder: Path, closed: bool) -> None:
    before = workers()
    for _ in range(3):
        engine = Engine.load(folder, EngineOptions(**OPTIONS))
        tokens = engine.generate(rigs(4).ids(3), SamplingParams(max_new_tokens=COUNT))
        next(tokens)
        assert open_below(folder) and workers() - before
        if closed:
            engine.close()
            assert not workers() - before
        del engine, tokens
        gc.collect()
        until(lambda: not workers() - before and not open_below(folder), workers)
