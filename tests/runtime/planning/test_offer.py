"""Offers: what a rank measures, what ranks of one machine share, and what comes over a network."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.part import Part
from model.quant.formats import PLAIN
from model.target import Target
from runtime import DeviceError, Engine, EngineOptions, OptionError
from runtime.engine import DEMO
from runtime.hub.opening import open_headers
from runtime.planning.offer import Memory, Offer, share_memory, spread
from runtime.planning.plan import Plan
from runtime.planning.planner import plan_part
from runtime.planning.rank_plans import RankPlans
from runtime.planning.sharing import JointRequest, share_layers
from tests.runtime.planning.asked import CPU, SMALL, plan

BOX = 100 << 30


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs of 24 GiB, the first of them half full, and 100 GiB of memory to give."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", Card)
    free = {"cuda:0": 12 << 30, "cuda:1": 24 << 30, "cpu": BOX}
    monkeypatch.setattr("runtime.planning.offer.free_device_bytes", lambda device: free[str(device)])
    monkeypatch.setattr("runtime.planning.offer.driver_bytes", lambda target: 700 << 20)


class Card:
    def __init__(self, device: torch.device) -> None:
        self.uuid = f"card {device.index}"


def here(local_rank: int = 0, host: str = "box", **options: Any) -> Offer:
    return Offer.here(EngineOptions(**options), local_rank, host)


@pytest.mark.usefixtures("cards")
def test_each_rank_has_the_gpu_of_its_number_or_else_the_cpu() -> None:
    first, second, third = (here(rank) for rank in range(3))
    assert [str(it.device) for it in (first, second, third)] == ["cuda:0", "cuda:1", "cpu"]
    assert (first.card, second.card, third.card) == ("card 0", "card 1", "")
    assert (first.capability, first.driver_bytes, third.capability) == ((8, 6), 700 << 20, None)
    assert first.memory == Memory("vram", 12 << 30, None) and third.memory == Memory("ram", BOX, None)
    assert str(here(0, device="cpu").device) == "cpu" and str(here(2, device="cuda:1").device) == "cuda:1"
    assert here(1, link_gbps=12.0).options(EngineOptions(disk_gbps=3)) == EngineOptions(link_gbps=12.0)


def test_a_gpu_that_torch_has_no_kernels_for_is_left_alone(
    cards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    with pytest.warns(RuntimeWarning, match="computing on the CPU: device cuda:1: this GPU has"):
        assert here(1).device == CPU
    with pytest.raises(DeviceError, match=r"this GPU has compute capability 8\.6"):
        here(1, device="cuda:1")


def bytes_of(*offers: Offer) -> list[tuple[int | None, int | None]]:
    return [(it.device.bytes, it.host.bytes) for it in share_memory(offers)]


@pytest.mark.usefixtures("cards")
def test_ranks_of_a_machine_share_its_memory() -> None:
    G = 1 << 30
    assert bytes_of(here(0)) == [(12 * G, 100 * G)]
    assert bytes_of(here(0), here(1)) == [(12 * G, 50 * G), (24 * G, 50 * G)]
    assert bytes_of(here(0), here(0, host="attic")) == [(12 * G, 100 * G), (12 * G, 100 * G)]
    assert bytes_of(here(0), here(1, device="cuda:0")) == [(6 * G, 50 * G), (6 * G, 50 * G)]
    assert bytes_of(*(here(rank) for rank in range(4)))[2:] == [(25 * G, None), (25 * G, None)]
    assert bytes_of(here(device="cpu", ram="90%"), here(device="cpu", ram="90%")) == [(45 * G, None)] * 2
    assert bytes_of(here(ram="10GiB"), here(1)) == [(12 * G, 10 * G), (24 * G, 90 * G)]
    assert bytes_of(here(ram="80GiB"), here(1, ram="80GiB"))[0] == (12 * G, 50 * G)
    assert bytes_of(here(vram="8GiB"), here(device="cuda:0", vram="2GiB")) == [
        (8 * G, 50 * G),
        (2 * G, 50 * G),
    ]


@pytest.mark.usefixtures("cards")
def test_connections_of_gpus_are_planned_where_there_are_two() -> None:
    def beside(*offers: Offer) -> list[bool]:
        asked = JointRequest(SMALL, PLAIN, EngineOptions(), offers)
        return [asked.beside_gpus(rank) for rank in range(len(offers))]

    assert beside(here(0)) == [False]
    assert beside(here(0), here(1)) == beside(here(0), here(0, host="attic")) == [True, True]
    assert beside(here(0), here(0, device="cuda:0")) == [False, False], "which are one GPU"
    assert beside(here(0), here(2), here(2), here(1)) == [True, False, False, True]


@pytest.mark.usefixtures("cards")
def test_a_budget_says_what_it_is_of() -> None:
    [alone] = share_memory([here(vram="8GiB")])
    assert (alone.device.place, alone.host.place) == ("memory on cuda:0 under --vram 8GiB", "memory on cpu")
    both = share_memory([here(0, device="cpu"), here(1, device="cpu", ram="4GiB")])
    assert both[0].device.place == "memory on cpu, which 2 ranks share"
    assert both[1].device.place == "memory on cpu under --ram 4GiB, which 2 ranks share"


def test_a_percentage_of_what_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.planning.offer.free_device_bytes", lambda device: None)
    with pytest.raises(OptionError, match="ram: '90%': how much memory there is cannot be told"):
        share_memory([here(device="cpu", ram="90%")])
    with pytest.raises(OptionError, match="vram: '90%'"):
        Offer.given(Target.hypothetical(), "90%", None, "a")


@given(st.integers(0, 1000), st.lists(st.none() | st.integers(0, 500), min_size=1, max_size=5))
def test_memory_is_spread_as_evenly_as_wishes_allow(free: int, wishes: list[int | None]) -> None:
    given = spread(free, wishes)
    most = [free if wish is None else wish for wish in wishes]
    assert all(0 <= got <= wish for got, wish in zip(given, most, strict=True))
    assert sum(given) <= free and (sum(given) > free - len(wishes) or given == most)
    short = [got for got, wish in zip(given, most, strict=True) if got < wish]
    assert not short or (max(short) - min(short) <= 1 and max(given) <= max(short) + 1)


OFFERS = [
    Offer.given(Target.hypothetical(), "11GiB", "90GiB", "box"),
    Offer.given(Target(CPU), None, None, "attic"),
    replace(
        Offer.given(Target.hypothetical((7, 5)), None, "1GB", "box"),
        device=torch.device("cuda:3"),
        cpu_gbps=2.5,
    ),
]
PLANS = [plan(SMALL, torch.float16, 100), plan(SMALL, torch.float32, 100, slots=2, link_gbps=3.0)]


@pytest.mark.parametrize("value", [*OFFERS, *PLANS], ids=lambda value: type(value).__name__)
def test_offers_and_plans_travel_as_json(value: Offer | Plan) -> None:
    assert type(value).from_dict(json.loads(json.dumps(value.as_dict()))) == value


DAMAGE: list[Any] = [
    None,
    True,
    -1,
    1 << 63,
    1.5,
    "x",
    "",
    "a\nb",
    "y" * 2000,
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    [1] * 5000,
]


@pytest.mark.parametrize("value", [OFFERS[2], PLANS[1]], ids=lambda value: type(value).__name__)
def test_damaged_json_is_refused_in_one_line(value: Offer | Plan) -> None:
    """A value of another type in any field, a field too few, and one too many."""
    whole, kind = value.as_dict(), type(value)
    for name in whole:
        for other in DAMAGE:
            try:
                made = kind.from_dict(whole | {name: other})
            except DeviceError as error:
                text = str(error)
                assert name in text and "\n" not in text and len(text) < 600
            else:
                again = made.as_dict()[name]
                assert again == other and type(again) in (type(other), float), (name, other)
    for damaged in ({}, [], None, 3, whole | {"more": 1}, dict(list(whole.items())[1:])):
        with pytest.raises(DeviceError, match="run the same version on every rank"):
            kind.from_dict(damaged)


def test_what_must_not_pass_does_not() -> None:
    for name, other in (
        ("device", "tpu"), ("device", "cuda:x"), ("device", "meta"), ("capability", [8]),
        ("capability", [8, "6"]),
        ("driver_bytes", True), ("bfloat16", 1), ("host", 7), ("memory", None), ("link_gbps", "fast"),
        ("memory", {"option": "vram", "free": -5, "wish": None}),
    ):  # fmt: skip
        with pytest.raises(DeviceError, match=f"a rank's offer: {name}"):
            Offer.from_dict(OFFERS[0].as_dict() | {name: other})
    for name, other in (
        ("dtype", "int8"),
        ("dtype", "float64"),
        ("link_gbps", 0),
        ("slots_per_layer", "2"),
        ("chunk", 512.0),
    ):
        with pytest.raises(DeviceError, match=f"a rank's plan: {name}"):
            Plan.from_dict(PLANS[0].as_dict() | {name: other})


@pytest.mark.parametrize("counts", ["8", "3,5", "2,2,4", "1,1,1,1,1,1,1,1"])
def test_each_rank_plans_the_part_that_it_will_load(counts: str) -> None:
    """A rank on this machine plans with what its own checkpoint has; together they are the whole."""
    options = EngineOptions(device="cpu", dtype="float32", distributed=True, rank_layers=counts)
    whole, ranks = open_headers(DEMO), counts.count(",") + 1
    offers = [Offer.from_dict(Offer.here(options, rank, "box").as_dict()) for rank in range(ranks)]
    shares = share_layers(whole.config, whole.formats, options, offers, whole.mappable)
    parts = Part.split(whole.config, shares)
    assert ",".join(map(str, shares)) == counts
    plans = [plan_part(whole.part(part), whole, options, offers, rank) for rank, part in enumerate(parts)]
    single = Engine.plan(None, EngineOptions(device="cpu", dtype="float32"))
    assert {it.chunk for it in plans} == {single.chunk} and {it.device for it in plans} == {CPU}
    assert sum(it.kv_bytes for it in plans) == single.kv_bytes
    assert sum(it.slots_bytes for it in plans) == single.slots_bytes
    if ranks == 1:
        assert plans == [single]
    table = RankPlans(parts, plans, ["box"] * ranks, whole.config.hidden)
    assert [hop.token_bytes for hop in table.hops] == ([8] + [256 * 4] * (ranks - 1)) * (ranks > 1)
    assert [(hop.sender, hop.receiver) for hop in table.hops[:1]] == [(0, 1)] * (ranks > 1)
    assert str(table).count("\n") == (ranks + 1 if ranks > 1 else 0)
    said = json.loads(json.dumps(table.as_dict()))
    assert sorted(it["first_layer"] for it in said["ranks"])[0] == 0
    assert sum(it["layers"] for it in said["ranks"]) == 8 and len(said["hops"]) == len(table.hops)


def test_memory_beyond_the_machine_is_refused_with_the_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.planning.offer.free_device_bytes", lambda device: 1 << 20)
    offers = [here(device="cpu") for _ in range(2)]
    with pytest.raises(
        DeviceError, match=r"rank 0 \(cpu of box\) has no room for 1 layer: .* which 2 ranks share"
    ):
        share_layers(replace(SMALL, layers=4), PLAIN, EngineOptions(device="cpu"), offers)
