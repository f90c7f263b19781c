"""Packing: a round trip loses nothing, and every byte is where the format says, by a slow reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.quant.packing import PLANES, pack, unpack


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Codes [N, K], and their width."""
    bits, seed = draw(st.sampled_from(sorted(PLANES))), draw(st.integers(0, 1 << 30))
    N, K = 16 * draw(st.integers(1, 5)), 32 * draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, (N, K), generator=generator, dtype=torch.uint8), bits


def plane_by_codes(codes: list[list[int]], width: int) -> np.ndarray:
    """Code by code into a run of bytes, as docs/formats.md says: 16 rows' words of 4 bytes side by side."""
    N, K, fit = len(codes), len(codes[0]), 32 // width
    plane = np.zeros(N * K * width // 8, dtype=np.uint8)
    for n, row in enumerate(codes):
        for k, code in enumerate(row):
            (block, r), (word, i) = divmod(n, 16), divmod(k, fit)
            place = ((block * (K // fit) + word) * 16 + r) * 4 + i % 4
            plane[place] += code * 2 ** (width * (i // 4))
    return plane


@given(matrices())
@settings(deadline=None)
def test_a_round_trip_loses_nothing(matrix: tuple[Tensor, int]) -> None:
    codes, bits = matrix
    planes = pack(codes, bits)
    assert sum(plane.numel() for plane in planes) * 8 == codes.numel() * bits
    assert all(plane.is_contiguous() and plane.dtype == torch.uint8 for plane in planes)
    assert torch.equal(unpack(planes, bits), codes)


@given(matrices())
@settings(deadline=None, max_examples=40)
def test_every_code_is_in_its_place(matrix: tuple[Tensor, int]) -> None:
    codes, bits = matrix
    lowest, (N, K) = 0, codes.shape
    for plane, width in zip(pack(codes, bits), PLANES[bits], strict=True):
        part = codes >> lowest & (1 << width) - 1
        assert plane.shape == (N // 16, K * width // 32, 16, 4)
        assert np.array_equal(plane.numpy().ravel(), plane_by_codes(part.tolist(), width))
        lowest += width
    assert lowest == bits


@given(matrices())
@settings(deadline=None, max_examples=40)
def test_the_reference_is_read_back(matrix: tuple[Tensor, int]) -> None:
    """So unpacking is held to the format itself, and not to `pack`."""
    codes, bits = matrix
    planes, lowest, (N, K) = [], 0, codes.shape
    for width in PLANES[bits]:
        plane = plane_by_codes((codes >> lowest & (1 << width) - 1).tolist(), width)
        planes.append(torch.from_numpy(plane).view(N // 16, K * width // 32, 16, 4))
        lowest += width
    assert torch.equal(unpack(planes, bits), codes)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_some_blocks_alone(bits: int) -> None:
    codes = torch.randint(1 << bits, (80, 96), dtype=torch.uint8)
    planes = pack(codes, bits)
    assert torch.equal(unpack([plane[1:4] for plane in planes], bits), codes[16:64])
    first = pack(codes[32:48], bits)
    assert all(torch.equal(plane[2:3], alone) for plane, alone in zip(planes, first, strict=True))


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_inputs_are_left_alone_and_may_be_strided(bits: int) -> None:
    codes = torch.randint(1 << bits, (64, 16), dtype=torch.uint8).T  # [16, 64], columns first
    before = codes.clone()
    planes = pack(codes, bits)
    copies = [plane.clone() for plane in planes]
    assert torch.equal(unpack(planes, bits), before)
    assert torch.equal(codes, before)
    assert all(torch.equal(plane, copy) for plane, copy in zip(planes, copies, strict=True))
    assert planes[0].data_ptr() != codes.data_ptr()
