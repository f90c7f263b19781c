"""What `test_fused.py` runs in a process of its own: Triton's kernels, against dequantized weights.

With TRITON_INTERPRET=1 in the environment, the kernels run on the CPU; without, on a GPU.
"""

import itertools
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.experts import BlobLayout, down, experts_by_slot, gate_up
from model.kernels.launching import uncompiled
from model.kernels.matrices import FewRows, expand
from model.moe import mix
from model.quant.backends.fused import Fused
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.quant.tensor import QuantizedTensor
from model.router import Choice
from tests.model.kernels.interpreted import DEVICE
from tests.model.quant.matrices import check, make_matrix

BITS, GROUPS = (8, 4, 3, 2), (16, 32, 128, 1024, 4096)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.01, torch.float16: 0.002}
DTYPES = list(TOLERANCE)


def blob(*matrices: "QuantizedTensor | Plain", gap: int = 0) -> Tensor:
    """The streams of matrices, one directly after the other, and some bytes more."""
    streams = [s.flatten().view(torch.uint8) for matrix in matrices for s in matrix.streams().values()]
    return torch.cat([*streams, torch.full((gap,), 0xA5, dtype=torch.uint8)])


def bind(matrix: QuantizedTensor) -> Fused:
    memory = torch.cat([torch.zeros(64, dtype=torch.uint8), blob(matrix)]).to(DEVICE)
    fields = matrix_fields("", matrix.shape, matrix.spec, 64)
    return Fused(matrix.spec, matrix.shape, {field.name[1:]: field.view(memory) for field in fields})


def test_kernels_can_be_compiled() -> None:
    assert uncompiled(torch.device(DEVICE)) is None


@pytest.mark.parametrize("spec", [QuantSpec(*pair) for pair in itertools.product(BITS, GROUPS)], ids=str)
def test_every_format(spec: QuantSpec) -> None:
    """Three groups to a row are no power of two; scales share steps across rows."""
    matrix = make_matrix(QuantSpec(spec.bits, spec.group_size, 32), 16, 3 * spec.group_size)
    product = bind(matrix)
    for M, dtype in ((1, torch.float32), (3, torch.bfloat16)):
        x = torch.randn(M, matrix.shape[1]).to(dtype)
        check(product(x.to(DEVICE)).cpu(), x, matrix, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "spec", [QuantSpec(*pair, 32) for pair in itertools.product(BITS, (16, 128, 1024))], ids=str
)
def test_expanding(spec: QuantSpec) -> None:
    """The dequantized weights bit for bit, from any row on."""
    matrix = make_matrix(spec, 32, 3 * spec.group_size)
    product = bind(matrix)
    for dtype in DTYPES:
        for start, rows in ((0, 32), (16, 16)):
            out = torch.empty(rows, matrix.shape[1], dtype=dtype, device=DEVICE)
            expand(product.matrix, start, out)
            assert torch.equal(out.cpu(), matrix.dequantize(dtype)[start : start + rows])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows(bits: int, dtype: torch.dtype) -> None:
    matrix = make_matrix(QuantSpec(bits), 48, 64)  # 48: no power of two either
    product, x = bind(matrix), torch.randn(17, 64).to(dtype)
    for M in (0, 1, 2, 16, 17):
        check(product(x[:M].to(DEVICE)).cpu(), x[:M], matrix, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("text", "N", "K"),
    [("4", 16, 5120), ("2", 16, 12288), ("3g128", 16, 4992), ("8m4096", 16, 3072), ("4g1024", 16, 7168)],
)
def test_longer_than_a_tile(text: str, N: int, K: int) -> None:
    matrix = make_matrix(QuantSpec.parse(text), N, K)
    product = bind(matrix)
    for M in (1, 5):
        x = torch.randn(M, K)
        check(product(x.to(DEVICE)).cpu(), x, matrix, TOLERANCE[x.dtype])


@pytest.mark.parametrize("spec", [QuantSpec(bits) for bits in BITS], ids=str)
def test_up_to_16_rows_multiply_with_the_dequantized_weights(spec: QuantSpec) -> None:
    """Bit for bit, which a row of zeros and a one makes visible; and whichever other rows there are."""
    matrix = make_matrix(spec, 16, 64)
    product, eye = bind(matrix), torch.eye(64, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.cat([product(part) for part in eye.split(16)])
    assert torch.equal(rows.T.cpu(), matrix.dequantize(torch.bfloat16))
    assert torch.equal(torch.cat([product(part) for part in eye[:16].split(2)]), rows[:16])


def test_a_split_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = make_matrix(QuantSpec(4), 32, 4096 + 64)
    x = torch.randn(6, matrix.shape[1]).bfloat16()
    product = bind(matrix)
    assert FewRows.pick(32, matrix.shape[1], 4, 64).splits > 1
    y = product(x.to(DEVICE))
    check(y.cpu(), x, matrix, TOLERANCE[x.dtype])
    assert torch.equal(product(x.to(DEVICE)), y) and torch.equal(product(x[2:5].to(DEVICE)), y[2:5])


@pytest.mark.parametrize("bits", BITS)
def test_x_of_any_size(bits: int) -> None:
    """Codes are denormal numbers to the kernel for one row, and x is large in proportion: neither overflows,
    nor loses a bit."""
    matrix = make_matrix(QuantSpec(bits), 16, 128)
    product, x = bind(matrix), torch.rand(1, 128, device=DEVICE) + 0.5
    for power in (-60.0, 31.0):
        assert torch.equal(product(x * 2**power), product(x) * 2**power)


def test_any_x_will_do_and_none_is_changed() -> None:
    matrix = make_matrix(QuantSpec(2), 16, 128)
    product = bind(matrix)
    for M in (1, 5, 16, 20):
        for x in (
            torch.randn(M, 131, device=DEVICE).bfloat16()[:, 1:129],  # rows apart, and not aligned
            torch.randn(128, M, device=DEVICE).bfloat16().T,
            torch.randn(1, 128, device=DEVICE).bfloat16().expand(M, 128),
        ):
            before = x.clone()
            assert torch.equal(product(x), product(x.contiguous())), (M, x.stride())
            assert torch.equal(x, before)


# --- experts by slot


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
    ("4g16", 16, 48, torch.bfloat16), ("3g16", 32, 16, torch.bfloat16), ("2", 16, 32, torch.bfloat16),
    ("8g32", 32, 32, torch.bfloat16), ("4g16", 48, 16, torch.float32), ("2", 16, 48, torch.float16),
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


ALONE = [("4g16", torch.bfloat16), ("3g16", torch.float16), ("16", torch.float32)]


@pytest.mark.parametrize(("text", "dtype"), ALONE)
def test_bits_depend_on_the_experts_alone(text: str, dtype: torch.dtype) -> None:
    """Not on time, the order of choices, slots, the length of a blob, or what is computed with them."""
    spec, ids = QuantSpec.parse(text), [1, 3, 0]
    layer = Layer(spec, 16, 16, [0, 1, 2, 3], dtype)
    x = torch.randn(1, 16).to(DEVICE, dtype)
    weights = torch.tensor([0.5, 0.3, 0.2], device=DEVICE)
    y = layer(x, ids, weights)
    assert torch.equal(layer(x, ids, weights), y)
    assert torch.equal(layer(x, ids[::-1], weights.flip(0)), y)
    assert torch.equal(Layer(spec, 16, 16, [5, 4, 0, 2], dtype, gap=112)(x, ids, weights), y)
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
    layer = Layer(QuantSpec(4, 16), 16, 16, [0], torch.float32)
    pool = torch.empty(5, 1 << 29, dtype=torch.uint8, device=DEVICE)
    pool[4, : layer.pool.shape[1]] = layer.pool[0]
    x, one = torch.randn(1, 16, device=DEVICE), torch.ones(1, device=DEVICE)
    y = experts_by_slot(x, pool, torch.tensor([4], device=DEVICE), one, layer.layout)
    assert torch.equal(y, layer(x, [0], one))
