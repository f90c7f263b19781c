"""The network as a whole: gradients, half precision, names and shapes of parameters."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.mixtral import Mixtral, RMSNorm
from model.moe import ResidentExperts
from tests.model.reference import CPU, GEOMETRIES, TINY, cast, greedy, new_kv, random_ids, random_model


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "1 of 4 experts"])
def test_every_parameter_learns(name: str) -> None:
    """With enough tokens for every expert to be chosen, every gradient is finite and not zero."""
    config = GEOMETRIES[name]
    model, ids = random_model(config), random_ids(config, 4, 60)
    F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-6, parameter_name


def test_only_used_parameters_learn() -> None:
    """After one token, A experts of each layer have a gradient, and the embedding has one in its row."""
    config = replace(TINY, experts=8)
    model = random_model(config)
    model(torch.tensor([[5]])).square().sum().backward()
    for experts in (module for module in model.modules() if isinstance(module, ResidentExperts)):
        learning = [expert.w2.weight.grad is not None for expert in experts.experts]
        assert sum(learning) == config.experts_per_token
    assert model.embed_tokens.weight.grad is not None
    assert model.embed_tokens.weight.grad.abs().sum(1).nonzero().tolist() == [[5]]


def test_one_expert_per_token_teaches_the_gate_nothing() -> None:
    """A single weight is renormalized to 1 for any logits, so only a router loss could move the gate."""
    config = GEOMETRIES["1 of 4 experts"]
    model, ids = random_model(config), random_ids(config, 2, 30)
    model(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns != name.endswith("gate.weight"), name


def test_training_reduces_the_loss() -> None:
    model, ids = random_model(TINY), random_ids(TINY, 4, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# A median, because rounding moves a few tokens to other experts, and their logits then differ a lot.
@pytest.mark.parametrize(
    ("dtype", "typical", "agreeing"), [(torch.bfloat16, 0.06, 0.8), (torch.float16, 0.008, 0.97)]
)
@pytest.mark.parametrize("name", ["8x7B's ratios", "8x22B's ratios", "3 of 8 experts"])
def test_half_precision(name: str, dtype: torch.dtype, typical: float, agreeing: float) -> None:
    config = GEOMETRIES[name]
    narrow = cast(random_model(config), dtype)
    wide = cast(narrow, torch.float32)  # exactly the same weights
    ids = random_ids(config, 4, 40)
    with torch.inference_mode():
        expected, whole = wide(ids), narrow(ids)
        kv = new_kv(narrow, 4)
        in_parts = torch.cat([narrow(ids[:, :30], kv), narrow(ids[:, 30:39], kv), narrow(ids[:, 39:], kv)], 1)
    assert kv.layers[0].k.dtype == dtype
    for logits in (whole, in_parts):
        assert logits.dtype == dtype
        error = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)  # [B, T]
        assert 0 < error.median() < typical
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() >= agreeing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates(dtype: torch.dtype) -> None:
    text = greedy(cast(random_model(TINY), dtype), random_ids(TINY, 2, 5), 20)
    assert text.shape == (2, 20) and len(text.unique()) > 5


def test_gates_stay_in_float32() -> None:
    model = Mixtral(TINY, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("gate.weight") else torch.bfloat16), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm(dtype: torch.dtype) -> None:
    """300 squared does not fit float16, so squares are taken in float32."""
    norm = RMSNorm(replace(TINY, norm_eps=1e-2), dtype, CPU)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    for scale in (1e-2, 1, 300):
        x = (torch.randn(2, 5, TINY.hidden) * scale).to(dtype)
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight.double()
        tolerance = 1e-6 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(norm(x).double(), expected, rtol=tolerance, atol=tolerance)


def test_parameters_are_those_of_the_paper() -> None:
    """Their number, names and shapes are those of the architecture."""
    c = GEOMETRIES["8x22B's ratios"]
    state = Mixtral(c).state_dict()
    attention = c.hidden * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    experts = c.experts * 3 * c.hidden * c.ffn
    layer = attention + experts + c.experts * c.hidden + 2 * c.hidden
    assert (
        sum(tensor.numel() for tensor in state.values())
        == c.layers * layer + 2 * c.vocab * c.hidden + c.hidden
    )
    assert {
        name.split(".", 2)[2] for name in state if name.startswith("layers.3.") and ".experts." not in name
    } == {
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "block_sparse_moe.gate.weight",
    }
    assert state["layers.3.block_sparse_moe.experts.7.w13.weight"].shape == (2 * c.ffn, c.hidden)
    assert state["layers.3.block_sparse_moe.experts.7.w2.weight"].shape == (c.hidden, c.ffn)


def test_same_input_same_bits() -> None:
    model, ids = random_model(TINY), random_ids(TINY, 2, 20)
    with torch.inference_mode():
        assert torch.equal(model(ids), model(ids))
        assert torch.equal(model(ids), random_model(TINY)(ids))
