"""A token's experts by slot by Triton's kernels, against dequantized weights. `test_matrices.py` runs these
tests in a process of its own, as those of `matrix_cases.py`."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.experts import BlobLayout, down, experts_by_slot, gate_up
from model.kernels.matrices import OneRow
from model.moe import mix
from model.quant.spec import QuantSpec
from model.router import Choice
from tests.model.kernels.interpreted import DEVICE
from tests.model.kernels.matrix_cases import TOLERANCE, blob
from tests.model.quant.matrices import make_matrix


@dataclass(frozen=True)
class Plain:
    """A matrix that is not quantized, as far as it is like one that is."""

    weight: Tensor

    def streams(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def dequantize(self) -> Tensor:
        return self.weight.float()


def make_plain(dtype: torch.dtype, spec: QuantSpec, N: int, K: int, seed: int) -> Plain:
    return Plain(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype))


class Layer:
    """Experts of one layer in slots of a pool, in no order: expert e in slot `slots[e]`."""

    def __init__(
        self, spec: QuantSpec, D: int, ffn: int, slots: list[int], dtype: torch.dtype, gap: int = 48
    ) -> None:
        self.layout, self.slots = BlobLayout(spec, D, ffn), slots
        make = make_matrix if spec.quantized else partial(make_plain, dtype)
        self.w13 = [make(spec, 2 * ffn, D, seed=2 * e) for e in range(len(slots))]
        self.w2 = [make(spec, D, ffn, seed=2 * e + 1) for e in range(len(slots))]
        blobs = [blob(*pair, gap=gap) for pair in zip(self.w13, self.w2, strict=True)]
        pool = torch.full((max(slots) + 2, len(blobs[0])), 0x5A, dtype=torch.uint8)
        pool[slots] = torch.stack(blobs)
        self.pool = pool.to(DEVICE)

    def at(self, ids: list[int]) -> Tensor:
        return torch.tensor([self.slots[e] for e in ids], device=DEVICE)

    def __call__(self, x: Tensor, ids: list[int], weights: Tensor) -> Tensor:
        chosen = torch.tensor(ids, device=DEVICE)
        return experts_by_slot(x, self.pool, self.at(ids), weights, self.layout, chosen)


CASES = [
    ("4g32", 32, 96, torch.bfloat16), ("3g32", 64, 32, torch.bfloat16), ("2", 32, 32, torch.bfloat16),
    ("8g32", 32, 32, torch.bfloat16), ("4g16m2", 96, 32, torch.float32), ("2", 32, 96, torch.float16),
    ("8", 64, 64, torch.float16), ("4", 64, 64, torch.float16), ("3", 64, 64, torch.float16),
    ("3g16m1", 96, 96, torch.bfloat16), ("4m1", 64, 64, torch.float16),
    ("16", 36, 10, torch.bfloat16), ("16", 20, 6, torch.float32), ("16", 1028, 4, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(("text", "D", "ffn", "dtype"), CASES)
def test_a_pair_of_experts(text: str, D: int, ffn: int, dtype: torch.dtype) -> None:
    layer = Layer(QuantSpec.parse(text), D, ffn, [3, 0, 4], dtype)
    x, ids = (torch.randn(1, D) / D**0.5).to(dtype), [2, 0]
    weights = torch.tensor([0.7, 0.3])
    h = gate_up(x.to(DEVICE), layer.pool, layer.at(ids), layer.layout).cpu()
    y = layer(x.to(DEVICE), ids, weights.to(DEVICE)).cpu()
    expected, size = torch.zeros(1, D).double(), torch.zeros(1, D).double()
    tolerance = TOLERANCE[dtype]
    for i, (e, weight) in enumerate(zip(ids, weights.double(), strict=True)):
        both = x.double() @ layer.w13[e].dequantize().double().T
        gate, up = both.chunk(2, dim=-1)
        torch.testing.assert_close(
            h[i : i + 1].double(), F.silu(gate) * up, rtol=4 * tolerance, atol=4 * tolerance
        )
        W = layer.w2[e].dequantize().double()
        expected += weight * (h[i : i + 1].double() @ W.T)
        size += weight * (h[i : i + 1].double().abs() @ W.abs().T)
    assert y.shape == (1, D) and y.dtype == dtype
    assert bool(((y.double() - expected).abs() <= tolerance * size).all())


@pytest.mark.parametrize("text", ["8g32", "4g32m1", "3g16m2", "2"])
def test_rounds(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds where one would do give nearly the same, although the second is half empty."""
    layer = Layer(QuantSpec.parse(text), 96, 96, [1, 0], torch.float32)
    x, weights = torch.randn(1, 96, device=DEVICE), torch.tensor([0.7, 0.3], device=DEVICE)
    y = layer(x, [0, 1], weights)
    tiles: list[OneRow] = []

    def shorter(layout: BlobLayout, rows: int, K: int) -> OneRow:
        tiles.append(replace(OneRow.pick(rows, K, layout.spec.bits), pieces=2))
        return tiles[-1]

    monkeypatch.setattr(BlobLayout, "tile", shorter)
    torch.testing.assert_close(layer(x, [0, 1], weights), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    assert [(tile.piece, tile.pieces) for tile in tiles] == [(32, 2), (32, 2)]  # of 96


@pytest.mark.parametrize("chosen", [1, 5, 16])
def test_any_number_of_experts(chosen: int) -> None:
    """Of 16, also all of them, in slots of any order. Contributions are those of each expert alone."""
    layer = Layer(QuantSpec.parse("4g32"), 32, 32, torch.randperm(16).tolist(), torch.float32)
    x, weights = torch.randn(1, 32, device=DEVICE), torch.rand(chosen, device=DEVICE)
    ids = torch.randperm(16)[:chosen].tolist()
    alone = [layer(x, [e], weight[None]).double() for e, weight in zip(ids, weights, strict=True)]
    expected = torch.stack(alone).sum(0)
    size = torch.stack(alone).abs().sum(0)
    y = layer(x, ids, weights).double()
    assert bool(((y - expected).abs() <= 1e-6 * size).all()) and float(expected.abs().max()) > 0.01


SOME = [("4g32", torch.bfloat16), ("8g32", torch.float32), ("16", torch.float16)]


@pytest.mark.parametrize(("text", "dtype"), SOME)
def test_an_expert_that_is_absent_is_left_out(text: str, dtype: torch.dtype) -> None:
    """Its slot is -1. The others have the bits that they have without it."""
    layer = Layer(QuantSpec.parse(text), 32, 32, [3, 0, 2, 1], dtype)
    x, ids = torch.randn(1, 32).to(DEVICE, dtype), torch.tensor([2, 0, 3], device=DEVICE)
    weights = torch.tensor([0.5, 0.3, 0.2], device=DEVICE)
    for there in ([0, 1, 2], [1, 2], [0, 2], [1], []):
        slots = layer.at([2, 0, 3])
        slots[[i for i in range(3) if i not in there]] = -1
        y = experts_by_slot(x, layer.pool, slots, weights, layer.layout, ids, absent=True)
        expected = torch.zeros_like(x)
        if there:
            kept = torch.tensor(there, device=DEVICE)
            expected = experts_by_slot(x, layer.pool, slots[kept], weights[kept], layer.layout, ids[kept])
        assert torch.equal(y, expected), there


ALONE = [("4g16", torch.bfloat16), ("3g16", torch.float16), ("8g16", torch.float32), ("16", torch.float32)]


@pytest.mark.parametrize(("text", "dtype"), ALONE)
def test_bits_depend_on_the_experts_alone(text: str, dtype: torch.dtype) -> None:
    """Not on time, the order of choices, slots, the length of a blob, or what is computed with them."""
    spec, ids = QuantSpec.parse(text), [1, 3, 0]
    layer = Layer(spec, 32, 32, [0, 1, 2, 3], dtype)
    x = torch.randn(1, 32).to(DEVICE, dtype)
    weights = torch.tensor([0.5, 0.3, 0.2], device=DEVICE)
    y = layer(x, ids, weights)
    assert torch.equal(layer(x, ids, weights), y)
    assert torch.equal(layer(x, ids[::-1], weights.flip(0)), y)
    assert torch.equal(Layer(spec, 32, 32, [5, 4, 0, 2], dtype, gap=112)(x, ids, weights), y)
    ascending = sorted(range(3), key=lambda i: ids[i])
    slots = layer.at([ids[i] for i in ascending])  # here slots lie in the order of ids
    assert torch.equal(experts_by_slot(x, layer.pool, slots, weights[ascending], layer.layout), y)

    pool, layout = layer.pool, layer.layout
    one = torch.ones(1, device=DEVICE)
    experts = [lambda x, e=e: experts_by_slot(x, pool, layer.at([e]), one, layout) for e in range(4)]
    mixed = mix(experts, x, Choice(torch.tensor([ids]), weights[None].to(dtype)))
    assert torch.equal(mixed, y)  # each alone, weighted and added by model.moe

    h = torch.cat([gate_up(x, pool, layer.at([e]), layout) for e in ids])
    parts = [down(h[i : i + 1], pool, layer.at([ids[i]]), weights[i : i + 1], layout) for i in ascending]
    assert torch.equal(sum(parts[1:], parts[0]), y)  # weighted in the kernel


def test_an_expert_beyond_two_gigabytes() -> None:
    """Its offset does not fit 32 bits; on a CPU, untouched pages of a pool cost nothing."""
    layer = Layer(QuantSpec(4, 16), 32, 32, [0], torch.float32)
    pool = torch.empty(5, 1 << 29, dtype=torch.uint8, device=DEVICE)
    pool[4, : layer.pool.shape[1]] = layer.pool[0]
    x, one = torch.randn(1, 32, device=DEVICE), torch.ones(1, device=DEVICE)
    y = experts_by_slot(x, pool, torch.tensor([4], device=DEVICE), one, layer.layout)
    assert torch.equal(y, layer(x, [0], one))
