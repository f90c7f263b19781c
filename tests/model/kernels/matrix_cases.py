"""Quantized matrices by Triton's kernels, against dequantized weights. `test_matrices.py` runs these tests in
a process of its own.

The kernels run on a GPU, or with TRITON_INTERPRET=1 in the environment on the CPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from model.kernels.launching import uncompiled
from model.kernels.matrices import FewRows, expand
from model.quant.backends.fused import Fused
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.quant.tensor import QuantizedTensor
from tests.model.kernels.interpreted import DEVICE, tiles  # noqa: F401, a fixture
from tests.model.quant.matrices import check, make_matrix

BITS, GROUPS, METAS = (8, 4, 3, 2), (16, 32, 128, 1024, 4096), (1, 2, 128, 4096)
# Any two of bits, group and meta come together.
FORMATS = [(bits, group, METAS[(i + j) % 4]) for i, bits in enumerate(BITS) for j, group in enumerate(GROUPS)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.01, torch.float16: 0.002}
DTYPES = list(TOLERANCE)


def blob(*matrices: Any, gap: int = 0) -> Tensor:
    """The streams of matrices, one after the other, and some more bytes."""
    streams = [s.flatten().view(torch.uint8) for matrix in matrices for s in matrix.streams().values()]
    return torch.cat([*streams, torch.full((gap,), 0xA5, dtype=torch.uint8)])


def bind(matrix: QuantizedTensor) -> Fused:
    memory = torch.cat([torch.zeros(64, dtype=torch.uint8), blob(matrix)]).to(DEVICE)
    fields = matrix_fields("", matrix.shape, matrix.spec, 64)
    return Fused(matrix.spec, matrix.shape, {field.name[1:]: field.view(memory) for field in fields})


def test_kernels_can_be_compiled() -> None:
    assert uncompiled(torch.device(DEVICE)) is None


@pytest.mark.parametrize(("bits", "group", "meta"), FORMATS)
def test_every_format(bits: int, group: int, meta: int) -> None:
    """Three blocks, and three groups to a row or an odd number of words: no powers of two. A row's last step
    may serve fewer groups than the others."""
    N, K = 48 if group < 1024 else 16, 3 * max(group, 32)
    matrix = make_matrix(QuantSpec(bits, group, meta), N, K)
    product = bind(matrix)
    for M, dtype in ((1, torch.float32), (3, torch.bfloat16)):
        x = torch.randn(M, K).to(dtype)
        check(product(x.to(DEVICE)).cpu(), x, matrix, TOLERANCE[dtype])


@pytest.mark.parametrize(("bits", "group", "meta"), FORMATS)
def test_expanding(bits: int, group: int, meta: int) -> None:
    """The dequantized weights bit for bit, from any block on."""
    N, K = 48 if group < 1024 else 16, 3 * max(group, 32)
    matrix = make_matrix(QuantSpec(bits, group, meta), N, K)
    product = bind(matrix)
    for start, dtype in zip(range(0, N, 16), DTYPES, strict=False):
        out = torch.empty(N - start, K, dtype=dtype, device=DEVICE)
        expand(product.matrix, start, out)
        assert torch.equal(out.cpu(), matrix.dequantize(dtype)[start:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_dtypes_of_one_row(bits: int, dtype: torch.dtype) -> None:
    """Two blocks together, and pieces that fill a tile, or do not."""
    for K in (128, 160):
        matrix, x = make_matrix(QuantSpec(bits, 32, 2), 32, K), torch.randn(1, K).to(dtype)
        check(bind(matrix)(x.to(DEVICE)).cpu(), x, matrix, TOLERANCE[dtype])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows(bits: int, dtype: torch.dtype) -> None:
    matrix = make_matrix(QuantSpec(bits), 48, 64)  # 48: no power of two either
    product, x = bind(matrix), torch.randn(17, 64).to(dtype)
    for M in (0, 1, 2, 16, 17):
        check(product(x[:M].to(DEVICE)).cpu(), x[:M], matrix, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("text", "N", "K"),
    [("4", 16, 5120), ("2m1", 32, 4128), ("3g128", 16, 4992), ("8m4096", 16, 4160), ("4g1024", 32, 7168)],
)
def test_longer_than_a_tile(text: str, N: int, K: int) -> None:
    matrix = make_matrix(QuantSpec.parse(text), N, K)
    product = bind(matrix)
    for M in (1, 5):
        x = torch.randn(M, K)
        check(product(x.to(DEVICE)).cpu(), x, matrix, TOLERANCE[x.dtype])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [QuantSpec(bits) for bits in BITS], ids=str)
def test_up_to_16_rows_multiply_with_the_dequantized_weights(spec: QuantSpec, dtype: torch.dtype) -> None:
    """Bit for bit, which a row of zeros and a one makes visible; and whichever other rows there are."""
    matrix = make_matrix(spec, 16, 64)
    product, eye = bind(matrix), torch.eye(64, dtype=dtype, device=DEVICE)
    rows = torch.cat([product(part) for part in eye.split(16)])
    assert torch.equal(rows.T.cpu(), matrix.dequantize(dtype))
    assert torch.equal(torch.cat([product(part) for part in eye[:16].split(6)]), rows[:16])


@pytest.mark.usefixtures("tiles")
def test_a_split_sum() -> None:
    matrix = make_matrix(QuantSpec(4), 32, 4096 + 64)
    x = torch.randn(6, matrix.shape[1]).half()
    product = bind(matrix)
    assert all(FewRows.pick(32, matrix.shape[1], tensor_cores).splits > 1 for tensor_cores in (True, False))
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
