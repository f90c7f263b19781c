"""What the streams mean, by a reference that works out one weight at a time."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.packing import pack
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor
from tests.model.quant.matrices import random_tensor

ROOT = Path(__file__).resolve().parents[3]
WIDTHS = (8, 4, 3, 2)


@given(
    st.sampled_from(WIDTHS), st.sampled_from([16, 32, 64]), st.sampled_from([1, 2, 4, 128]),
    st.integers(1, 3), st.integers(1, 7), st.integers(0, 1 << 30),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_dequantized_one_weight_at_a_time(
    bits: int, group: int, meta: int, rows: int, groups: int, seed: int
) -> None:
    spec = QuantSpec(bits, group, meta)
    groups *= 2 if group == 16 else 1  # 32 columns, or a multiple of these
    tensor, codes = random_tensor(spec, 16 * rows, groups, seed)
    assert torch.equal(tensor.unpack(), codes)
    values, (N, K) = tensor.dequantize(), tensor.shape
    pick = torch.randint(N * K, (50,), generator=torch.Generator().manual_seed(seed))
    for i, j in ((int(p) // K, int(p) % K) for p in pick):
        (b, r), g = divmod(i, 16), j // group
        zero = Fraction(int(tensor.zeros[b, g, r]), 2 ** (8 - bits))
        step = Fraction(tensor.steps[b, g // meta, r].item())
        exact = (int(codes[i, j]) - zero) * int(tensor.scales[b, g, r]) * step
        assert values[i, j].item() == pytest.approx(float(exact), rel=2**-22, abs=0)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_code_less_zero_is_exact_in_16_bits(bits: int, dtype: torch.dtype) -> None:
    """So kernels may subtract before they multiply, in any dtype; float16 has more bits than it takes."""
    codes = torch.arange(1 << bits).double()[:, None]
    zeros = torch.arange(256).double() / 2 ** (8 - bits)
    assert torch.equal((codes.to(dtype) - zeros.to(dtype)).double(), codes - zeros)


def test_rounded_once_to_the_dtype_asked_for() -> None:
    tensor, _ = random_tensor(QuantSpec(4), 16, 2)
    assert torch.equal(tensor.dequantize(torch.bfloat16), tensor.dequantize().to(torch.bfloat16))


def test_streams_there_and_back() -> None:
    for bits in WIDTHS:
        tensor, _ = random_tensor(QuantSpec(bits), 32, 2)
        again = QuantizedTensor.of(tensor.spec, tensor.shape, tensor.streams())
        assert list(again.streams()) == list(tensor.streams())
        assert torch.equal(again.dequantize(), tensor.dequantize())


def test_streams_of_another_shape_are_not_taken() -> None:
    tensor, _ = random_tensor(QuantSpec(4), 32, 2)
    with pytest.raises(AssertionError):
        QuantizedTensor.of(QuantSpec(4), tensor.shape, tensor.streams() | {"steps": torch.zeros(2, 2, 16)})
    with pytest.raises(AssertionError):
        QuantizedTensor.of(QuantSpec(3), tensor.shape, tensor.streams())


def documented_bytes(plane: str) -> dict[int, list[int]]:
    """The bytes of a worked example in docs/formats.md, by their offset in a block."""
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    lines = re.findall(rf"^    {plane} +(\d+):  ((?:[0-9a-f]{{2}} ){{4}})", text, re.MULTILINE)
    return {int(offset): [int(byte, 16) for byte in word.split()] for offset, word in lines}


def test_the_worked_example_at_4_bits() -> None:
    """docs/formats.md: two rows of a block, 0 to 15 twice and 15 to 0 twice."""
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[0], codes[1] = torch.arange(32) % 16, 15 - torch.arange(32) % 16
    (plane,) = pack(codes, 4)
    found = documented_bytes("byte")
    assert list(found) == [0, 4, 64, 68]
    assert all(plane.flatten()[start : start + 4].tolist() == word for start, word in found.items())
    scales, zeros = (torch.full((1, 1, 16), byte, dtype=torch.uint8) for byte in (100, 120))
    steps = torch.full((1, 1, 16), 0.0005)
    tensor = QuantizedTensor(QuantSpec(4, 32), (16, 32), plane, None, scales, zeros, steps)
    assert tensor.dequantize()[0, [0, 15]].tolist() == pytest.approx([-0.375, 0.375])


def test_the_worked_example_at_3_bits() -> None:
    """docs/formats.md: the codes are in the text as well."""
    text = (ROOT / "docs" / "formats.md").read_text("utf-8")
    (row,) = re.findall(r"^    ((?:[0-7] +){31}[0-7])$", text, re.MULTILINE)
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[0] = torch.tensor([int(code) for code in row.split()])
    for name, plane, offsets in zip(("low", "high"), pack(codes, 3), ([0, 64], [0]), strict=True):
        found = documented_bytes(name)
        assert list(found) == offsets
        assert all(plane.flatten()[start : start + 4].tolist() == word for start, word in found.items())


def test_rows_share_nothing() -> None:
    """Each block of rows is a matrix by itself, in the same memory."""
    for spec in (QuantSpec(3, 16, 2), QuantSpec(4), QuantSpec(8, 32, 1)):
        tensor, codes = random_tensor(spec, 80, 6)
        part = tensor.part(slice(32, 64))
        assert part.shape == (32, tensor.shape[1]) and torch.equal(part.unpack(), codes[32:64])
        assert torch.equal(part.dequantize(), tensor.dequantize()[32:64])
        part.scales.zero_()
        assert not tensor.dequantize()[32:64].any() and bool(tensor.dequantize()[64:].any())
