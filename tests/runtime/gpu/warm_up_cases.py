"""After warming up, no request launches anything that Triton would still have to compile.

`test_warm_up.py` runs this in another process, because it imports Triton.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels import experts, launching, matrices, step
from model.quant import backends
from model.quant.backends.blocks import Blocks
from model.quant.backends.fused import Fused
from model.quant.spec import QuantSpec
from runtime import Engine, EngineOptions, SamplingParams
from runtime.gpu.warm_up import warm_up
from tests.quantized import quantize_folder
from tests.runtime.gpu import plain_step
from tests.runtime.gpu.plain_step import Recorded

PARAMS = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)


class Both(Fused):
    """Launches like `Fused` and computes like `Blocks`."""

    devices = ("cpu",)

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        super().__init__(spec, shape, memory)
        self.plain = Blocks(spec, shape, memory)

    def __call__(self, x: Tensor) -> Tensor:
        super().__call__(x)
        return self.plain(x)


def both(launching: Callable[..., Any], computing: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        launching(*args)
        return computing(*args)

    return call


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The launches, by all that Triton compiles anew for: kernel, dtype and alignment of tensors, constants.

    Other numbers are left out, since `compiled_cases.py` has them. Nothing is really launched. Plain PyTorch
    computes what the kernels would.
    """
    keys: set[Any] = set()

    def launch(kernel: Any, grid: tuple[int, ...], *tensors: Tensor | int, **values: float) -> None:
        kinds = [(t.dtype, t.data_ptr() % 16 == 0) for t in tensors if isinstance(t, Tensor)]
        keys.add((kernel.fn.__name__, tuple(kinds), tuple(sorted(values.items()))))

    for module in (experts, matrices, step):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(launching, "unsupported", lambda target, dtype: None)
    monkeypatch.setattr(backends, "BACKENDS", (Both,))
    monkeypatch.setattr(experts, "experts_by_slot", both(experts.experts_by_slot, plain_step.experts_by_slot))
    for name in ("fetch", "add_and_norm", "rotate_and_append", "attend", "route"):
        monkeypatch.setattr(step, name, both(getattr(step, name), getattr(plain_step, name)))
    monkeypatch.setattr("runtime.gpu.decoder.CudaGraphs", lambda device: Recorded())
    return keys


@pytest.mark.parametrize("experts", ["16", "3"])
@pytest.mark.parametrize(("offload", "kv"), [("never", 16), ("always", 16), ("always", 8)])
def test_nothing_is_left_to_compile(
    offload: str, kv: int, experts: str, launched: set[Any], variant: Callable[..., Path], tmp_path: Path
) -> None:
    plain = variant(hidden=64, ffn=64, layers=3, experts=5, experts_per_token=3, context=64)
    folder = quantize_folder(plain, tmp_path / experts, experts)
    options = EngineOptions(device="cpu", dtype="float32", offload=offload, kv=kv, graphs=False, map=False)
    with torch.no_grad(), Engine.load(folder, options) as engine:
        assert not launched, "on a CPU nothing is warmed up"
        warm_up(engine.runner)
        known = set(launched)
        names = {"multiply_one", "multiply_few", "expand", "gate_up", "down", "route", "attend_sum"}
        assert {name for name, *_ in known} >= names
        for length in (1, 2, 17, 40):
            list(engine.generate([5 + i % 3 for i in range(length)], PARAMS))
        assert launched == known
