"""The sampler against Transformers' logits processors, and properties of its own."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime import RequestError, SamplingParams, sampler
from runtime.sampler import add_bias, draw, keep_min_p, keep_top_k, keep_top_p, penalize_repetition, sample

V = 24
VANISHING = 1e-30  # close to the smallest float32
NUMBERS = st.integers(-800, 800).map(lambda n: n / 100)
DIFFERENT = st.lists(NUMBERS, min_size=V, max_size=V, unique=True).map(torch.tensor)  # logits [V]
ANY = st.lists(NUMBERS, min_size=2, max_size=V).map(torch.tensor)
SEEN = st.sets(st.integers(0, V - 1), max_size=V)
P = st.integers(1, 99).map(lambda n: n / 100)

GREEDY = SamplingParams(temperature=0)


def mark(ids: set[int]) -> Tensor:  # -> [V] bool
    return torch.tensor([i in ids for i in range(V)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chosen(
    logits: Tensor, params: SamplingParams, seen: Tensor | None, source: torch.Generator | None
) -> int:
    return sample(logits, params, seen, source)[0]


def survivors(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> dict[int, float]:
    """The probability of each id that `sample` draws from, caught where it draws."""
    caught = []

    def catch(probabilities: Tensor, source: torch.Generator | None) -> Tensor:
        caught.append(probabilities)
        return draw(probabilities, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "draw", catch)
        assert chosen(logits, params, seen, generator()) in caught[0].nonzero().flatten().tolist()
    return {i: p for i, p in enumerate(caught[0].tolist()) if p > VANISHING}


@settings(max_examples=150)
@given(
    DIFFERENT,
    SEEN,
    st.floats(0.5, 3),
    st.floats(0.2, 3),
    st.integers(0, V + 3),
    P | st.just(1),
    P | st.just(0),
)
def test_the_filters_together_are_those_of_transformers_in_its_order(
    logits: Tensor, seen: set[int], penalty: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    def oracle(shift: float) -> Tensor:  # [V] float64 probabilities
        steps: list[LogitsProcessor] = [RepetitionPenaltyLogitsProcessor(penalty)]
        steps.append(TemperatureLogitsWarper(temperature))
        steps += [TopKLogitsWarper(top_k)] if top_k else []
        steps += [TopPLogitsWarper(top_p + shift)] if top_p < 1 else []
        steps += [MinPLogitsWarper(min_p + shift)] if min_p else []
        ids: Any = torch.tensor([sorted(seen)], dtype=torch.long)
        return LogitsProcessorList(steps)(ids, logits[None].double())[0].softmax(-1)

    expected = oracle(0)
    clear = torch.equal(oracle(1e-5) > VANISHING, oracle(-1e-5) > VANISHING)
    gaps = penalize_repetition(logits, mark(seen), penalty).sort().values.diff()
    assume(clear and gaps.min() > 1e-5)  # else rounding decides which tokens a filter keeps

    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    drawn_from = survivors(logits, params, mark(seen))
    assert set(drawn_from) == set((expected > VANISHING).nonzero().flatten().tolist())
    assert torch.allclose(
        torch.tensor([drawn_from.get(i, 0) for i in range(V)]).double(), expected, atol=1e-5
    )


@given(DIFFERENT, st.integers(1, V))
def test_top_k_keeps_k(logits: Tensor, k: int) -> None:
    kept = keep_top_k(logits, k)
    assert set(kept.isfinite().nonzero().flatten().tolist()) == set(logits.topk(k).indices.tolist())
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])


@given(ANY, P)
def test_top_p_keeps_the_fewest_that_reach_p(logits: Tensor, p: float) -> None:
    probabilities = logits.double().softmax(-1)
    kept = keep_top_p(logits, p).isfinite()
    inside = probabilities[kept].sort().values
    assert inside.sum() >= p - 1e-6
    assert inside[1:].sum() <= p + 1e-6  # without the least likely one they would not reach p
    assert kept.all() or inside[0] >= probabilities[~kept].max()


@given(ANY, P | st.just(1.0))
def test_min_p_keeps_by_the_ratio_to_the_likeliest(logits: Tensor, p: float) -> None:
    ratio = (logits - logits.max()).double().exp()
    assume(((ratio - p).abs() > 1e-6).logical_or(ratio == 1).all())
    assert torch.equal(keep_min_p(logits, p).isfinite(), ratio >= p)


@given(DIFFERENT, SEEN, st.floats(1.01, 3))
def test_a_penalty_lowers_what_was_seen_and_nothing_else(
    logits: Tensor, seen: set[int], penalty: float
) -> None:
    marked = mark(seen)
    penalized = penalize_repetition(logits, marked, penalty)
    assert torch.equal(penalized[~marked], logits[~marked])
    assert (penalized[marked & (logits != 0)] < logits[marked & (logits != 0)]).all()


@given(ANY)
def test_greedy_takes_the_first_of_the_largest(logits: Tensor) -> None:
    values = logits.tolist()
    assert chosen(logits, GREEDY, None, None) == values.index(max(values))


@given(DIFFERENT, SEEN, st.integers(1, V), P)
def test_greedy_minds_penalty_and_bias_and_no_filter(
    logits: Tensor, seen: set[int], top_k: int, top_p: float
) -> None:
    params = SamplingParams(
        temperature=0, repetition_penalty=1.7, logit_bias={3: 4.0}, top_k=top_k, top_p=top_p
    )
    changed = [
        (x / 1.7 if x > 0 else x * 1.7) if i in seen else x for i, x in enumerate(logits.double().tolist())
    ]
    changed[3] += 4.0
    best = sorted(changed)[-2:]
    assume(best[1] - best[0] > 1e-4)
    assert chosen(logits, params, mark(seen), None) == changed.index(max(changed))


@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.3), SamplingParams(min_p=0.5)],
)
def test_of_all_but_one_forbidden_that_one_is_taken(params: SamplingParams) -> None:
    params = replace(params, logit_bias={i: -math.inf for i in range(V) if i != 17})
    logits = torch.linspace(5, -5, V)
    assert {chosen(logits, params, None, generator(seed)) for seed in range(20)} == {17}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(V), -math.inf)),
        SamplingParams(logit_bias=dict.fromkeys(range(V), -math.inf)),
        SamplingParams(temperature=1e-300),
        SamplingParams(logit_bias={1: 1e300}),
        SamplingParams(temperature=0, logit_bias={1: 1e300}),
    ],
)
def test_where_no_token_is_left_the_request_fails(params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="no token can be sampled"):
        chosen(torch.randn(V, generator=generator()), params, None, generator())


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([5.0, 9.0, 8.999, -50.0])
    params = SamplingParams(temperature=1e-6)
    assert {chosen(logits, params, None, generator(seed)) for seed in range(50)} == {1}


def test_bias_adds_up_and_leaves_the_input_alone() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert add_bias(logits, {0: 0.5, 2: -math.inf}).tolist() == [1.5, 2.0, -math.inf]
    assert logits.tolist() == [1.0, 2.0, 3.0]


def test_equal_logits_are_all_kept_by_top_k_and_the_first_by_top_p() -> None:
    equal = torch.zeros(4)
    assert keep_top_k(equal, 2).isfinite().all()
    assert keep_top_p(equal, 0.5).isfinite().tolist() == [True, True, False, False]
    assert keep_min_p(equal, 1.0).isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_their_probabilities_say(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    params = SamplingParams(temperature=temperature, top_p=1.0)
    source, n = generator(5), 4000
    counts = torch.bincount(
        torch.tensor([chosen(logits, params, None, source) for _ in range(n)]), minlength=5
    )
    expected = n * (logits / temperature).softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 23.5  # 4 degrees of freedom: a right sampler exceeds this once in 10 000


@pytest.mark.parametrize("act", [lambda: torch.manual_seed(99), lambda: torch.rand(1000)])
def test_the_global_source_of_chance_neither_moves_nor_matters(act: Callable[[], object]) -> None:
    logits = torch.zeros(V)
    draws = []
    for disturb in (lambda: None, act):
        source = generator(3)
        before = torch.random.get_rng_state()
        first = chosen(logits, SamplingParams(), None, source)
        assert torch.equal(torch.random.get_rng_state(), before)
        disturb()
        draws.append([first] + [chosen(logits, SamplingParams(), None, source) for _ in range(20)])
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 5


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=V).map(torch.tensor), st.integers(0, 999))
def test_draws_as_multinomial_does(weights: Tensor, seed: int) -> None:
    assume(weights.sum() > 0)
    probabilities = weights / weights.sum()
    sources = generator(seed), generator(seed)
    for _ in range(3):
        expected = torch.multinomial(probabilities, 1, generator=sources[0])
        assert draw(probabilities, sources[1]) == expected


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_k=5, min_p=0.01, repetition_penalty=1.2)])
def test_the_device_is_waited_for_once(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Watching(TorchDispatchMode):
        """Sees the calls inside of PyTorch, too."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "local_scalar" in str(func) or "nonzero" in str(func):
                asked.append(str(func))
            return func(*args, **(kwargs or {}))

    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: (asked.append("tolist"), tolist(tensor))[1])
    with Watching():
        sample(torch.randn(V), params, mark({3}), generator())
    assert asked == ["tolist"]


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams()])
def test_logits_that_are_no_numbers(spoilt: float, params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="NaN"):
        sample(torch.tensor([0.0, spoilt, 1.0]), params, None, generator())


@given(DIFFERENT, st.lists(st.integers(0, V - 1), max_size=12), NUMBERS, NUMBERS)
def test_penalties_by_openai_s_formula(
    logits: Tensor, sampled: list[int], presence: float, frequency: float
) -> None:
    counts = torch.tensor([float(sampled.count(i)) for i in range(V)])
    params = SamplingParams(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
    expected = [
        logit - sampled.count(i) * frequency - (i in sampled) * presence
        for i, logit in enumerate(logits.tolist())
    ]
    adjusted = sampler.adjust(logits, params, None, counts)
    torch.testing.assert_close(adjusted, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert sample(logits, params, None, None, counts).id == int(adjusted.argmax())


@given(DIFFERENT, SEEN, st.just(0.0) | st.floats(0.1, 3), st.integers(0, 99))
def test_only_what_is_allowed(logits: Tensor, allowed: set[int], temperature: float, seed: int) -> None:
    assume(allowed)
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.8, min_p=0.05)
    for _ in range(3):
        sampled = sample(logits, params, None, generator(seed), None, mark(allowed))
        assert sampled.id in allowed
        assert sampled.logprob == logits.log_softmax(-1)[sampled.id].item()  # as if all were allowed
    with pytest.raises(RequestError, match="no token can be sampled"):
        sample(logits, params, None, generator(seed), None, mark(set()))


@given(DIFFERENT, st.integers(0, V + 3))
def test_the_likeliest(logits: Tensor, count: int) -> None:
    params = SamplingParams(top_logprobs=count, logit_bias={0: 5.0})
    top = sample(logits, params, None, generator()).top
    expected = sorted(enumerate(logits.log_softmax(-1).tolist()), key=lambda pair: -pair[1])
    assert list(top) == expected[:count]
