"""The plan against what is really allocated, and what is said when it does not fit."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from runtime import DeviceError, Engine, OptionError
from runtime.planner import check_budget, plan

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab=320, hidden=96, layers=3, heads=6, kv_heads=2, head_dim=32, ffn=80, experts=5,
    experts_per_token=2, context=4096, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [2, 700, 4096])
def test_trunk_experts_and_kv_are_the_bytes_of_the_real_tensors(dtype: torch.dtype, context: int) -> None:
    model = Mixtral(SMALL, dtype)
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    trunk = [weight for name, weight in model.named_parameters() if ".experts." not in name]
    cache = KVCache.allocate(SMALL, 1, context, dtype, CPU)

    planned = plan(SMALL, dtype, context)
    assert planned.experts == size(experts)
    assert planned.trunk == size([*trunk, model.rope.cos, model.rope.sin])
    assert planned.kv == size([tensor for layer in cache.layers for tensor in (layer.k, layer.v)])
    assert planned.total == planned.trunk + planned.experts + planned.kv + planned.workspace


def test_an_engine_has_the_plan_of_its_model(engine: Engine, config: ModelConfig) -> None:
    assert engine.plan == plan(config, torch.float32, config.context)


@given(st.integers(2, 4096), st.integers(-3000, 5000) | st.integers(-(10**6), 10**7))
def test_a_refusal_has_the_numbers_and_its_remedy_works(context: int, left_for_kv: int) -> None:
    planned = plan(SMALL, torch.float32, context)
    budget = planned.total - planned.kv + left_for_kv
    try:
        check_budget(planned, budget, "somewhere")
    except DeviceError as error:
        assert planned.total > budget
        assert "somewhere" in str(error) and "budget" in str(error) and "\n" not in str(error)
        if remedy := re.search(r"lower --context to (\d+)", str(error)):
            assert 2 <= int(remedy[1]) < context
            check_budget(plan(SMALL, torch.float32, int(remedy[1])), budget, "somewhere")
        else:
            assert "more memory" in str(error)
            assert budget < planned.total - planned.kv + 2 * planned.kv / context
    else:
        assert planned.total <= budget


def test_an_engine_too_large_for_its_budget_is_refused(load: Callable[..., Engine]) -> None:
    with pytest.raises(DeviceError, match=r"need \d.* under --ram 10KiB .*budget is 10.0 KiB"):
        load(ram="10KiB")


@pytest.mark.parametrize("ram", ["100%", "64MiB"])
def test_a_budget_that_is_enough_is_accepted(load: Callable[..., Engine], ram: str) -> None:
    assert load(ram=ram).plan.total < 64 << 20


def test_too_little_free_memory_is_a_refusal_and_unknown_free_memory_is_not(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.engine.free_device_bytes", lambda device: 1000)
    with pytest.raises(DeviceError, match=r"memory on cpu .*the budget is 1000 B"):
        load()
    monkeypatch.setattr("runtime.engine.free_device_bytes", lambda device: None)
    assert load().plan.context == 640
    with pytest.raises(OptionError, match="'50%'"):
        load(ram="50%")


def test_the_context_is_the_option_or_what_the_model_allows(
    load: Callable[..., Engine], variant: Callable[..., Path]
) -> None:
    assert load().plan.context == 640
    assert load(context=77).plan.context == 77
    assert load(variant(context=9000)).plan.context == 4096
    with pytest.raises(OptionError, match=r"context is 641.* at most 640"):
        load(context=641)
