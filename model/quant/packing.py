"""Codes of 8, 4, 3 and 2 bits as bytes, without an unused bit.

Codes are packed planar within a group. The group is cut into as many equal parts as a byte has room for
codes, and byte j holds code j of each part, the first part in the lowest bits. So a kernel that loads
consecutive bytes gets consecutive codes from one shift and one mask, and needs no shuffle to order them:

    4 bits, group of 64:  byte j = code j | code j + 32 << 4
    2 bits, group of 16:  byte j = code j | code j + 4 << 2 | code j + 8 << 4 | code j + 12 << 6

Three bits do not fill a byte evenly. They are two planes, packed by the same rule, each in a stream of its
own: the low 2 bits, and the high bit, 8 to a byte. Eight bits are stored unchanged.

Groups follow one another along a row, and rows follow one another. A stream is a matrix [N, K * bits / 8].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # widths of the planes, the lowest bits first


def pack(codes: Tensor, bits: int, group_size: int) -> list[Tensor]:
    """Pack codes [N, K] uint8, all below 2 ** bits, into one stream [N, K * width / 8] for each plane.

    A group of sixteen 2-bit codes. Byte 0 holds codes 0, 4, 8 and 12, which are 0, 1, 2 and 3:

    >>> codes = torch.tensor([[0, 0, 0, 3, 1, 1, 1, 3, 2, 2, 2, 3, 3, 0, 1, 3]], dtype=torch.uint8)
    >>> (packed,) = pack(codes, bits=2, group_size=16)
    >>> [f"{byte:08b}" for byte in packed[0].tolist()]
    ['11100100', '00100100', '01100100', '11111111']

    Sixteen 4-bit codes. Byte 0 holds code 0 in its low and code 8 in its high nibble:

    >>> (packed,) = pack(torch.arange(16, dtype=torch.uint8)[None], bits=4, group_size=16)
    >>> packed[0].numpy().tobytes().hex(" ")
    '80 91 a2 b3 c4 d5 e6 f7'

    Sixteen 3-bit codes, 0 to 7 twice. Byte 0 of the low plane holds the low two bits of codes 0, 4, 8 and 12,
    all 00. Byte 0 of the high plane holds the high bits of codes 0, 2, ... 14, which 4, 6, 12 and 14 have
    set:

    >>> low, high = pack(torch.arange(16, dtype=torch.uint8)[None] % 8, bits=3, group_size=16)
    >>> [f"{byte:08b}" for byte in low[0].tolist()], [f"{byte:08b}" for byte in high[0].tolist()]
    (['00000000', '01010101', '10101010', '11111111'], ['11001100', '11001100'])
    """
    streams, shift = [], 0
    for width in PLANES[bits]:
        streams.append(pack_plane(codes >> shift & mask(width), width, group_size))
        shift += width
    return streams


def unpack(streams: Sequence[Tensor], bits: int, group_size: int) -> Tensor:
    """Codes [N, K] uint8 from the streams that `pack` returned.

    >>> codes = torch.randint(8, (2, 64), dtype=torch.uint8)
    >>> torch.equal(unpack(pack(codes, bits=3, group_size=32), bits=3, group_size=32), codes)
    True
    """
    first, *others = PLANES[bits]
    codes, shift = unpack_plane(streams[0], first, group_size), first
    for width, stream in zip(others, streams[1:], strict=True):
        codes |= unpack_plane(stream, width, group_size) << shift
        shift += width
    return codes


def pack_plane(codes: Tensor, width: int, group_size: int) -> Tensor:  # [N, K] -> [N, K * width / 8]
    """Put the `8 / width` parts of each group into the same bytes."""
    N, K = codes.shape
    parts = 8 // width
    assert codes.dtype == torch.uint8 and K % group_size == 0 and group_size % parts == 0
    grouped = codes.reshape(N, K // group_size, parts, group_size // parts)
    packed = grouped[:, :, 0].clone()  # [N, K / group_size, group_size / parts]
    for part in range(1, parts):
        packed |= grouped[:, :, part] << part * width
    return packed.view(N, K // parts)


def unpack_plane(packed: Tensor, width: int, group_size: int) -> Tensor:  # [N, K * width / 8] -> [N, K]
    """The inverse of `pack_plane`. Up to 8 bytes of a part are taken as one word, which makes loops
    shorter."""
    N, K = packed.shape[0], packed.shape[1] * 8 // width
    parts = 8 // width
    assert packed.dtype == torch.uint8 and K % group_size == 0 and group_size % parts == 0
    word = WORDS[min(group_size // parts, 8)]
    masks = int.from_bytes(bytes([mask(width)]) * word.itemsize, "little", signed=True)  # one in every byte
    grouped = packed.contiguous().view(word).view(N, K // group_size, -1)
    codes = packed.new_empty(N, K).view(word).view(N, K // group_size, parts, -1)
    for part in range(parts):
        torch.bitwise_and(grouped >> part * width, masks, out=codes[:, :, part])
    return codes.view(N, -1).view(torch.uint8)


def mask(width: int) -> int:
    return (1 << width) - 1
