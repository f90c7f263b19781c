"""The rates that misses are divided by: measured once, recorded, and enough to repeat a run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.quant.backends.blocks import Blocks
from model.quant.backends.lanes import Lanes
from model.quant.expert import ExpertFormat
from model.quant.spec import QuantSpec
from model.shapes import MIXTRAL_8X7B
from model.target import Target
from runtime import Engine, EngineOptions
from runtime.engine import DEMO

CPU = Target.of(torch.device("cpu"))


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.experts.rates.SECONDS", 0.03)


def load(**options: Any) -> Engine:
    given = {"device": "cpu", "offload": "always", "slots": 3, "context": 64, "threads": 1}
    return Engine.load(DEMO, EngineOptions(**given | options))


@pytest.mark.parametrize("misses", ["compute", "auto"])
def test_recorded_rates_repeat_a_run(sample: Callable[..., Any], misses: str) -> None:
    with load(misses=misses) as engine:
        link, cpu = engine.plan.link_gbps, engine.plan.cpu_gbps
        assert link is not None and cpu is not None and 0 < link < math.inf and 0 < cpu < math.inf
        assert engine.stats().copied_bytes == engine.stats().computed == 0
        first = [sample(engine, [5, 6, n], 12) for n in (7, 8)]
        counted = engine.stats()
    with load(misses=misses, cpu_gbps=cpu) as engine:  # a link_gbps would slow down copies, too
        cache = engine.runner.cache
        assert cache is not None and cache.residency.split is not None
        assert engine.plan.cpu_gbps == cpu
        cache.residency.split.copy = cache.store.size / (link * 1e9)
        assert [sample(engine, [5, 6, n], 12) for n in (7, 8)] == first
        again = engine.stats()
    assert (again.hits, again.misses, again.computed) == (counted.hits, counted.misses, counted.computed)
    assert counted.computed > 0 or misses == "auto"


def test_given_rates_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.experts.rates.measure", None)
    with load(misses="auto", link_gbps=0.5, cpu_gbps=1.5) as engine:
        assert (engine.plan.link_gbps, engine.plan.cpu_gbps, engine.plan.misses) == (0.5, 1.5, "auto")
        split = engine.runner.cache.residency.split  # type: ignore[union-attr]
        assert split is not None and split.copy == pytest.approx(3 * split.compute) and split.demand


def test_copying_needs_no_rates() -> None:
    with load() as engine:
        assert engine.runner.cache.exchange is None  # type: ignore[union-attr]
        assert engine.plan.cpu_gbps is None


@pytest.mark.parametrize("text", ["4", "3g128", "2", "8"])
def test_a_cpu_computes_the_bytes_that_a_gpu_keeps(text: str) -> None:
    gpu = ExpertFormat.of(MIXTRAL_8X7B, QuantSpec.parse(text), torch.bfloat16, Target.hypothetical())
    cpu = gpu.on(CPU, torch.bfloat16)
    assert cpu.kept == gpu.kept == gpu.stored and cpu.layout is None
    assert set(cpu.backends.values()) == {Lanes} and cpu.remark is None
    wide = gpu.on(CPU, torch.float32)
    assert set(wide.backends.values()) == {Blocks} and "choose the dtype bfloat16" in str(wide.remark)


def test_without_numba_the_same_bytes_are_computed_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.kernels.cpu.launching.unsupported", lambda: "needs numba, which is not there")
    gpu = ExpertFormat.of(MIXTRAL_8X7B, QuantSpec(4), torch.bfloat16, Target.hypothetical())
    cpu = gpu.on(CPU, torch.bfloat16)
    assert set(cpu.backends.values()) == {Blocks} and cpu.remark == "needs numba, which is not there"


def test_a_host_that_cannot_compute_is_an_error_of_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from runtime import DeviceError
    from runtime.experts.host import HostExperts

    def failing(*args: Any) -> None:
        raise MemoryError("none left")

    monkeypatch.setattr(HostExperts, "compute", failing)
    with pytest.raises(DeviceError, match=r"the CPU could not compute an expert \(none left\)"):
        load(misses="auto")
