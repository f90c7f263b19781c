"""`python -m tools.bench link` on buffers small enough for a test: what it copies, not how fast."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.experts.arena import Arena
from runtime.experts.link import HostLink
from tools.bench import command as bench
from tools.bench import link

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["link", "--device", "cpu", "--repeats", "2"]
    assert bench.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["copies"] == "no GPU: copies within host memory" and report["device"] == "cpu"
    assert [row["copies of"] for row in report["link_gb_per_s"]] == ["64.0 KiB", "256.0 KiB", "1.0 MiB"]
    assert all(row["pieces"] > 0 and row["whole"] > 0 for row in report["link_gb_per_s"])
    assert report["memory_gb_per_s"] > 0
    assert bench.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["copies", "of", "pieces", "whole"]
    assert [line.split()[:2] for line in lines[-3:]] == [["64.0", "KiB"], ["256.0", "KiB"], ["1.0", "MiB"]]


def test_all_bytes_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    host = HostLink()
    host.piece = 12
    for copy in (link.whole, link.in_pieces(host)):
        for size in (16, 64):
            target.zero_()
            assert link.measure(CPU, source, target, size, copy, repeats=1) > 0
            assert torch.equal(source, target)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["link", "--device", "cuda:99"]) == 1
    assert capsys.readouterr().err.startswith("error: device cuda:99: ")


class Stand:
    """In for a CUDA link: notes what it was asked to copy, and from what memory."""

    piece = 1 << 18
    log: list[tuple[bool, int]]

    def __init__(self, device: torch.device, locked: Callable[[Tensor], bool] | None = None) -> None:
        assert device == CUDA
        self.pinned = locked is None

    def begin(self, free: None) -> None: ...

    def prepare(self, source: Tensor, demand: bool) -> Tensor:
        return source

    def move(self, source: Tensor, target: Tensor, demand: bool) -> None:
        assert demand
        self.log.append((self.pinned, source.numel()))
        target.copy_(source)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A GPU's memory is the host's; waits and returns of memory are counted."""
    calls = {"synchronize": 0, "empty_cache": 0, "register": 0}

    def counted(name: str, result: Any = None) -> Any:
        def call(*arguments: object) -> Any:
            calls[name] += 1
            return result

        return call

    for name in ("zeros", "ones"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, make=make, device=None, **kw: make(*shape, **kw))
    monkeypatch.setattr(torch.cuda, "synchronize", counted("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", counted("empty_cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(link, "pick_device", lambda name: CUDA)
    monkeypatch.setattr(Arena, "register", counted("register", link.BUFFER))
    monkeypatch.setattr(link, "CudaLink", Stand)
    monkeypatch.setattr(Stand, "log", [], raising=False)
    return calls


def test_on_a_gpu_that_locks_memory(cuda: dict[str, int]) -> None:
    measured = link.measure_copies(CUDA, [1 << 18, 1 << 20], repeats=1)
    assert list(measured) == ["pinned", "pieces", "staged", "pageable"]
    assert Stand.log == [(pinned, 1 << 18) for pinned in (True, False) for _ in range(4 * 2 * 2)]
    assert cuda == {"synchronize": 2 * 2 * len(measured) * 2, "empty_cache": 0, "register": 1}
    Stand.log.clear()
    assert link.measure_link(CUDA, repeats=1) > 0 and Stand.log == []  # in one call, and nothing else
    assert link.run(argparse.Namespace(device=None, repeats=1))["memory_gb_per_s"] > 0
    assert cuda["empty_cache"] == 1


def test_on_a_gpu_that_does_not(cuda: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arena, "register", lambda *_: 0)
    measured = link.measure_copies(CUDA, [1 << 20], repeats=1)
    assert list(measured) == ["staged", "pageable"] and Stand.log == [(False, 1 << 18)] * 8
    Stand.log.clear()
    assert link.measure_link(CUDA, repeats=1) > 0 and len(Stand.log) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_real_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    held = torch.cuda.memory_reserved()
    assert bench.main(["link", "--device", "cuda", "--repeats", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["link_gb_per_s"][0]) >= {"staged", "pageable"} and report["memory_gb_per_s"] > 1
    assert torch.cuda.memory_reserved() <= held
