"""Every way to multiply a quantized matrix, against its dequantized weights in float64."""

import itertools
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.quant.backends import Backend, blocks, int4pack
from model.quant.backends.blocks import Blocks
from model.quant.backends.int4pack import Int4Pack, Workspace, kernel_block, pack_in_blocks
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor
from tests.model.quant.matrices import check, make_matrix

WIDTHS, GROUPS = (8, 4, 3, 2), (16, 32, 64, 128, 256, 512)
SPECS = [QuantSpec(bits, group) for bits, group in itertools.product(WIDTHS, GROUPS)]
FAST = [spec for spec in SPECS if not (spec.bits == 8 and spec.group_size == 16)]
DEFAULTS = [QuantSpec(bits) for bits in WIDTHS]

B = TypeVar("B", bound=Backend)
fast = pytest.mark.skipif(kernel_block() == 0, reason="PyTorch has no int4 kernel for this CPU")


def bind(backend: type[B], matrix: QuantizedTensor) -> B:
    fields = backend.fields("", matrix.shape, matrix.spec)
    memory = torch.full((fields[-1].end,), 0xA5, dtype=torch.uint8)  # not what it should be
    tensors = {field.name.lstrip("."): field.view(memory) for field in fields}
    bound = backend(matrix.spec, matrix.shape, tensors)  # before anything is there
    backend.store(matrix, tensors)
    return bound


@fast
@pytest.mark.parametrize("spec", FAST, ids=str)
def test_int4pack_against_dequantized(spec: QuantSpec) -> None:
    smallest = max(spec.group_size, 32)
    for N, K in (
        (64, smallest),
        (576, 3 * smallest),
    ):  # 576: more than one expanded block, the last one short
        matrix = make_matrix(spec, N, K)
        product = bind(Int4Pack, matrix)
        for M in (1, 2, 7, product.few - 1, product.few, 200):
            x = torch.randn(M, K).bfloat16()
            check(product(x), x, matrix, 0.01)


@fast
@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(4), QuantSpec(2), QuantSpec(3, 512)], ids=str)
def test_few_rows_and_many_multiply_with_the_same_weights(spec: QuantSpec) -> None:
    matrix = make_matrix(spec, 128, 512)
    product, eye = bind(Int4Pack, matrix), torch.eye(512).bfloat16()
    by_kernel = torch.cat([product(rows) for rows in eye.split(product.few - 1)])  # [K, N]
    work = Workspace(512, 128, len(product.nibbles), matrix.codes.device)
    expanded = product.expand(slice(0, 128), work).clone()
    finest = float(2**-8 * expanded.float().abs().max())
    torch.testing.assert_close(by_kernel, expanded, rtol=2**-7, atol=finest)
    assert torch.equal(product.expand(slice(64, 128), work), expanded[:, 64:])


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.group_size in (16, 64, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_multiply_with_the_dequantized_weights(
    spec: QuantSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, K = 80, 2 * spec.group_size
    matrix = make_matrix(spec, N, K)
    product, W = bind(Blocks, matrix), matrix.dequantize(dtype)
    monkeypatch.setattr(blocks, "CPU_BLOCK", 33 * K)  # three blocks, the last one short
    assert torch.equal(product(torch.eye(K).to(dtype)).T, W)
    for M in (0, 1, 7, 200):
        x = torch.randn(M, K).to(dtype)
        check(product(x), x, matrix, {torch.float32: 1e-6}.get(dtype, 0.01))
        torch.testing.assert_close(
            product(x), F.linear(x, W), rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-2
        )
    monkeypatch.setattr(blocks, "CPU_BLOCK", 1)  # less than a row
    assert torch.equal(product(torch.eye(K).to(dtype)).T, W)


@pytest.mark.parametrize("backend", [pytest.param(Int4Pack, marks=fast), Blocks])
@pytest.mark.parametrize("spec", DEFAULTS, ids=str)
def test_any_x_will_do_and_none_is_changed(backend: type[Backend], spec: QuantSpec) -> None:
    matrix = make_matrix(spec, 128, 128)
    product = bind(backend, matrix)
    for M in (0, 1, 5, 60):
        for x in (
            torch.randn(M, 131).bfloat16()[:, 1:129],  # rows apart, and not aligned
            torch.randn(128, M).bfloat16().T,
            torch.randn(2 * M, 128).bfloat16()[::2],
            torch.randn(1, 128).bfloat16().expand(M, 128),
        ):
            before = x.clone()
            y = product(x)
            assert torch.equal(y, product(x.contiguous())), (M, x.stride())
            assert torch.equal(x, before) and y.shape == (M, 128)


@pytest.mark.parametrize("backend", [pytest.param(Int4Pack, marks=fast), Blocks])
def test_memory_may_get_another_matrix(backend: type[Backend]) -> None:
    first, second = (make_matrix(QuantSpec(2), 64, 128, seed) for seed in (1, 2))
    fields = backend.fields("", first.shape, first.spec)
    memory = torch.empty(fields[-1].end, dtype=torch.uint8)
    tensors = {field.name.lstrip("."): field.view(memory) for field in fields}
    product, x = backend(first.spec, first.shape, tensors), torch.randn(3, 128).bfloat16()
    for matrix in (first, second, first):
        backend.store(matrix, tensors)
        assert torch.equal(product(x), bind(backend, matrix)(x))


@pytest.mark.parametrize("spec", FAST, ids=str)
@pytest.mark.parametrize("backend", [Int4Pack, Blocks])
def test_fields_follow_one_another_and_are_aligned(backend: type[Backend], spec: QuantSpec) -> None:
    fields = backend.fields("w2", (64, 1024), spec, 4096)
    assert fields[0].offset == 4096 and all(field.name.startswith("w2.") for field in fields)
    assert all(a.end == b.offset for a, b in itertools.pairwise(fields))
    assert all(field.offset % 16 == 0 for field in fields)


# --- the kernel's order


@fast
@given(st.integers(1, 3), st.integers(1, 80), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=25)
def test_packing_is_pytorchs(blocks_of_64: int, pairs: int, seed: int) -> None:
    N, K = 64 * blocks_of_64, 2 * pairs
    codes = torch.randint(16, (N, K), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    ours = torch.empty(N, K // 2, dtype=torch.uint8)
    pack_in_blocks(codes, ours, kernel_block())
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("block", [64, 32])
def test_codes_come_out_as_they_went_in(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4pack, "kernel_block", lambda: block)
    codes = torch.randint(16, (192, 96), dtype=torch.uint8)
    packed = torch.empty(192, 48, dtype=torch.uint8)
    pack_in_blocks(codes, packed, block)
    work = Workspace(96, 192, 1, packed.device)
    assert torch.equal(work.codes(packed, 0, slice(64, 192)), codes[64:].T.bfloat16() - 8)


@pytest.mark.parametrize("spec", FAST, ids=str)
@pytest.mark.parametrize("block", [64, 32])
def test_many_rows_in_the_order_of_either_cpu(
    spec: QuantSpec, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4pack, "kernel_block", lambda: block)
    matrix = make_matrix(spec, 192, 2 * spec.group_size)
    x = torch.randn(50, matrix.shape[1]).bfloat16()
    check(bind(Int4Pack, matrix).expand_and_multiply(x), x, matrix, 0.01)


def in_blocks_of(block: int) -> Callable[[Tensor, int], Tensor]:
    def convert(codes: Tensor, inner: int) -> Tensor:
        packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
        pack_in_blocks(codes.to(torch.uint8), packed, block)
        return packed

    return convert


def missing(codes: Tensor, inner: int) -> Tensor:
    raise RuntimeError("not compiled for this CPU")


@pytest.mark.parametrize(
    ("convert", "block"),
    [(in_blocks_of(64), 64), (in_blocks_of(32), 32), (in_blocks_of(16), 0), (missing, 0)],
)
def test_the_order_is_found_by_trying(
    convert: Callable[[Tensor, int], Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", convert)
    assert kernel_block.__wrapped__() == block
