"""What the streams mean, by a reference that works out one weight at a time."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor
from tests.model.quant.matrices import random_tensor

WIDTHS = (8, 4, 3, 2)


@given(
    st.sampled_from(WIDTHS), st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 128]),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 1 << 30),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_dequantized_one_weight_at_a_time(
    bits: int, group: int, meta: int, rows: int, groups: int, seed: int
) -> None:
    spec = QuantSpec(bits, group, meta)
    tensor, codes = random_tensor(spec, 16 * rows, groups, seed)
    assert torch.equal(tensor.unpack(), codes)
    values, (N, K) = tensor.dequantize(), tensor.shape
    pick = torch.randint(N * K, (50,), generator=torch.Generator().manual_seed(seed))
    for i, j in ((int(p) // K, int(p) % K) for p in pick):
        g = j // group
        zero = Fraction(int(tensor.zeros[i, g]), 2 ** (8 - bits))
        step = Fraction(tensor.steps[(i * groups + g) // meta].item())
        exact = (int(codes[i, j]) - zero) * int(tensor.scales[i, g]) * step
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
        QuantizedTensor.of(QuantSpec(4), tensor.shape, tensor.streams() | {"steps": torch.zeros(8)})
    with pytest.raises(AssertionError):
        QuantizedTensor.of(QuantSpec(3), tensor.shape, tensor.streams())


def test_the_worked_example_of_the_documentation() -> None:
    """docs/formats.md, "A worked example": sixteen 2-bit weights, in 16 equal rows."""
    packed = torch.tensor([[0xE4, 0x24, 0x64, 0xFF]] * 16, dtype=torch.uint8)
    scales, zeros = (torch.full((16, 1), byte, dtype=torch.uint8) for byte in (150, 96))
    steps = torch.tensor([0.0002, 0, 0, 0])
    tensor = QuantizedTensor(QuantSpec(2), (16, 16), packed, None, scales, zeros, steps)
    assert tensor.unpack()[0].tolist() == [0, 0, 0, 3, 1, 1, 1, 3, 2, 2, 2, 3, 3, 0, 1, 3]
    weights = [-0.045, -0.045, -0.045, 0.045, -0.015, -0.015, -0.015, 0.045]
    weights += [0.015, 0.015, 0.015, 0.045, 0.045, -0.045, -0.015, 0.045]
    assert tensor.dequantize()[0].tolist() == pytest.approx(weights)
