"""Made-up routing: its shares against the paper's, its guesses' recall, and its place in a model."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.quant.spec import QuantSpec
from model.router import Choice, Router
from runtime.errors import OptionError
from runtime.experts.policy import make_policy
from runtime.experts.slots import SlotTable
from tools.bench import routing
from tools.bench.forced import Trace, TraceRouter
from tools.bench.random_model import random_model

CPU = torch.device("cpu")
SMALL = ModelConfig(
    vocab=100, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=64, experts=4,
    experts_per_token=2, context=64, rope_theta=1e6, norm_eps=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "first", "overlap"),
    [(0, 0.14, (0.46, 0.48)), (15, 0.28, (0.62, 0.67)), (31, 0.22, (0.55, 0.58))],
)
def test_synthetic_repeats_as_the_paper_says(layer: int, first: float, overlap: tuple[float, float]) -> None:
    E, A = routing.PAPER
    fresh, kept, moved = routing.mixture(layer / 31)  # that is exact; a trace is only near it
    assert min(fresh, kept, moved) >= 0 and fresh + kept + moved == pytest.approx(1)
    assert kept + fresh / E == pytest.approx(first)
    assert overlap[0] < 1 - fresh * 15 / 28 < overlap[1]
    shares = routing.repetition(routing.synthetic(32, E, A, 8000))
    assert shares["first"][layer] == pytest.approx(kept + fresh / E, abs=0.02)
    assert shares["overlap"][layer] == pytest.approx(1 - fresh * 15 / 28, abs=0.02)


def test_uniform_repeats_by_chance() -> None:
    shares = routing.repetition(routing.uniform(4, 8, 2, 8000))
    assert shares["first"] == pytest.approx([1 / 8] * 4, abs=0.02)
    assert shares["overlap"] == pytest.approx([13 / 28] * 4, abs=0.02)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([routing.uniform, routing.synthetic]), st.integers(1, 5), st.integers(2, 9), st.data())
def test_any_shape(make: routing.Maker, layers: int, experts: int, data: st.DataObject) -> None:
    per_token, seed = data.draw(st.integers(2, experts)), data.draw(st.integers(0, 1 << 40))
    trace = make(layers, experts, per_token, 20, seed)
    assert trace.shape == (20, layers, per_token) and trace.dtype == torch.int64 and trace.is_contiguous()
    assert trace.min() >= 0 and trace.max() < experts
    assert all(len(set(row)) == per_token for row in trace.flatten(0, 1).tolist())
    assert torch.equal(trace, make(layers, experts, per_token, 20, seed))
    assert len(make(layers, experts, per_token, 1, seed)) == 1


def test_every_expert_is_used_alike_and_seeds_and_layers_differ() -> None:
    trace = routing.synthetic(8, 8, 2, 4000)
    for place in range(2):
        counts = trace[..., place].flatten().bincount(minlength=8).double()
        assert (counts / counts.sum()).tolist() == pytest.approx([1 / 8] * 8, abs=0.01)
    assert not torch.equal(trace, routing.synthetic(8, 8, 2, 4000, seed=1))
    assert not torch.equal(trace[:, 3], trace[:, 4])


def test_what_is_kept_on_purpose() -> None:
    """With 64 experts chance keeps next to nothing: what repeats is what the mixture says."""
    trace = routing.synthetic(1, 64, 2, 20000)
    assert routing.repetition(trace)["first"][0] == pytest.approx(routing.mixture(0)[1] + 1 / 64, abs=0.01)
    middle = routing.synthetic(32, 64, 2, 4000)[:, 15]  # [P, A]
    moved = (middle[1:, 1] == middle[:-1, 0]).double().mean()
    assert float(moved) == pytest.approx(routing.mixture(15 / 31)[2] + 1 / 64, abs=0.02)


@pytest.mark.parametrize(("make", "per_token"), [(routing.synthetic, 1), (routing.uniform, 9)])
def test_what_makes_no_sense(make: routing.Maker, per_token: int) -> None:
    with pytest.raises(OptionError, match=rf"choose from \d to all of their 8 experts, not {per_token}$"):
        make(2, 8, per_token, 10)


@pytest.mark.parametrize(("distance", "recall"), [(1, None), (2, None), (1, 1.0), (1, 0.0), (2, 0.5)])
def test_recall_of_guesses(distance: int, recall: float | None) -> None:
    trace = routing.synthetic(8, 8, 2, 1000)
    ranking = routing.guesses(trace, 8, distance, recall)
    assert ranking.shape == (1000, 8, 8) and torch.equal(
        ranking.sort().values, torch.arange(8).expand(1000, 8, 8)
    )
    assert torch.equal(ranking, routing.guesses(trace, 8, distance, recall))
    expected = routing.RECALL[distance] if recall is None else recall
    found = (trace[..., None] == ranking[..., None, :2]).any(-1)  # [P, L, A]
    assert float(found.double().mean()) == pytest.approx(expected, abs=0.015)
    top = (trace == ranking[..., :1]).any(-1)  # what is found comes before what is not needed
    assert torch.equal(top, found.any(-1))


def test_hit_ratio_is_the_slot_table_s() -> None:
    trace = routing.synthetic(3, 8, 2, 200)
    for slots in (2, 3, 5):
        hits = 0
        for layer in range(3):
            table = SlotTable(range(slots), make_policy("lru", 0, layer))
            for choice in trace[:, layer].sort().values.tolist():
                taken = [table.hit(e) for e in choice if table.find(e) is not None]
                hits += len(taken)
                for e in choice:
                    if table.find(e) is None:
                        taken.append(table.place(e)[0])
                        table.ready(taken[-1])
                for slot in taken:
                    table.release(slot)
        assert routing.hit_ratio(trace, slots) == hits / trace.numel()
    about = routing.describe(trace, slots=(2, 8))
    assert about["lru_hit_ratio_by_slots"].keys() == {"2", "8"} and about["tokens"] == 200
    assert about["lru_hit_ratio_by_slots"]["8"] > 0.95


def test_chance_meets_few_slots() -> None:
    """Of independent choices, the share in S of E slots is S / E, whatever the policy."""
    trace = routing.uniform(8, 8, 2, 1000)
    for slots, policy in itertools.product((2, 4), ("lru", "lfu")):
        assert routing.hit_ratio(trace, slots, policy) == pytest.approx(slots / 8, abs=0.02)


def router() -> Router:
    gate = Router(SMALL, CPU)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(1))
    return gate.requires_grad_(False)


def same(a: Choice, b: Choice) -> bool:
    return torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights)


def test_a_trace_router() -> None:
    x, position = torch.randn(5, SMALL.hidden), torch.zeros(1, dtype=torch.int64)
    trace, gate = Trace.make(routing.uniform(1, 4, 2, 7), 4, 0, CPU), router()
    forced = TraceRouter(gate, trace, 0, position)
    for row in (0, 3, 6):
        position.fill_(row)  # as a graph's replay would find it
        choice = forced(x[:1])
        ids, weights = choice.ids, choice.weights
        assert torch.equal(ids, trace.choices[row : row + 1, 0]) and weights.sum() == pytest.approx(1)
        logits = gate.logits(x[:1])[0]
        assert torch.equal(weights[0], logits[ids[0]].softmax(-1))
    assert forced.weight is gate.weight
    assert same(forced(x), gate(x))  # a prompt routes by itself
    own = gate(x[:1])
    its = Trace.make(own.ids[:, None], 4, 0, CPU)  # a trace of its own choices changes nothing
    assert same(TraceRouter(gate, its, 0, position.fill_(0))(x[:1]), own)


def test_a_trace_router_looks_ahead_as_the_trace_says() -> None:
    model = random_model(SMALL, QuantSpec(16), QuantSpec(16), torch.float32, CPU)
    model.look_ahead(2)
    trace, position = Trace.make(routing.uniform(3, 4, 2, 6), 4, 2, CPU), torch.tensor([4])
    rankings = [routing.guesses(trace.choices, 4, d) for d in (1, 2)]
    x = torch.randn(2, SMALL.hidden)
    for layer, later in ((0, [1, 2]), (1, [2]), (2, [])):
        own = model.layers[layer].block_sparse_moe.gate
        forced = TraceRouter(own, trace, layer, position)
        ranked = forced(x[:1]).ranking
        assert forced.distance == len(later) and (ranked is None) == (not later)
        if ranked is not None:
            expected = torch.stack([rankings[d][4, to] for d, to in enumerate(later)])
            assert torch.equal(ranked, expected)
            assert torch.equal(forced(x).ranking, own(x).ranking)  # a prompt routes by itself


def test_a_model_routed_by_a_trace() -> None:
    model = random_model(SMALL, QuantSpec(16), QuantSpec(16), torch.float32, CPU)
    trace, position = routing.synthetic(3, 4, 2, 8), torch.zeros(1, dtype=torch.int64)
    seen: list[Tensor] = []
    made = Trace.make(trace, 4, 0, CPU)
    for layer, block in enumerate(model.layers):
        moe = block.block_sparse_moe
        moe.gate = TraceRouter(moe.gate, made, layer, position)
        moe.gate.register_forward_hook(lambda module, inputs, output: seen.append(output.ids))
    cache = KVCache.allocate(SMALL, 1, 8, torch.float32, CPU)
    with torch.inference_mode():
        for n in range(8):
            position.fill_(n)
            model(torch.tensor([[n]]), cache, last=True)
    assert torch.equal(torch.cat(seen).view(8, 3, 2), trace)
