"""Experts in files: the same bytes from any offset, around the system's cache or through it."""

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import LoadError
from runtime.experts import files as module
from runtime.experts.arena import DIRECT, Arena
from runtime.experts.files import DiskLink, ExpertFiles
from runtime.experts.tickets import ReadError
from tests.leftovers import open_below

GUARD = 77


def make_file(path: Path, sizes: list[int], seed: int = 0) -> bytes:
    """A file of random bytes, of these sizes one after the other."""
    data = random.Random(seed).randbytes(sum(sizes))
    path.write_bytes(data)
    return data


def read_all(files: ExpertFiles, size: int, piece: int | None = None) -> dict[tuple[int, int], bytes]:
    """Every expert, each read to a berth between two others, whose bytes stay."""
    arena, disk, found = Arena(3, size, tiered=True), DiskLink(files), {}
    if piece is not None:
        disk.piece = piece
    try:
        for (layer, e), extent in files.extents.items():
            arena.berths.fill_(GUARD)
            memory = arena.berth(1)[files.shift(layer, e) :][:size]
            start = 0
            while start < size:
                part = extent[start : min(start + disk.piece, size)]
                disk.move(part, memory[start : start + part.numel()], True)
                start += part.numel()
            found[layer, e] = bytes(memory.numpy())
            assert torch.all(arena.berth(0) == GUARD) and torch.all(arena.berth(2) == GUARD)
    finally:
        disk.readers.shutdown()
        arena.close()
    return found


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("way", ["disk", "memory", "no preadv"])
def test_bytes_from_every_offset(
    tmp_path: Path, way: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last expert ends where the file does, in the middle of a block."""
    monkeypatch.setattr(module, "PART", 2 * DIRECT)
    folder = tmp_path
    if way == "memory":
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("the system has no files in memory")
        folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    if way == "no preadv":
        monkeypatch.delattr(os, "preadv", raising=False)
    try:
        for size in (DIRECT - 1, 3 * DIRECT + 7, 5 * DIRECT):
            header = random.Random(size).randrange(1, DIRECT)
            gaps = [header, *range(0, DIRECT, 97)]
            path, places, offset = folder / f"{size}.bin", dict[tuple[int, int], tuple[Path, int]](), 0
            for n, gap in enumerate(gaps):
                offset += gap
                places[0, n] = path, offset
                offset += size
            data = make_file(path, [offset])
            files = ExpertFiles(places, size, direct)
            try:
                for piece in (None, 2 * DIRECT):
                    found = read_all(files, size, piece)
                    for key, (_, begin) in places.items():
                        assert found[key] == data[begin : begin + size], (key, begin % DIRECT)
            finally:
                files.close()
            assert len({begin % DIRECT for _, begin in places.values()}) > 30
            path.unlink()
    finally:
        if folder is not tmp_path:
            folder.rmdir()


def test_direct_reads_leave_nothing_in_the_systems_cache(tmp_path: Path) -> None:
    """Where the file system can do them: see `go_direct`."""
    make_file(tmp_path / "a", [9 * DIRECT])
    files = ExpertFiles({(0, 0): (tmp_path / "a", 100)}, 8 * DIRECT, direct=True)
    (file,) = files.files.values()
    flags = 0
    if sys.platform == "linux":
        import fcntl

        flags = fcntl.fcntl(file.descriptor, fcntl.F_GETFL) & os.O_DIRECT
    assert file.direct == bool(flags)
    if file.direct:
        assert not module.go_direct(file.descriptor, False)
        assert not fcntl.fcntl(file.descriptor, fcntl.F_GETFL) & os.O_DIRECT
    files.close()


def test_a_file_that_is_not_there_or_may_not_be_read(tmp_path: Path) -> None:
    make_file(tmp_path / "a", [9])
    places = {(0, 0): (tmp_path / "a", 0), (0, 1): (tmp_path / "b", 0)}
    with pytest.raises(LoadError, match=r"/b: No such file or directory$"):
        ExpertFiles(places, 9, direct=True)
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("change", ["cut", "written", "grown"])
def test_a_file_that_changed_gives_no_bytes(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    make_file(path, [9 * DIRECT])
    files = ExpertFiles({(0, 0): (path, 100)}, 8 * DIRECT, direct=True)
    read_all(files, 8 * DIRECT)
    with path.open("r+b") as file:
        if change == "cut":
            file.truncate(DIRECT)
        else:
            file.seek(0, os.SEEK_END if change == "grown" else os.SEEK_SET)
            file.write(b"x")
    with pytest.raises(ReadError, match=r"/a\.safetensors was written to .*; load the model again$"):
        read_all(files, 8 * DIRECT)
    files.close()


def test_a_file_that_changes_during_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    make_file(path, [9 * DIRECT])
    files = ExpertFiles({(0, 0): (path, 100)}, 8 * DIRECT, direct=True)
    original = module.read_at

    def read_at(file: Any, memory: memoryview, offset: int) -> int:
        count = original(file, memory, offset)
        with path.open("r+b") as other:
            other.write(b"x")
        return count

    monkeypatch.setattr(module, "read_at", read_at)
    with pytest.raises(ReadError, match="was written to"):
        read_all(files, 8 * DIRECT)
    files.close()
