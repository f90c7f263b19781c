"""Shares of layers: exact against all compositions, within every rank's memory; remedies that hold."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.part import Part
from model.quant.formats import PLAIN, Formats
from model.quant.spec import QuantSpec
from model.target import Target
from runtime import DeviceError, EngineOptions, OptionError
from runtime.planning.memory import NCCL_BYTES
from runtime.planning.offer import Offer
from runtime.planning.plan import Plan, chunk_tokens
from runtime.planning.planner import make_plan
from runtime.planning.request import Budget, Budgets, Request
from runtime.planning.search import used_bytes
from runtime.planning.sharing import JointRequest, share_layers
from runtime.units import parse_bytes
from tests.runtime.planning.asked import CARD, CPU, SMALL

MODEL = replace(SMALL, hidden=128, heads=8, ffn=256, vocab=512, context=512, experts=4)
FORMATS = Formats(QuantSpec(4), QuantSpec(2), QuantSpec(8))
BESIDE = (160 + 704) << 20  # what a card holds besides, in every plan
REST = 2 << 20  # about what is needed of any memory before there is a slot


def offer(rank: int, kind: str, device: int | None, host: int | None) -> Offer:
    """What a rank on a machine of its own has: so many bytes for its plan on a device, and on its host."""
    target = CARD if kind == "gpu" else Target(CPU)
    vram = str(device + BESIDE) if kind == "gpu" and device is not None else None
    return Offer.given(target, vram, str(host) if host else None, f"machine {rank}")


models = st.builds(
    lambda layers, experts: replace(MODEL, layers=layers, experts=experts),
    st.integers(1, 6),
    st.integers(2, 5),
)
sizes = st.none() | st.integers(1, 1 << 24) | st.integers(1, 1 << 22).map(lambda more: REST + more)
offers = st.lists(
    st.tuples(st.sampled_from(["gpu", "gpu", "cpu"]), sizes, sizes), min_size=1, max_size=4
).map(lambda kinds: tuple(offer(rank, *kind) for rank, kind in enumerate(kinds)))
options = st.fixed_dictionaries(
    {
        "offload": st.sampled_from(["auto", "auto", "never", "always"]),
        "dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "context": st.integers(2, 512),
        "prefetch": st.integers(0, 2),
        "kv": st.sampled_from([8, 16]),
    },
    optional={"slots": st.just(2), "berths": st.integers(2, 30), "map": st.booleans()},
).filter(lambda it: not (it["offload"] == "never" and {"slots", "berths"} & set(it)))
formats = st.sampled_from([(PLAIN, None), (FORMATS, torch.bfloat16), (Formats(experts=QuantSpec(3)), None)])
requests = st.builds(
    lambda config, how, wishes, ranks: JointRequest(config, how[0], EngineOptions(**wishes), ranks, how[1]),
    models, formats, options, offers,
).filter(lambda asked: len(asked.offers) <= asked.config.layers)  # fmt: skip


def compositions(total: int, ranks: int) -> Iterator[tuple[int, ...]]:
    if ranks == 1:
        yield (total,)
        return
    for first in range(1, total - ranks + 2):
        yield from ((first, *rest) for rest in compositions(total - first, ranks - 1))


def slow_plan(asked: JointRequest, rank: int, part: Part) -> Plan | None:
    """A rank's plan, from its own machine's point of view."""
    own, cpu = asked.offers[rank], asked.offers[rank].device == CPU
    device, host = (parse_bytes(it.wish) if it.wish else None for it in (own.memory, own.ram))
    budgets = Budgets(Budget(device, "here"), Budget(None if cpu else host, "here"))
    wishes = replace(asked.options, rank_layers=None)
    config, target = part.config(asked.config), Target(CPU) if cpu else CARD
    try:
        request = Request.make(
            config, asked.formats, wishes, target, budgets, asked.files, part.embeds, part.heads
        )
        P = len(asked.offers)
        near = not cpu and any(
            asked.offers[it % P].device != CPU for it in (rank - 1, rank + 1) if it % P != rank
        )
        costs = replace(request.costs, driver_bytes=request.costs.driver_bytes + near * NCCL_BYTES)
        return make_plan(replace(request, chunk=slow_chunk(asked), costs=costs))
    except (DeviceError, OptionError):
        return None


def slow_chunk(asked: JointRequest) -> int:
    """The least that any rank would take of a prompt if it had the whole model."""
    targets = [Target(CPU) if it.device == CPU else CARD for it in asked.offers]
    wishes = replace(asked.options, berths=None)
    none = Budgets(Budget(None, ""), Budget(None, ""))
    whole = [Request.make(asked.config, asked.formats, wishes, it, none, asked.files) for it in targets]
    return min(map(chunk_tokens, whole))


def slow_shares(asked: JointRequest) -> tuple[tuple[int, ...], dict[tuple[int, int], Plan | None]] | None:
    """The best of all compositions, compared one after the other."""
    plans: dict[tuple[int, int], Plan | None] = {}
    has_gpu = any(it.device != CPU for it in asked.offers)
    best: tuple[Any, tuple[int, ...]] | None = None
    for counts in compositions(asked.config.layers, len(asked.offers)):
        for rank, part in enumerate(Part.split(asked.config, counts)):
            if (rank, part.layers) not in plans:
                plans[rank, part.layers] = slow_plan(asked, rank, part)
        chosen = [plans[key] for key in enumerate(counts)]
        if None in chosen:
            continue
        known = [plan for plan in chosen if plan is not None]
        from_files = sum(plan.file_experts for plan in known)
        for plan, it in zip(known, asked.offers, strict=True):
            if it.device == CPU and it.ram.wish and plan.mapped_bytes:
                over = plan.device_bytes + plan.arena_bytes + plan.mapped_bytes - parse_bytes(it.ram.wish)
                from_files += max(-(-over // plan.blob_bytes), 0)
        without = sum(plan.experts - sum(plan.slots_per_layer) for plan in known)
        on_cpus = sum(n for n, it in zip(counts, asked.offers, strict=True) if it.device == CPU) * has_gpu
        found = (from_files, without, on_cpus, sum(n * n for n in counts)), counts
        best = found if best is None or found < best else best
    return best and (best[1], plans)


def shares(asked: JointRequest) -> tuple[int, ...] | None:
    try:
        return share_layers(asked.config, asked.formats, asked.options, asked.offers, asked.files)
    except (DeviceError, OptionError):
        return None


@settings(max_examples=60)
@given(requests)
def test_shares_are_the_best_of_all(asked: JointRequest) -> None:
    slow, got = slow_shares(asked), shares(asked)
    assert got == (slow and slow[0])
    if slow is None or got is None:
        return
    for rank, layers in enumerate(got):
        assert asked.plan(rank, layers) == slow[1][rank, layers], "the plan that the rank makes itself"


@settings(max_examples=60)
@given(requests)
def test_no_rank_is_over_its_budget(asked: JointRequest) -> None:
    got = shares(asked)
    if got is None:
        return
    assert sum(got) == asked.config.layers and min(got) >= 1
    for rank, layers in enumerate(got):
        plan, own = asked.plan(rank, layers), asked.offers[rank]
        assert plan is not None and len(plan.slots_per_layer) == layers
        most, host = (parse_bytes(it.wish) if it.wish else 1 << 60 for it in (own.memory, own.ram))
        together = plan.device_bytes + (plan.arena_bytes if own.device == CPU else 0)
        assert together <= most and (own.device == CPU or plan.host_bytes <= host)
        assert together == used_bytes(asked.request(rank, layers), plan)
        assert plan.experts == layers * asked.config.experts
    assert len({asked.plan(rank, layers).chunk for rank, layers in enumerate(got)}) == 1  # type: ignore[union-attr]


REMEDIES: dict[str, Any] = {
    r"lower --slots to (\d+)": lambda it, slots: it.changed(slots=int(slots)),
    r"leave out --berths": lambda it: it.changed(berths=None),
    r"leave out --rank-layers": lambda it: it.changed(rank_layers=None),
    r"let experts be offloaded \(--offload auto\)": lambda it: it.changed(offload="auto"),
    r"lower --context to (\d+)": lambda it, context: it.changed(context=int(context)),
    r"guess none \(--prefetch 0\)": lambda it: it.changed(prefetch=0),
    r"quantize with --(\w+) (\S+) \(": lambda it, kind, spec: replace(
        it, formats=replace(it.formats, **{kind: QuantSpec.parse(spec)}), files=torch.bfloat16
    ),
    r"leave rank (\d+) out": lambda it, rank: replace(
        it, offers=tuple(offer for own, offer in enumerate(it.offers) if own != int(rank))
    ),
    r"give each rank (\S+ \S+) more": lambda it, more: replace(
        it, offers=tuple(larger(offer, parse_bytes(more)) for offer in it.offers)
    ),
}


def larger(own: Offer, more: int) -> Offer:
    memories = {
        name: replace(it, wish=str(int(it.wish) + more)) if (it := getattr(own, name)).wish else it
        for name in ("memory", "ram")
    }
    return replace(own, **memories)


@settings(max_examples=60)
@given(st.data(), requests)
def test_a_refusal_is_one_line_and_its_remedies_hold(data: st.DataObject, asked: JointRequest) -> None:
    if data.draw(st.booleans()):
        every = list(compositions(asked.config.layers, len(asked.offers)))
        given = ",".join(map(str, data.draw(st.sampled_from(every))))
        asked = asked.changed(distributed=True, rank_layers=given)
    try:
        got = share_layers(asked.config, asked.formats, asked.options, asked.offers, asked.files)
        assert asked.options.rank_layers in (None, ",".join(map(str, got)))
        return
    except OptionError as error:
        assert re.match(r"berths is \d+ on each of \d ranks, and all \d+ experts need one", str(error))
        assert asked.options.rank_layers or slow_shares(asked) is None
        return
    except DeviceError as error:
        text = str(error)
    assert "\n" not in text and re.match(r"rank \d|the model has \d+ layers, and there is room for \d", text)
    found = [(change, words) for pattern, change in REMEDIES.items() for words in re.finditer(pattern, text)]
    assert 1 <= len(found) <= 2 and text.count(", or ") == len(found) - 1, text
    for change, words in found:
        assert shares(change(asked, *words.groups())), text


CARDS = tuple(offer(rank, "gpu", 1 << 30, None) for rank in range(3))


@pytest.mark.parametrize(
    ("layers", "ranks", "expected"),
    [(6, 1, (6,)), (6, 2, (3, 3)), (5, 2, (2, 3)), (5, 3, (1, 2, 2)), (3, 3, (1, 1, 1))],
)
def test_equal_ranks_have_equal_shares(layers: int, ranks: int, expected: tuple[int, ...]) -> None:
    assert share_layers(replace(MODEL, layers=layers), PLAIN, EngineOptions(), CARDS[:ranks]) == expected


def test_a_cpu_has_as_few_layers_as_it_can_beside_a_gpu() -> None:
    cpu = offer(1, "cpu", None, 1 << 30)
    assert share_layers(replace(MODEL, layers=6), PLAIN, EngineOptions(), (CARDS[0], cpu)) == (5, 1)
    assert share_layers(replace(MODEL, layers=6), PLAIN, EngineOptions(), (cpu, CARDS[0], cpu)) == (1, 4, 1)
    assert share_layers(replace(MODEL, layers=6), PLAIN, EngineOptions(), (cpu, cpu)) == (3, 3)


QUANTIZED = Formats(QuantSpec(4), QuantSpec(4), QuantSpec(8))
FOUR = replace(MODEL, layers=4)


def test_experts_that_are_read_from_files_count_first() -> None:
    """The card lacks slots for more than a layer, but its host has berths for all. The CPU has memory for one
    layer, and would read others again and again."""
    wishes, files = EngineOptions(dtype="float32", prefetch=0, context=2), torch.bfloat16
    free = (offer(0, "gpu", None, None), offer(1, "cpu", None, None))
    roomy = JointRequest(FOUR, QUANTIZED, wishes, free, files)
    slots, mapped = make_plan(roomy.request(0, 3).changed(slots=2)), roomy.plan(1, 1)
    assert mapped is not None and roomy.shares == (3, 1)
    card = offer(0, "gpu", slots.device_bytes - BESIDE, None)
    cpu = offer(1, "cpu", None, mapped.device_bytes + mapped.mapped_bytes)
    asked = JointRequest(FOUR, QUANTIZED, wishes, (card, cpu), files)
    assert asked.shares == (3, 1) and asked.costs[0][3][:2] == (0, 6) and asked.costs[1][1][:2] == (0, 0)
    assert asked.costs[1][2][0] > 0, "the CPU could have more, from files"
    assert replace(asked, offers=(card, free[1])).shares[0] < 3  # type: ignore[index]


def test_mapped_files_beyond_memory_count_as_read_from_files() -> None:
    wishes, files = EngineOptions(dtype="float32"), torch.bfloat16
    free = JointRequest(
        FOUR, QUANTIZED, wishes, (offer(0, "cpu", None, None), offer(1, "cpu", None, None)), files
    )
    assert free.shares == (2, 2)
    one = free.plan(0, 1)
    assert one is not None and one.mapped_bytes > 0
    small = offer(0, "cpu", None, one.device_bytes + one.mapped_bytes)
    assert share_layers(FOUR, QUANTIZED, wishes, (small, free.offers[1]), files) == (1, 3)


def refused(match: str, layers: int, ranks: int, **wishes: Any) -> None:
    with pytest.raises(OptionError, match=match):
        share_layers(replace(MODEL, layers=layers), PLAIN, EngineOptions(**wishes), CARDS[:ranks])


def test_options_that_do_not_fit_the_ranks() -> None:
    refused("there are 3 ranks, and the model has 2 layers; start at most 2 ranks", 2, 3)
    given = {"distributed": True, "rank_layers": "2,4"}
    refused("rank_layers is 2,4, and there are 3 ranks; give as many numbers", 6, 3, **given)
    refused("rank_layers is 2,4, 6 in all, and the model has 5 layers; make it 5 in all", 5, 2, **given)
    refused(r"slots is 9, and must be from 2", 5, 2, slots=9)
    cpus = tuple(offer(rank, "cpu", None, 1 << 30) for rank in range(2))
    with pytest.raises(
        OptionError, match="vram is 11GiB, and every rank computes on its CPU; limit it with --ram"
    ):
        share_layers(MODEL, PLAIN, EngineOptions(vram="11GiB"), cpus)


def test_a_part_has_the_dtype_and_the_chunk_of_the_whole() -> None:
    config = ModelConfig(
        vocab=32000, hidden=1024, layers=16, heads=8, kv_heads=2, head_dim=128, ffn=3584, experts=8,
        experts_per_token=2, context=4096, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip
    cpus = tuple(replace(offer(rank, "cpu", None, None), bfloat16=True) for rank in range(8))
    asked = JointRequest(config, PLAIN, EngineOptions(context=4096), cpus)
    whole = Request.make(config, PLAIN, EngineOptions(context=4096, dtype="bfloat16"), Target(CPU))
    assert {asked.request(rank, 2).dtype for rank in range(8)} == {torch.bfloat16}
    assert {asked.plan(rank, 2).chunk for rank in range(8)} == {chunk_tokens(whole)} == {1024}  # type: ignore[union-attr]
    old = replace(asked, offers=tuple(replace(it, bfloat16=rank > 0) for rank, it in enumerate(cpus)))
    assert [old.request(rank, 2).dtype for rank in range(2)] == [torch.float32, torch.bfloat16]
    assert len({old.plan(rank, 2).chunk for rank in range(8)}) == 1  # type: ignore[union-attr]


def test_the_parts_of_a_model_take_what_the_whole_takes() -> None:
    """Nothing is left out and nothing counted twice, but for what every rank needs."""
    asked = JointRequest(replace(MODEL, layers=5), PLAIN, EngineOptions(dtype="float32"), CARDS)
    whole = JointRequest(asked.config, PLAIN, asked.options, CARDS[:1]).plan(0, 5)
    plans = [asked.plan(rank, layers) for rank, layers in enumerate((1, 2, 2))]
    assert whole is not None and all(plans)
    known = [plan for plan in plans if plan is not None]
    rope = 2 * MODEL.context * MODEL.head_dim * 4
    assert sum(plan.trunk_bytes - rope for plan in known) == whole.trunk_bytes - rope
    for name in ("kv_bytes", "slots_bytes", "experts"):
        assert sum(getattr(plan, name) for plan in known) == getattr(whole, name), name
