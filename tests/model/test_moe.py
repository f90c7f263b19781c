"""Routing and experts, against a loop in float64 that gives every token to every expert."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.mixtral import Mixtral
from model.moe import Experts, ResidentExperts, SparseMoE, by_expert
from model.router import Choice, Router
from tests.model.reference import CPU, TINY, random_ids, random_model


def make_experts(config: ModelConfig, seed: int = 0) -> ResidentExperts:
    generator = torch.Generator().manual_seed(seed)
    experts = ResidentExperts(config, torch.float32, CPU)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return experts


def make_layer(config: ModelConfig) -> tuple[SparseMoE, ResidentExperts]:
    experts = make_experts(config)
    layer = SparseMoE(config, experts, CPU)
    torch.nn.init.normal_(layer.gate.weight, std=2 * config.hidden**-0.5)
    return layer, experts


def apply(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return experts(x, Choice(ids, weights))


def make_choices(config: ModelConfig, N: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], ids [N, A] in random order, weights [N, A]."""
    generator = torch.Generator().manual_seed(seed)
    E, A = config.experts, config.experts_per_token
    ids = torch.rand(N, E, generator=generator).argsort(1)[:, :A]
    weights = torch.randn(N, A, generator=generator).softmax(1)
    return torch.randn(N, config.hidden, generator=generator), ids, weights


def dense(experts: ResidentExperts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The definition: sum over e of weight_e * w2_e (silu(w1_e x) * w3_e x), nothing skipped."""
    share = torch.zeros(len(x), len(experts.experts), dtype=torch.float64).scatter(1, ids, weights.double())
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e, expert in enumerate(experts.experts):
        w1, w3 = expert.w13.weight.double().tensor_split(2)
        gate, up = x.double() @ w1.T, x.double() @ w3.T
        out = out + share[:, e, None] * ((gate / (1 + torch.exp(-gate)) * up) @ expert.w2.weight.double().T)
    return out


@pytest.mark.parametrize(("E", "A"), [(1, 1), *itertools.product([4], [1, 2, 3, 4]), (8, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("N", [1, 2, 7, 64])
def test_experts_against_dense(E: int, A: int, N: int) -> None:
    config = replace(TINY, experts=E, experts_per_token=A)
    experts, choices = make_experts(config), make_choices(config, N)
    out = apply(experts, *choices)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), dense(experts, *choices), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("E", "A"), [(4, 1), (4, 2), (8, 3), (4, 4)])
def test_layer_against_dense(E: int, A: int) -> None:
    """Against the definition, for several sequences: softmax over all, the A largest, renormalized to 1."""
    config = replace(TINY, experts=E, experts_per_token=A)
    layer, experts = make_layer(config)
    x = torch.randn(3, 5, config.hidden)
    flat = x.flatten(0, 1)
    probability = (flat.double() @ layer.gate.weight.double().T).softmax(-1)
    weights, ids = probability.topk(A)
    expected = dense(experts, flat, ids, weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(layer(x).double(), expected.view(3, 5, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_router_works_in_float32(dtype: torch.dtype) -> None:
    config = replace(TINY, experts=8, experts_per_token=3)
    router = make_layer(config)[0].gate
    x = torch.randn(200, config.hidden).to(dtype)
    choice = router(x)
    ids, weights = choice.ids, choice.weights
    probability = (x.double() @ router.weight.double().T).softmax(-1)
    expected, expected_ids = probability.topk(3)
    assert torch.equal(ids, expected_ids)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    torch.testing.assert_close(
        weights.double(), expected / expected.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6
    )
    assert (expected.sum(-1) < 0.9).any(), "renormalizing would change nothing here"


def test_one_expert_per_token_has_all_the_weight() -> None:
    config = replace(TINY, experts_per_token=1)
    layer, experts = make_layer(config)
    x = torch.randn(1, 6, config.hidden)
    choice = layer.gate(x[0])
    ids, weights = choice.ids, choice.weights
    assert torch.equal(weights, torch.ones(6, 1))
    for n, e in enumerate(ids[:, 0].tolist()):
        alone = experts.experts[e](x[:, n])
        torch.testing.assert_close(layer(x)[:, n], alone)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_router_in_extremes(size: float) -> None:
    """Equal logits give A different experts equal weights, and logits of thousands do not overflow."""
    config = replace(TINY, experts=8, experts_per_token=2)
    router = make_layer(config)[0].gate
    choice = router(torch.randn(50, config.hidden) * size)
    ids, weights = choice.ids, choice.weights
    assert all(len(set(row)) == 2 for row in ids.tolist())
    assert ids.min() >= 0 and ids.max() < 8
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    if size == 0:
        assert torch.equal(weights, torch.full((50, 2), 0.5))


def test_ties_in_one_layer() -> None:
    """Two experts have the same gate row. The sum has the output of the one that is chosen."""
    config = replace(TINY, experts=4, experts_per_token=2)
    layer, experts = make_layer(config)
    with torch.no_grad():
        layer.gate.weight[3] = layer.gate.weight[1]
    x = torch.randn(40, config.hidden)
    choice = layer.gate(x)
    ids, weights = choice.ids, choice.weights
    assert all(len(set(row)) == 2 for row in ids.tolist())
    tied = ids.sort(1).values.eq(torch.tensor([1, 3])).all(1)
    assert tied.any() and torch.equal(weights[tied], torch.full((int(tied.sum()), 2), 0.5))
    expected = dense(experts, x, ids, weights)
    torch.testing.assert_close(layer(x[None])[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N", [1, 9])
def test_only_chosen_experts_run(N: int) -> None:
    """Each chosen expert runs once, on its own tokens only. The weights of the others are never read."""
    config = replace(TINY, experts=8, experts_per_token=2)
    experts = make_experts(config)
    x, _, weights = make_choices(config, N)
    ids = torch.tensor([[6, 1]]).repeat(N, 1)
    ids[N // 2] = torch.tensor([1, 4])
    seen: dict[int, int] = {}

    def watch(e: int, rows: int) -> None:
        assert e not in seen
        seen[e] = rows

    for e, expert in enumerate(experts.experts):
        expert.register_forward_hook(lambda module, inputs, output, e=e: watch(e, len(inputs[0])))
    expected = dense(experts, x, ids, weights)
    with torch.no_grad():
        for e in (0, 2, 3, 5, 7):
            for parameter in experts.experts[e].parameters():
                parameter.fill_(torch.nan)
    torch.testing.assert_close(apply(experts, x, ids, weights).double(), expected, rtol=1e-5, atol=1e-5)
    assert seen == {e: n for e in range(8) if (n := int((ids == e).sum()))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_token_and_many_give_the_same_bits(dtype: torch.dtype) -> None:
    """With one token for each expert, both paths compute the same products, so only the sums could differ."""
    config = replace(TINY, experts=12, experts_per_token=3)
    experts = make_experts(config).to(dtype)
    x, _, weights = make_choices(config, 4)
    x = x.to(dtype)
    ids = torch.tensor([[10, 3, 7], [0, 11, 5], [8, 2, 9], [6, 4, 1]])
    together = apply(experts, x, ids, weights)
    assert together.dtype == dtype
    for n in range(4):
        assert torch.equal(
            apply(experts, x[n : n + 1], ids[n : n + 1], weights[n : n + 1]), together[n : n + 1]
        )


@pytest.mark.parametrize("N", [1, 2])
def test_contributions_are_added_in_ascending_order_of_expert(N: int) -> None:
    """Experts 0, 1, 2 add s, -s and 1 with s = 2**30. (s - s) + 1 is 1, but it is 0 if 1 is added sooner."""
    config = replace(TINY, hidden=1, ffn=1, experts=3, experts_per_token=3)
    experts = make_experts(config)
    with torch.no_grad():
        for expert, w2 in zip(experts.experts, [2.0**30, -(2.0**30), 1.0], strict=True):
            expert.w13.weight.fill_(1)
            expert.w2.weight.fill_(w2)
    x, weights = torch.full((N, 1), 3.0), torch.full((N, 3), 0.25)
    share = 0.25 * torch.nn.functional.silu(x) * x
    for order in itertools.permutations(range(3)):
        assert torch.equal(apply(experts, x, torch.tensor([order]).repeat(N, 1), weights), share), order


@pytest.mark.parametrize("N", [1, 33])
def test_order_of_choices_does_not_matter(N: int) -> None:
    """The order in which a token's experts are listed changes no bit."""
    config = replace(TINY, experts=8, experts_per_token=4)
    experts = make_experts(config)
    x, ids, weights = make_choices(config, N)
    expected = apply(experts, x, ids, weights)
    for order in itertools.permutations(range(4)):
        assert torch.equal(apply(experts, x, ids[:, order], weights[:, order]), expected), order


def test_by_expert_visits_every_choice_once() -> None:
    _, ids, _ = make_choices(replace(TINY, experts=8, experts_per_token=3), 50)
    ids[ids == 5] = 4  # no token chooses 5, and some choose 4 twice
    visits = list(by_expert(ids, ids.flatten().bincount(minlength=8).tolist()))
    experts = [e for e, _, _ in visits]
    assert experts == sorted(set(experts)) and 5 not in experts
    assert all((ids[rows, choice] == e).all() and (rows.diff() >= 0).all() for e, rows, choice in visits)
    places = [
        place for _, rows, choice in visits for place in zip(rows.tolist(), choice.tolist(), strict=True)
    ]
    assert sorted(places) == [(n, a) for n in range(50) for a in range(3)]


class Watcher:
    """Experts that are no module. They keep their arguments and return x."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:
        self.calls.append((x, choice.ids, choice.weights))
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_provider_gets_what_the_protocol_says(dtype: torch.dtype) -> None:
    config = replace(TINY, layers=3, experts=8, experts_per_token=3)
    providers = [Watcher() for _ in range(3)]
    model = Mixtral(config, dtype, experts=lambda layer: providers[layer])
    own = random_model(config).state_dict()
    model.load_state_dict({name: own[name] for name in model.state_dict()})
    with torch.inference_mode():
        model(random_ids(config, 2, 5))
    for provider in providers:
        ((x, ids, weights),) = provider.calls
        assert x.shape == (10, config.hidden) and x.dtype == dtype
        assert ids.shape == (10, 3) and ids.dtype == torch.int64
        assert all(len(set(row)) == 3 for row in ids.tolist())
        assert weights.shape == (10, 3) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(1), torch.ones(10))


def test_gradcheck() -> None:
    """Derivatives of the experts by tokens, weights and parameters, against finite differences in float64."""
    config = replace(TINY, hidden=3, ffn=2, experts=3, experts_per_token=2)
    experts = make_experts(config).double()
    x, ids, weights = make_choices(config, 4)
    inputs = [x.double().requires_grad_(), weights.double().requires_grad_(), *experts.parameters()]
    assert torch.autograd.gradcheck(lambda x, weights, *_: apply(experts, x, ids, weights), inputs)
    one = [inputs[0][:1].detach().requires_grad_(), inputs[1][:1].detach().requires_grad_(), *inputs[2:]]
    assert torch.autograd.gradcheck(lambda x, weights, *_: apply(experts, x, ids[:1], weights), one)


def test_router_gradient() -> None:
    """Only the chosen logits move the weights, by the Jacobian of their softmax."""
    config = replace(TINY, experts=6, experts_per_token=3)
    router = Router(config, CPU)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, config.hidden)
    choice = router(x)
    ids, weights = choice.ids, choice.weights
    (gradient,) = torch.autograd.grad(weights[0, 0], router.weight)
    w = weights[0].detach()
    by_logit = torch.zeros(6).index_put((ids[0],), w[0] * (torch.tensor([1.0, 0, 0]) - w))
    torch.testing.assert_close(gradient, by_logit[:, None] * x, rtol=1e-4, atol=1e-6)
