"""Packing: a round trip loses nothing, and every bit is where the format says, by a slow reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.quant.packing import PLANES, pack, unpack

GROUPS = (16, 32, 64, 128, 256)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Codes [N, K], their width, and a group size."""
    bits, group = draw(st.sampled_from(sorted(PLANES))), draw(st.sampled_from(GROUPS))
    N, groups, seed = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 1 << 30))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (N, groups * group), generator=generator, dtype=torch.uint8)
    return codes, bits, group


def plane_by_bits(codes: list[int], width: int, group: int) -> list[int]:
    """One row, bit by bit: code i of a group is in part i // size, at byte i % size of the group."""
    size = group * width // 8  # bytes of a group, and codes of one part
    packed = [0] * (len(codes) * width // 8)
    for place, code in enumerate(codes):
        number, i = divmod(place, group)
        for bit in range(width):
            packed[number * size + i % size] |= (code >> bit & 1) << (i // size * width + bit)
    return packed


@given(matrices())
@settings(deadline=None)
def test_a_round_trip_loses_nothing(matrix: tuple[Tensor, int, int]) -> None:
    codes, bits, group = matrix
    streams = pack(codes, bits, group)
    assert sum(stream.numel() for stream in streams) * 8 == codes.numel() * bits
    assert all(stream.is_contiguous() and stream.dtype == torch.uint8 for stream in streams)
    assert torch.equal(unpack(streams, bits, group), codes)


@given(matrices())
@settings(deadline=None, max_examples=40)
def test_every_bit_is_in_its_place(matrix: tuple[Tensor, int, int]) -> None:
    codes, bits, group = matrix
    lowest = 0
    for stream, width in zip(pack(codes, bits, group), PLANES[bits], strict=True):
        part = codes >> lowest & (1 << width) - 1
        assert stream.tolist() == [plane_by_bits(row, width, group) for row in part.tolist()]
        lowest += width
    assert lowest == bits


def test_nibbles_of_a_group_of_64() -> None:
    codes = torch.randint(16, (3, 128), dtype=torch.uint8)
    (packed,) = pack(codes, 4, 64)
    for j in range(32):
        for start, group in ((0, 0), (32, 64)):  # byte, code
            assert torch.equal(packed[:, start + j] & 15, codes[:, group + j])
            assert torch.equal(packed[:, start + j] >> 4, codes[:, group + 32 + j])


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_inputs_are_left_alone_and_may_be_strided(bits: int) -> None:
    codes = torch.randint(1 << bits, (64, 6), dtype=torch.uint8).T  # [6, 64], columns first
    before = codes.clone()
    streams = pack(codes, bits, 32)
    copies = [stream.clone() for stream in streams]
    assert torch.equal(unpack(streams, bits, 32), before)
    assert torch.equal(codes, before)
    assert all(torch.equal(stream, copy) for stream, copy in zip(streams, copies, strict=True))
    assert streams[0].data_ptr() != codes.data_ptr()
