"""Loads that fail leave no thread, and no file open."""

import contextlib
import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime import Engine, EngineOptions, LoadError
from runtime.errors import DeviceError
from tests.leftovers import open_below, until, workers


@pytest.mark.parametrize("tiers", [False, True])
def test_a_load_that_fails_anywhere(
    variant: Callable[..., Path], rigs: Any, tmp_path: Path, tiers: bool
) -> None:
    """An error comes at every other line that makes an engine and its cache, from the arena to the first
    use."""
    made = ("startup.py", "runner.py", "cache.py", "making.py", "copying.py")
    made = (*made, "store.py", "experts/files.py") if tiers else made
    ends = ("close", "end", "let_go", "drop", "in_its_thread", "all", "wake_up")
    folder = shutil.copytree(rigs(4).folder, tmp_path / "own") if tiers else variant()
    options = EngineOptions(
        device="cpu", dtype="float32", offload="always", slots=2, berths=7 if tiers else None
    )
    before, left, failed, stride = workers(), [0], list[str](), 14 if tiers else 4

    def watch(frame: Any, event: str, arg: Any) -> Any:
        name = frame.f_code.co_name
        if not frame.f_code.co_filename.endswith(made) or name in ends or name.startswith("<"):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                failed.append(name)
                raise MemoryError
        return watch

    for n in range(12, 4000, stride):
        left[0] = n
        sys.settrace(watch)
        loaded = False
        with contextlib.suppress(MemoryError, DeviceError):
            try:
                Engine.load(folder, options).close()
                loaded = True
            finally:
                sys.settrace(None)
        gc.collect()
        until(lambda: not workers() - before and not open_below(folder), workers)  # finalizers act
        if loaded:
            break
    assert loaded and len(failed) > 25
    assert {"make_cache", "__init__", "load_weights"} <= set(failed)  # which have many lines


def test_a_file_cut_off_between_opening_and_reading(variant: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(variant(), tmp_path / "cut")
    (file,) = folder.glob("*.safetensors")
    before, data = workers(), file.read_bytes()

    @contextmanager
    def shrinking(total: int) -> Iterator[Callable[[int], None]]:
        file.write_bytes(data[: len(data) // 2])  # headers have been checked by now
        yield lambda size: None

    options = EngineOptions(device="cpu", dtype="float32", offload="always")
    with pytest.raises(LoadError, match=r"ended \d+ bytes early") as caught:
        Engine.load(folder, options, progress=shrinking)
    assert "\n" not in str(caught.value) and not workers() - before and not open_below(folder)
    file.write_bytes(data)
    with Engine.load(folder, options) as engine:
        assert len(engine.logits([1, 2])) == 2
    assert not workers() - before and not open_below(folder)


@pytest.mark.parametrize("change", ["replaced", "written"])
def test_a_file_that_changes_during_the_load(rigs: Any, tmp_path: Path, change: str) -> None:
    """Some experts are in memory by then, and the others would be read from another file."""
    folder = shutil.copytree(rigs(4).folder, tmp_path / "model")
    path = max(folder.glob("*.safetensors"))
    kept, before = path.read_bytes(), workers()

    @contextmanager
    def changing(total: int) -> Iterator[Callable[[int], None]]:
        """Acts when half of everything has been read."""
        read = 0

        def advance(size: int) -> None:
            nonlocal read
            if read <= total // 2 < read + size:
                if change == "written":
                    path.touch()
                else:
                    path.unlink()
                    path.write_bytes(kept)
            read += size

        yield advance

    options = EngineOptions(device="cpu", dtype="float32", offload="always", slots=2, berths=7)
    with pytest.raises(LoadError, match=rf"{path.name} was replaced or written to .*; load the model again$"):
        Engine.load(folder, options, progress=changing)
    assert not workers() - before and not open_below(folder)
    path.write_bytes(kept)
    Engine.load(folder, options).close()
