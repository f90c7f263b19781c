"""Plans with fewer berths than experts, against their budgets and against a search through all of them."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from model.target import Target
from runtime import DeviceError, EngineOptions, OptionError
from runtime.experts.arena import pitch
from runtime.experts.tiers import SPARE_BERTHS, SPARE_SLOTS
from runtime.planning.plan import Plan, lay_out
from runtime.planning.planner import make_plan
from runtime.planning.request import Budgets, Request
from runtime.planning.search import best_plan, fits, share_out, used_bytes
from tests.runtime.planning.asked import CPU, SMALL, asked, plan
from tests.runtime.planning.test_planner import requests, try_plan

N = SMALL.layers * SMALL.experts
BLOB = 3 * 96 * 80 * 4
BERTH = pitch(BLOB, pin=True, tiered=True)
SHARED = pitch(BLOB, pin=False, tiered=True)


def small(**words: Any) -> Plan:
    return plan(SMALL, torch.float32, 100, from_files=True, **words)


def budgets(data: st.DataObject, request: dict[str, Any], shared: bool) -> dict[str, int]:
    """Budgets of device and host about what the least plan takes, and up to what all of it takes."""
    config = request["config"]
    least = plan(**request, offload="always", slots=config.experts_per_token, shared=shared)
    every = least.arena_bytes + least.arena_bytes // 4 + (1 << 20)
    some, more = (data.draw(st.integers(0, every)) for _ in range(2))
    if shared:
        return {"budget": least.device_bytes + some}
    return {"budget": least.device_bytes + some, "host_budget": more}


@given(st.data(), requests, st.booleans(), st.none() | st.integers(SPARE_BERTHS, 99))
def test_berths_are_as_many_as_fit_and_experts_without_room_are_counted(
    data: st.DataObject, request: dict[str, Any], shared: bool, berths: int | None
) -> None:
    config, limits = request["config"], budgets(data, request, shared)
    request |= {"offload": "always", "shared": shared, "from_files": True, "berths": berths}
    L, A, experts = config.layers, config.experts_per_token, config.layers * config.experts
    got = try_plan(**request, **limits)
    if got is None:
        return
    budget, host = limits["budget"], limits.get("host_budget")
    assert got.device_bytes + (got.arena_bytes if shared else 0) <= budget
    assert host is None or got.host_bytes == got.arena_bytes <= host
    tiered, slots = got.berths < experts, sum(got.slots_per_layer)
    berth = pitch(got.blob_bytes, not shared, tiered)
    assert got.experts == experts and got.tiered == tiered and not got.resident
    assert SPARE_BERTHS <= got.berths <= experts and got.arena_bytes == got.berths * berth
    assert got.spares == request["lookahead"] * request["prefetch"] + tiered * SPARE_SLOTS
    assert got.file_experts == (max(experts + SPARE_BERTHS - got.berths - slots, 0) if tiered else 0)
    assert min(got.slots_per_layer) >= A and len(got.slots_per_layer) == L
    if berths is not None:
        assert got.berths == min(berths, experts)
    elif tiered:
        left = budget - used_bytes(asked(**request), got) if shared else (host or 0) - got.arena_bytes
        assert left < berth or got.berths == experts - 1
        assert not shared or got.slots_per_layer == (A,) * L, "berths come first"
        every = try_plan(**(request | {"berths": experts}), **limits)
        assert every is None, "all would have fitted"


@given(st.data(), requests, st.booleans())
def test_more_memory_never_gives_fewer_berths_or_more_reading(
    data: st.DataObject, request: dict[str, Any], shared: bool
) -> None:
    limits = budgets(data, request, shared)
    request |= {"offload": "always", "shared": shared, "from_files": True}
    before = try_plan(**request, **limits)
    if before is None:
        return
    name = data.draw(st.sampled_from(sorted(limits)))
    more = data.draw(st.integers(0, 1 << 16) | st.integers(0, 1 << 27))
    after = plan(**request, **(limits | {name: limits[name] + more}))
    assert after.berths >= before.berths and after.file_experts <= before.file_experts
    assert sum(after.slots_per_layer) >= sum(before.slots_per_layer)
    assert max(after.slots_per_layer) - min(after.slots_per_layer) <= 1


@given(st.data(), st.integers(0, 2), st.sampled_from([BLOB, 1 << 22]))
def test_no_other_plan_has_more_berths_or_with_as_many_more_slots(
    data: st.DataObject, prefetch: int, blob: int
) -> None:
    """The slow reference: every number of berths with every number of slots."""
    size = st.integers(0, N + 9).flatmap(lambda few: st.integers(few * blob, few * (blob + 8192)))
    request = asked(
        SMALL, torch.float32, 100, from_files=True, offload="always", prefetch=prefetch, expert=blob,
        budget=lay_out(asked(SMALL, torch.float32, 100), (0, 0, 0)).device_bytes + data.draw(size),
        host_budget=data.draw(size),
    )  # fmt: skip
    slots = range(SMALL.experts_per_token * SMALL.layers, N + 1)
    plans = [
        lay_out(request, share_out(count, SMALL.layers), berths=berths)
        for berths in range(SPARE_BERTHS, N + 1)
        for count in slots
    ]
    best = max(
        (each for each in plans if fits(request, each)),
        key=lambda each: (each.berths, sum(each.slots_per_layer)),
        default=None,
    )
    assert best_plan(request) == best


def test_the_least_that_runs() -> None:
    """Two slots a layer, two berths, and spares for one guess and two experts that leave."""
    least = small(offload="always", slots=2, berths=2)
    assert (least.spares, least.arena_bytes, least.file_experts) == (3, 2 * BERTH, N + 2 - 2 - 6)
    words = {"offload": "always", "budget": least.device_bytes, "host_budget": 2 * BERTH}
    assert small(**words) == small(**words, slots=2) == small(**words, berths=2) == least
    with pytest.raises(DeviceError, match=r"^need 540\.0 KiB for 2 slots per layer, and .*; guess none"):
        small(**words | {"budget": least.device_bytes - 1})
    with pytest.raises(
        DeviceError, match=r"^need 200\.0 KiB of host memory for 2 berths, and the budget is 200\.0 KiB; "
    ):
        small(**words | {"host_budget": 2 * BERTH - 1})
    with pytest.raises(DeviceError, match=r"for 3 berths, and the budget is .*; leave out --berths"):
        small(**words, berths=3)


def test_all_but_one_have_berths_if_that_is_all_that_fits() -> None:
    large = 1 << 22
    words = {"offload": "always", "slots": 2, "expert": large}
    assert small(**words, host_budget=N * large).berths == N
    assert small(**words, host_budget=N * large - 1).berths == N - 1


def test_a_device_too_small_is_told_what_it_takes_with_all_berths_if_the_host_has_them() -> None:
    words = {"offload": "always", "prefetch": 0, "scratch": 1 << 20}
    least = small(**words, slots=2)
    with pytest.raises(DeviceError) as caught:
        small(**words, budget=least.device_bytes - 1)
    assert "staging" not in str(caught.value), "nothing leaves for a berth"
    tight = small(**words, slots=2, berths=2)
    with pytest.raises(DeviceError, match=r"staging 180\.0 KiB; "):
        small(**words, budget=tight.device_bytes - 1, host_budget=2 * BERTH)


def test_on_a_cpu_slots_and_berths_share_one_memory() -> None:
    """Nothing is offloaded unless the user asks for it; then all experts have berths if that fits."""
    every = small(shared=True, offload="always", slots=2)
    assert (every.berths, every.spares, every.arena_bytes) == (N, 1, N * BLOB)
    whole = every.device_bytes + every.arena_bytes
    assert small(shared=True, offload="always", budget=whole) == every
    fewer = small(shared=True, offload="always", budget=whole - 1)
    spares = SPARE_SLOTS * BLOB
    assert fewer.berths == (whole - 1 - every.device_bytes - spares) // SHARED < N
    assert fewer.slots_per_layer == (2, 2, 2) and fewer.device_bytes == every.device_bytes + spares
    eight, words = dataclasses.replace(SMALL, experts=8), {"from_files": True, "shared": True}
    seven = plan(eight, torch.float32, 100, **words, offload="always", slots=2, berths=7)
    budget = seven.device_bytes + seven.arena_bytes + SHARED - 1  # a slot would fit, and a berth would not
    assert plan(eight, torch.float32, 100, **words, offload="always", budget=budget) == seven
    for offload in ("auto", "never"):
        with pytest.raises(DeviceError, match=r"and the budget is"):
            small(shared=True, offload=offload, budget=fewer.device_bytes)
    assert small(shared=True, offload="always", berths=7).berths == 7
    assert small(shared=True, offload="always", berths=99).berths == N
    assert small(shared=True, berths=7).resident
    tight = {"shared": True, "prefetch": 0, "budget": small(shared=True).device_bytes - 1}
    assert small(**tight, berths=2).berths == 2, "it was asked for"
    with pytest.raises(DeviceError, match=r"^need .* \(.*experts"):
        small(**tight)


def test_of_few_experts_all_have_berths_sooner_than_some_leave_for_files() -> None:
    one = dataclasses.replace(SMALL, layers=1, experts=3)
    words = {"from_files": True, "shared": True, "offload": "always", "prefetch": 0}
    least = plan(one, torch.float32, 100, **words)
    assert least.berths == 3 and least.spares == 0
    with pytest.raises(DeviceError, match=r"need 180\.0 KiB for 2 slots per layer, .*, arena 270\.0 KiB; "):
        plan(one, torch.float32, 100, **words, budget=least.device_bytes + least.arena_bytes - 1)


def test_experts_that_files_do_not_have_as_memory_does_need_all_berths() -> None:
    formats = Formats(QuantSpec(4), QuantSpec(3), QuantSpec(8))
    card, given = Target.hypothetical(), {"ram": "500KiB", "offload": "always", "slots": 2}
    config = dataclasses.replace(SMALL, hidden=128, heads=8, ffn=256, vocab=512)

    def request(files: torch.dtype | None, target: Target = card, **options: Any) -> Request:
        wishes = EngineOptions(context=100, **options)
        return Request.make(config, formats, wishes, target, Budgets.given(wishes, target.device), files)

    assert 2 <= make_plan(request(torch.bfloat16, **given)).berths < N
    with pytest.raises(DeviceError, match=r"for 5 experts in each of 3 layers, .*--experts 2.* \(python -m"):
        make_plan(request(None, **given))
    with pytest.raises(DeviceError, match=r"quantize with --experts 2 \(python -m"):  # 2 berths
        make_plan(request(None, **given | {"ram": "100KiB"}))
    assert make_plan(request(None, offload="always", berths=99)).berths == N
    with pytest.raises(OptionError, match=r"berths is 9, and all 15 experts need one, .* tools\.quantize"):
        request(None, offload="always", berths=9)
    read = request(torch.bfloat16, Target(CPU), map=False, dtype="float32", offload="always", berths=9)
    assert make_plan(read).berths == 9 and make_plan(read).mapped_bytes == 0


def test_a_plan_says_its_tiers() -> None:
    few = small(offload="always", slots=2, berths=7, link_gbps=0.01, disk_gbps=0.002)
    assert str(few).splitlines()[2] == (
        "tiers: 6 slots, 7 berths, 4 experts read from files; a miss takes 9.2 ms from host memory "
        "(0.01 GB/s), 46 ms from files (0.002 GB/s)"
    )
    assert small(offload="always", slots=2, berths=7).describe_tiers() == (
        "tiers: 6 slots, 7 berths, 4 experts read from files"
    )
    assert few.file_miss_seconds == BLOB / 2e6 and few.host_miss_seconds == BLOB / 1e7
    slow = small(offload="always", slots=2, berths=7, link_gbps=0.001, disk_gbps=0.002)
    assert slow.file_miss_seconds == slow.host_miss_seconds == BLOB / 1e6, (
        "pieces are read and copied at once"
    )
    every = small(offload="always", slots=2, link_gbps=0.01, disk_gbps=1)
    assert str(every).splitlines()[2] == (
        "tiers: 6 slots, 15 berths; a miss takes 9.2 ms from host memory (0.01 GB/s)"
    )
    some = small(offload="always", slots=2, misses="auto", cpu_gbps=0.02)
    assert str(some).splitlines()[2] == (
        "tiers: 6 slots, 15 berths; a miss takes 4.6 ms computed on the CPU (0.02 GB/s)"
    )
    assert len(str(small(offload="always", slots=2, cpu_gbps=0.02)).splitlines()) == 2
    assert len(str(small(offload="always", slots=2)).splitlines()) == 2
    assert len(str(small(link_gbps=1, disk_gbps=1)).splitlines()) == 1
