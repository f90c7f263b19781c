"""Warming up compiles everything, so that no request waits for it, and changes nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from model.mixtral import Mixtral
from model.quant.backends.blocks import Blocks
from runtime import DeviceError, Engine, RequestError, SamplingParams
from runtime.gpu import warm_up
from runtime.gpu.graphs import Work
from tests.model.kernels.running import run_cases, triton
from tests.runtime.gpu.plain_step import Recorded, use_plain_kernels

Load = Callable[..., Engine]
GREEDY = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)


@triton
def test_no_request_compiles_anything(tmp_path: Path) -> None:
    run_cases("tests/runtime/gpu/warm_up_cases.py", tmp_path)


def test_on_a_cpu_loading_computes_nothing(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("take_planned", "warm_up"):
        monkeypatch.setattr(warm_up, name, lambda *args: pytest.fail("it is for GPUs"))
    monkeypatch.setattr(Mixtral, "forward", lambda self, *args: pytest.fail("nothing was asked for"))
    load(), load(offload="always")


def test_on_a_gpu_loading_ends_with_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, done = load().runner, []
    monkeypatch.setattr(warm_up, "take_planned", lambda runner: done.append("planned"))
    monkeypatch.setattr(warm_up, "warm_up", lambda runner, progress: done.append(progress))
    warm_up.prepare(runner, bar)
    assert not done
    monkeypatch.setattr(runner, "device", torch.device("cuda", 0))
    warm_up.prepare(runner, bar)
    assert done == ["planned", bar]


steps: list[int] = []


@contextmanager
def bar(total: int) -> Iterator[Callable[[int], None]]:
    steps[:] = [total]
    yield steps.append
    steps.append(0)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """The captured work, with stand-ins for a GPU's kernels and graphs."""
    captured: list[Work] = []
    capture = Recorded.capture

    def noting(self: Recorded, work: Work) -> Work:
        captured.append(work)
        return capture(self, work)

    use_plain_kernels(monkeypatch)
    monkeypatch.setattr("model.quant.backends.BACKENDS", (Blocks,))
    monkeypatch.setattr("runtime.gpu.decoder.CudaGraphs", lambda device: Recorded())
    monkeypatch.setattr(Recorded, "capture", noting)
    return captured


@pytest.mark.parametrize("offload", ["never", "always"])
def test_it_changes_nothing_but_makes_graphs(offload: str, load: Load, captured: list[Work]) -> None:
    cold = load(offload=offload)
    expected = [(token.id, token.logprob) for token in cold.generate([5, 6, 7], GREEDY)]
    parts = len(captured)
    captured.clear()

    engine = load(offload=offload)
    before = engine.stats()
    warm_up.warm_up(engine.runner, bar)
    assert steps[0] == sum(steps[1:]) > 0 and steps[-1] == 0, "left when all is done"
    assert len(captured) == parts
    assert engine.stats() == before and all(kv.length <= 3 for kv in engine.runner.idle_kvs)
    if engine.runner.cache:
        assert all(table.find(e) is None for table in engine.runner.cache.residency.tables for e in range(4))
    assert [(token.id, token.logprob) for token in engine.generate([5, 6, 7], GREEDY)] == expected
    assert len(captured) == parts, "the first session's were made"
    counted = engine.stats(), cold.stats()
    for name in ("hits", "misses", "guesses", "used_guesses", "recalled", "recallable", "copied_bytes"):
        assert getattr(counted[0], name) == getattr(counted[1], name), name


@pytest.mark.parametrize("context", [2, 3])
def test_with_a_tiny_context(context: int, load: Load, captured: list[Work]) -> None:
    engine = load(context=context)
    warm_up.warm_up(engine.runner)
    with engine.session() as session:
        assert len(session.prefill([5])) == engine.config.vocab


def test_a_failure_is_a_device_error(
    load: Load, captured: list[Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(ids: list[int], kv: object) -> None:
        raise RequestError("an expert could not be copied")

    engine = load()
    monkeypatch.setattr(engine.runner, "forward", forward)
    with pytest.raises(DeviceError, match="could not be copied"):
        warm_up.warm_up(engine.runner)
