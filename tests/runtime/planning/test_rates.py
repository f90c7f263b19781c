"""Rates of disk and link: real reads, file systems that refuse, and a link that is a stand-in."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import open_checkpoint
from runtime import Engine, EngineOptions
from runtime.engine import DEMO
from runtime.planning import rates
from runtime.planning.planner import expert_runs
from runtime.planning.rates import DIRECT, PART, DiskRates, cut, measure_disk, measure_link, with_rates
from tests.quantized import quantize_folder
from tests.runtime.planning.asked import SMALL, plan

GPU = torch.device("cuda", 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20) * 24)
    return path


def test_a_file_is_read_both_ways(file: Path) -> None:
    began = time.perf_counter()
    found = measure_disk([(file, 5000, file.stat().st_size - 9000)])
    assert time.perf_counter() - began < 60
    assert found.buffered is not None and 1e-4 < found.buffered < 1e3
    assert found.reading == (found.direct if found.go_direct else found.buffered)


def test_pieces_are_whole_and_aligned_and_within_their_run() -> None:
    path = Path("f")
    for run in ((path, 5000, 3 * PART), (path, 0, PART), (path, 8, 70_000), (path, 1, 4100)):
        pieces, end = list(cut(run)), run[1]
        for _, offset, size in pieces:
            assert offset % DIRECT == size % DIRECT == 0 and 0 < size <= PART and offset >= end
            end = offset + size
        assert end <= run[1] + run[2]
        assert sum(size for _, _, size in pieces) > run[2] - PART - 2 * DIRECT
    assert list(cut((path, 1, 4000))) == []


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), ValueError("embedded null byte")])
def test_a_way_that_the_file_system_refuses_is_unknown(
    file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    opened, direct = os.open, getattr(os, "O_DIRECT", 0o40000)
    monkeypatch.setattr(os, "O_DIRECT", direct, raising=False)

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & direct:
            raise error
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    found = measure_disk([(file, 0, 24 << 20)])
    assert found.direct is None and found.reading == found.buffered is not None
    monkeypatch.delattr(os, "O_DIRECT")
    assert measure_disk([(file, 0, 24 << 20)]).direct is None


def test_nothing_to_read_is_unknown(tmp_path: Path) -> None:
    for runs in ([], [(tmp_path / "none", 0, 1 << 20)], [(tmp_path, 0, 1 << 20)], [(tmp_path, 0, 9)]):
        assert measure_disk(runs) == DiskRates(None, None)
    assert DiskRates(None, None).reading is None
    (tmp_path / "short").write_bytes(b"x" * 100)  # cut short since its header was read
    assert measure_disk([(tmp_path / "short", 0, 1 << 23)]).reading is None


def test_only_what_the_options_leave_open_and_a_plan_needs_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(rates, "measure_link", lambda device: asked.append("link") or 20.0)
    monkeypatch.setattr(rates, "measure_disk", lambda runs: asked.append("disk") or DiskRates(3.0, 2.0))

    def rated(device: str = "cuda", **options: Any) -> tuple[Any, ...]:
        asked.clear()
        made = plan(SMALL, torch.float32, 100, from_files=True, shared=device == "cpu", **options)
        got = with_rates(made)
        assert got == replace(made, link_gbps=got.link_gbps, disk_gbps=got.disk_gbps)
        return *asked, got.link_gbps, got.disk_gbps

    assert rated() == (None, None), "all experts are resident"
    assert rated(offload="always") == ("link", 20.0, None)
    assert rated(offload="always", berths=5) == ("link", "disk", 20.0, 3.0)
    assert rated(offload="always", berths=5, link_gbps=9) == ("disk", 9.0, 3.0)
    assert rated(offload="always", berths=5, link_gbps=9, disk_gbps=1) == (9.0, 1.0)
    assert rated("cpu", offload="always", berths=5) == ("disk", None, 3.0)
    assert rated("cpu", offload="always", berths=5, disk_gbps=2) == (None, 2.0)


def test_experts_of_a_checkpoint_are_read_to_plan_it(tmp_path: Path) -> None:
    """The runs are all of its experts, and an engine's plan has the disk's rate."""
    folder = quantize_folder(DEMO, tmp_path / "demo", "4")
    checkpoint = open_checkpoint(folder)
    runs = expert_runs(checkpoint)
    pieces = [piece for piece in checkpoint.layout.pieces if ".experts." in piece.rows.parameter]
    assert sum(size for _, _, size in runs) == sum(piece.bytes for piece in pieces) and len(runs) <= 9
    options = EngineOptions(device="cpu", dtype="float32", offload="always", slots=2, berths=20)
    planned = Engine.plan(folder, options)
    assert planned.tiered and planned.file_experts == 64 + 2 - 20 - 16
    assert planned.disk_gbps is not None and planned.disk_gbps > 0 and planned.link_gbps is None
    assert "experts read from files; a miss takes" in str(planned)
    given = Engine.plan(folder, replace(options, disk_gbps=0.5, link_gbps=2))
    assert (given.disk_gbps, given.link_gbps) == (0.5, 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_link_of_this_gpu() -> None:
    """PCIe 2.0 with 4 lanes moves 1.5 GB/s, and no link of today a TB/s. Nothing stays allocated."""
    torch.zeros(1, device=GPU)
    measure_link.cache_clear()
    before, began = torch.cuda.memory_allocated(GPU), time.perf_counter()
    rate = measure_link(GPU)
    assert rate is not None and 0.5 < rate < 1000 and time.perf_counter() - began < 5
    assert torch.cuda.memory_allocated(GPU) == before


class Mark:
    """An event, each one recorded 2 ms after the one before."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None

    def record(self) -> None:
        Mark.made += 1
        self.at = 2.0 * Mark.made

    def elapsed_time(self, end: "Mark") -> float:
        assert self.at is not None and end.at is not None
        return end.at - self.at


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A GPU whose memory is the host's."""
    monkeypatch.setattr(rates.Arena, "register", lambda arena, flat, distance: flat.numel())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        rates.torch, "empty_like", lambda source, device: torch.zeros(source.shape, dtype=source.dtype)
    )
    measure_link.cache_clear()
    yield monkeypatch
    measure_link.cache_clear()


def test_the_link_is_timed_by_events(stand_in: pytest.MonkeyPatch) -> None:
    assert measure_link(GPU) == pytest.approx(rates.LINK_BYTES / 2e-3 / 1e9)
    recorded = Mark.made
    assert measure_link(GPU) and Mark.made == recorded, "a device is measured once"


def test_a_link_that_cannot_be_measured_is_unknown(stand_in: pytest.MonkeyPatch) -> None:
    stand_in.setattr(rates.Arena, "register", lambda arena, flat, distance: 0)
    assert measure_link(GPU) is None, "the driver locks nothing"
    measure_link.cache_clear()
    stand_in.setattr(rates.Arena, "register", lambda arena, flat, distance: flat.numel())
    stand_in.setattr(torch.cuda, "Event", lambda **words: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    assert measure_link(GPU) is None


def test_reads_go_past_the_cache_unless_that_is_much_slower() -> None:
    assert DiskRates(1.7, 2.0).go_direct and DiskRates(1.7, 2.0).reading == 1.7
    assert not DiskRates(1.5, 2.0).go_direct and DiskRates(1.5, 2.0).reading == 2.0
    assert not DiskRates(None, 2.0).go_direct and DiskRates(3.0, None).go_direct
