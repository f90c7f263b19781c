"""A whole step by Triton's kernels, against `Mixtral.forward`. `test_step.py` runs it in its own process."""

from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import torch

from model.config import ModelConfig
from model.kernels import launching
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.moe import SparseMoE
from model.quant.backends.fused import Fused
from model.quant.expert import BlobExperts, ExpertFormat
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from model.router import Choice
from model.target import TURING, Target
from tests.model.kernels import interpreted
from tests.model.quant.matrices import make_matrix

DEVICE = torch.device(interpreted.DEVICE)
CONFIG = ModelConfig(
    vocab=48, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=32, experts=3, experts_per_token=2,
    context=12, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip


def random_network(
    spec: QuantSpec, dtype: torch.dtype = torch.float32, config: ModelConfig = CONFIG
) -> Mixtral:
    form = ExpertFormat.of(config, spec, dtype, Target.of(DEVICE))
    linear, head = (
        partial(QuantizedLinear, spec=QuantSpec(bits), dtype=dtype, device=DEVICE) for bits in (4, 8)
    )
    experts = lambda layer: BlobExperts.empty(form, config.experts, DEVICE)  # noqa: E731
    model = Mixtral(config, dtype, DEVICE, experts, linear, head).requires_grad_(False)
    for seed, module in enumerate(model.modules()):
        if isinstance(module, QuantizedLinear):
            module.store(make_matrix(module.spec, *module.shape, seed=seed))
        elif isinstance(module, SparseMoE):
            for blob in cast(BlobExperts, module.experts).blobs:
                stored = torch.zeros(form.stored[-1].end, dtype=torch.uint8)
                for field in form.stored:
                    matrix = make_matrix(spec, *form.shapes[field.name.split(".")[0]], seed=seed)
                    field.view(stored).copy_(matrix.streams()[field.name.split(".")[1]])
                form.store(stored, blob)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("experts", "chosen", "factor"), [(3, 2, 1.0), (3, 3, 2.5)])
def test_tokens_one_by_one(monkeypatch: pytest.MonkeyPatch, experts: int, chosen: int, factor: float) -> None:
    if interpreted.INTERPRETED:
        monkeypatch.setattr(launching, "unsupported", lambda target, dtype: None)
    torch.manual_seed(0)
    config = replace(CONFIG, experts=experts, experts_per_token=chosen, rope_factor=factor)
    model, ids = random_network(QuantSpec(4, 16), config=config), [3, 40, 7]
    expected = model(torch.tensor([ids], device=DEVICE))[0]
    model.look_ahead(1)
    model.prepare_step()
    kv = KVCache.allocate(config, 1, 12, torch.float32, DEVICE)
    for position, i in enumerate(ids):
        where = torch.tensor([i], device=DEVICE), torch.tensor([position], device=DEVICE)
        *choices, logits = model.step(*where, kv)
        assert all(isinstance(choice, Choice) for choice in choices) and len(choices) == 2
        first = cast(Choice, choices[0])
        assert first.ranking is not None and sorted(first.ranking[0].tolist()) == [*range(experts)]
        assert len(set(first.ids[0].tolist())) == chosen and cast(Choice, choices[1]).ranking is None
        torch.testing.assert_close(first.weights.sum().cpu(), torch.tensor(1.0))
        assert isinstance(logits, torch.Tensor)
        torch.testing.assert_close(logits[0], expected[position], rtol=1e-4, atol=1e-4)


def test_tokens_one_by_one_over_keys_and_values_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps' codes are those of a prompt, so a prompt may follow steps and steps a prompt."""
    if interpreted.INTERPRETED:
        monkeypatch.setattr(launching, "unsupported", lambda target, dtype: None)
    torch.manual_seed(0)
    model, ids = random_network(QuantSpec(4, 16)), [3, 40, 7, 21]
    plain, kv = (KVCache.allocate(CONFIG, 1, 12, torch.float32, DEVICE, bits=8) for _ in range(2))
    text = torch.tensor([ids], device=DEVICE)
    expected = model(text, plain)[0]
    assert (expected - model(text)[0]).abs().max() > 1e-3
    model.prepare_step()
    logits = []
    for position in range(3):
        *_, row = model.step(text[0, position : position + 1], torch.tensor([position], device=DEVICE), kv)
        assert isinstance(row, torch.Tensor)
        logits.append(row)
    kv.length = 3
    logits.append(model(text[:, 3:], kv)[0])
    torch.testing.assert_close(torch.cat(logits), expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(kv.layers, plain.layers, strict=True):
        assert torch.equal(mine.v, theirs.v) and mine.scales and theirs.scales
        torch.testing.assert_close(mine.scales, theirs.scales)


def test_tokens_in_float16_by_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of two tokens and then steps, as on a GPU of compute capability 7.5 with its tiles, against a
    network of the same numbers in float32 with plain products."""
    torch.manual_seed(0)
    ids, spec = [3, 40, 7, 21], QuantSpec(2)
    plain = random_network(spec)
    for weight in plain.parameters():
        weight.copy_(weight.half())
    if interpreted.INTERPRETED:
        monkeypatch.setattr(launching, "unsupported", lambda target, dtype: None)
        monkeypatch.setattr(Fused, "devices", ("cpu",))
    expected = plain(torch.tensor([ids], device=DEVICE))[0]
    monkeypatch.setattr(launching, "capability_of", lambda device: TURING)
    model = random_network(spec, torch.float16)
    for mine, weight in zip(model.parameters(), plain.parameters(), strict=True):
        mine.copy_(weight)
    products = [module.backend for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert products and set(products) == {Fused}
    model.prepare_step()
    kv = KVCache.allocate(CONFIG, 1, 12, torch.float16, DEVICE)
    logits = [model(torch.tensor([ids[:2]], device=DEVICE), kv)[0]]
    for position in (2, 3):
        where = (
            torch.tensor(ids[position : position + 1], device=DEVICE),
            torch.tensor([position], device=DEVICE),
        )
        *_, last = model.step(*where, kv)
        assert isinstance(last, torch.Tensor)
        logits.append(last)
    size = float(expected.abs().max())
    torch.testing.assert_close(torch.cat(logits).float(), expected, rtol=0, atol=0.01 * size)
