"""The plan against its budgets, what is said when nothing fits, and what an engine makes of both."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import Attending
from model.config import ModelConfig
from model.quant.backends import scratch_bytes
from model.quant.spec import QuantSpec
from model.quant.streams import expert_fields, matrix_fields
from model.target import Target
from runtime import DeviceError, Engine, OptionError
from runtime.experts.arena import pitch
from runtime.planning.plan import Plan
from runtime.units import parse_bytes
from tests.runtime.planning.asked import SMALL, plan

BLOB = 3 * 96 * 80 * 4
LIMITS = [0, 1, *(1 << power for power in range(16, 25))]

shapes = st.builds(
    dataclasses.replace,
    st.just(SMALL),
    hidden=st.sampled_from([64, 128, 512]),
    ffn=st.sampled_from([32, 128, 1024]),
    layers=st.integers(1, 9),
    experts=st.integers(2, 9),
    experts_per_token=st.integers(1, 2),
)
requests = st.fixed_dictionaries(
    {
        "config": shapes,
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "context": st.integers(2, 4096),
        "expert": st.sampled_from([None, 99_968, 1 << 26]),  # next to the last, chunks are long
        "head": st.sampled_from([None, 0, 1 << 22]),
        "scratch": st.sampled_from([0, 1 << 20]),
        "overhead": st.sampled_from([0, 1 << 20]),
        "driver": st.sampled_from([0, 1 << 20]),
        "attending": st.sampled_from(Attending),
        "lookahead": st.integers(0, 2),
        "prefetch": st.integers(0, 3),
        "kv": st.sampled_from([8, 16]),
    }
)


def try_plan(**request: Any) -> Plan | None:
    try:
        return plan(**request)
    except DeviceError:
        return None


def budgets(request: dict[str, Any], shared: bool = False) -> st.SearchStrategy[int]:
    """From nothing to far too much; or what goes before slots, and then some."""
    config = request["config"]
    least = plan(**request, offload="always", slots=config.experts_per_token)
    before_slots = least.device_bytes - least.slots_bytes + shared * least.arena_bytes
    more = st.integers(0, config.layers * config.experts * least.blob_bytes * 9 // 8)
    return st.integers(0, 3 * least.device_bytes) | more.map(lambda size: before_slots + size)


@given(
    st.data(),
    requests,
    st.sampled_from(["auto", "never", "always"]),
    st.booleans(),
    st.none() | st.integers(0, 1 << 24),
)
def test_a_plan_keeps_its_budgets_and_wastes_no_slot(
    data: st.DataObject, request: dict[str, Any], offload: str, shared: bool, host: int | None
) -> None:
    config, budget = request["config"], data.draw(budgets(request, shared))
    L, E, A = config.layers, config.experts, config.experts_per_token
    got = try_plan(**request, budget=budget, host_budget=host, offload=offload, shared=shared)
    everything = plan(**request)
    if offload != "always":
        fits = everything.device_bytes <= budget
        assert (got is not None and got.resident) == fits
    if got is None:
        return
    slots = got.slots_per_layer
    assert got.device_bytes + (got.arena_bytes if shared else 0) <= budget
    assert host is None or got.host_bytes <= host
    inside = got.trunk_bytes + got.kv_bytes + got.workspace_bytes + got.staging_bytes + got.slots_bytes
    assert got.device_bytes == inside + request["overhead"] + request["driver"]
    assert (got.trunk_bytes, got.kv_bytes, got.chunk) == (
        everything.trunk_bytes,
        everything.kv_bytes,
        everything.chunk,
    )
    assert len(slots) == L and max(slots) - min(slots) <= 1 and got.slots_bytes == sum(slots) * got.blob_bytes
    if got.resident:
        assert offload != "always" and slots == (E,) * L and got.spares == got.arena_bytes == 0
        return
    assert offload != "never" and got.berths == L * E
    assert got.arena_bytes == L * E * pitch(got.blob_bytes, not shared, tiered=False)
    guesses = request["lookahead"] * request["prefetch"]
    assert (
        got.spares == guesses
        and 0 <= got.staging_bytes - guesses * got.blob_bytes <= 5 * L * E * config.hidden * 4
    )
    assert (got.staging_bytes > got.spares * got.blob_bytes) == (guesses > 0)
    most = max(A, E // 2) if shared else E
    assert min(slots) >= A and max(slots) <= most
    left = budget - got.device_bytes - (got.arena_bytes if shared else 0)
    assert left < got.blob_bytes or slots == (most,) * L


@given(st.data(), requests, st.sampled_from(["auto", "always"]))
def test_no_layer_loses_a_slot_to_a_larger_budget_or_a_smaller_context(
    data: st.DataObject, request: dict[str, Any], offload: str
) -> None:
    budget = data.draw(budgets(request))
    before = try_plan(**request, budget=budget, offload=offload)
    if before is None:
        return
    more = budget + data.draw(st.integers(0, 1 << 22) | st.integers(0, 1 << 30))
    after = plan(**request, budget=more, offload=offload)
    assert all(a >= b for a, b in zip(after.slots_per_layer, before.slots_per_layer, strict=True))
    request["context"] = data.draw(st.integers(2, request["context"]))
    after = plan(**request, budget=budget, offload=offload)
    assert after.chunk <= before.chunk and (
        not after.arena_bytes or after.workspace_bytes <= before.workspace_bytes
    )
    assert all(a >= b for a, b in zip(after.slots_per_layer, before.slots_per_layer, strict=True))


REMEDIES: dict[str, Callable[..., dict[str, Any]]] = {
    r"lower --slots to (\d+)": lambda slots: {"slots": int(slots)},
    r"leave out --berths": lambda: {"berths": None},
    r"let experts be offloaded \(--offload auto\)": lambda: {"offload": "auto"},
    r"lower --context to (\d+)": lambda context: {"context": int(context)},
    r"guess none \(--prefetch 0\)": lambda: {"prefetch": 0},
    r"use a machine with (\S+ \S+) to give": lambda device: {"budget": parse_bytes(device)},
    r"use a machine with (\S+ \S+) and (\S+ \S+) of host memory to give": lambda device, host: {
        "budget": parse_bytes(device),
        "host_budget": parse_bytes(host),
    },
}


@settings(max_examples=200)
@given(st.data(), requests, st.sampled_from(["auto", "never", "always"]), st.booleans(), st.booleans())
def test_a_refusal_is_one_line_and_its_remedies_work(
    data: st.DataObject, request: dict[str, Any], offload: str, shared: bool, from_files: bool
) -> None:
    config = request["config"]
    slots = data.draw(st.none() | st.integers(config.experts_per_token, config.experts))
    berths = data.draw(st.none() | st.integers(2 if from_files else config.layers * config.experts, 100))
    budget, host = data.draw(budgets(request, shared)), None
    request |= {"offload": offload, "shared": shared, "from_files": from_files}
    if offload != "never":
        request |= {"slots": slots, "berths": berths}
    if not shared:
        host = data.draw(st.none() | st.sampled_from(LIMITS))
    try:
        plan(**request, budget=budget, host_budget=host, place="somewhere", host_place="elsewhere")
        return
    except DeviceError as error:
        text = str(error)
    assert "\n" not in text and text.startswith("need ") and ("somewhere" in text or "elsewhere" in text)
    request |= {"budget": budget, "host_budget": host}
    tried = []
    for pattern, change in REMEDIES.items():
        if words := re.search(pattern, text):
            tried.append(try_plan(**(request | change(*words.groups()))))
    expanded = scratch_bytes(max(config.hidden, config.ffn), request["dtype"], Target.hypothetical())
    quantized = {"scratch": max(request["scratch"], expanded)}
    if words := re.search(r"quantize with --experts (\d\w*)", text):
        blob = expert_fields(config, QuantSpec.parse(words[1]))[-1].end + 63 & ~63
        tried.append(try_plan(**(request | quantized | {"expert": blob, "from_files": True})))
    if words := re.search(r"quantize with --head (\d\w*)", text):
        head = matrix_fields("", (config.vocab, config.hidden), QuantSpec.parse(words[1]))[-1].end
        tried.append(try_plan(**(request | quantized | {"head": head + 255 & ~255})))
    assert tried and all(tried), text


def test_slots_are_as_many_as_asked_for() -> None:
    planned = plan(SMALL, torch.float32, 100, slots=3)
    assert planned.slots_per_layer == (3, 3, 3) and not planned.resident
    assert (planned.berths, planned.arena_bytes) == (15, 15 * pitch(BLOB, pin=True, tiered=False))
    assert plan(SMALL, torch.float32, 100, slots=5).resident
    assert plan(SMALL, torch.float32, 100, slots=5, offload="always").slots_per_layer == (5, 5, 5)
    with pytest.raises(OptionError, match=r"slots is 6, and must be from 2, .*, to 5"):
        plan(SMALL, torch.float32, 100, slots=6)
    with pytest.raises(OptionError, match="slots is 1, "):
        plan(SMALL, torch.float32, 100, slots=1)
    with pytest.raises(OptionError, match="keeps all 5"):
        plan(SMALL, torch.float32, 100, slots=3, offload="never")
    with pytest.raises(OptionError, match="'perhaps'"):
        plan(SMALL, torch.float32, 100, offload="perhaps")
    with pytest.raises(DeviceError, match=r"need .* for 4 slots per layer, .* leave .*; lower --slots to 3"):
        plan(SMALL, torch.float32, 100, slots=4, budget=planned.device_bytes)


def test_half_of_the_experts_have_slots_where_all_would_fit_the_same_memory() -> None:
    assert plan(SMALL, torch.float32, 100, offload="always").slots_per_layer == (2, 2, 2)
    assert plan(SMALL, torch.float32, 100, offload="always", budget=1 << 40).slots_per_layer == (5, 5, 5)
    shared = plan(SMALL, torch.float32, 100, offload="always", budget=1 << 40, shared=True)
    assert shared.slots_per_layer == (2, 2, 2)


def test_too_little_host_memory_is_a_refusal() -> None:
    quantizable = dataclasses.replace(SMALL, ffn=96)
    with pytest.raises(
        DeviceError,
        match=r"need 1\.6 MiB of the host for 5 experts in each of 3 layers, and"
        r" the budget is 1000\.0 KiB; quantize with --experts 2 \(python -m tools.quantize\)$",
    ):
        plan(quantizable, torch.float32, 100, slots=2, host_budget=1000 << 10, host_place="the host")
    with pytest.raises(
        DeviceError, match=r"^need 1\.3 MiB of host memory for .* and 1\.4 MiB of host memory to give$"
    ):
        plan(SMALL, torch.float32, 100, slots=2, budget=1 << 30, host_budget=10 << 10)  # fmt: skip


def test_an_engine_has_the_plan_of_its_model(engine: Engine, config: ModelConfig) -> None:
    assert engine.plan == plan(config, torch.float32, config.context, shared=True)


def test_an_engine_too_large_for_its_budget_is_refused(load: Callable[..., Engine]) -> None:
    with pytest.raises(DeviceError, match=r"need \d.* under --ram 10KiB .*budget is 10.0 KiB"):
        load(ram="10KiB")


@pytest.mark.parametrize("ram", ["100%", "64MiB"])
def test_a_budget_that_is_enough_is_accepted(load: Callable[..., Engine], ram: str) -> None:
    assert load(ram=ram).plan.device_bytes < 64 << 20


def test_too_little_free_memory_is_a_refusal_and_unknown_free_memory_is_not(
    load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.planning.request.free_device_bytes", lambda device: 1000)
    with pytest.raises(DeviceError, match=r"memory on cpu .*the budget is 1000 B"):
        load()
    monkeypatch.setattr("runtime.planning.request.free_device_bytes", lambda device: None)
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
