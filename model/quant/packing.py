"""Codes of 8, 4, 3 and 2 bits as bytes, without an unused bit.

Codes are packed in **words** of 4 bytes. A word has 32 / width consecutive codes of one row. Code i is in
byte i % 4, and the first four codes are in the lowest bits:

    8 bits:  byte j = code j
    4 bits:  byte j = code j | code j + 4 << 4
    2 bits:  byte j = code j | code j + 4 << 2 | code j + 8 << 4 | code j + 12 << 6
    1 bit:   byte j = code j | code j + 4 << 1 | ... | code j + 28 << 7

So one shift and one mask of a word give four neighbouring codes, one in each byte, in order.

Rows are interleaved by 16, which makes a **block**: word 0 of each of its rows, then word 1 of each, and so
on. A plane of codes of one width is a tensor [N / 16, words of a row, 16, 4].

Three bits do not fill a byte evenly. They are two planes: the low 2 bits, and the high bit. A word of the
high plane belongs to two words of the low one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.quant.spec import ROWS

WORD = 4  # bytes
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # widths of the planes, the lowest bits first


def plane_shape(N: int, K: int, width: int) -> tuple[int, int, int, int]:
    """Bytes of the plane that has `width` bits of each code of a matrix [N, K].

    >>> plane_shape(32, 64, width=4)
    (2, 8, 16, 4)
    """
    return N // ROWS, K * width // 8 // WORD, ROWS, WORD


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """Pack codes [N, K] uint8, all below 2 ** bits, into a plane [N / 16, K * width / 32, 16, 4] uint8 for
    each width. N has to be a multiple of 16, and K of 32.

    Row 0 of a block of sixteen, with 32 codes of 4 bits, which are 0 to 15 twice. Byte 0 of word 0 holds code
    0 in its low and code 4 in its high nibble:

    >>> row = torch.arange(32, dtype=torch.uint8) % 16
    >>> codes = torch.stack([row, *torch.zeros(15, 32, dtype=torch.uint8)])
    >>> (plane,) = pack(codes, bits=4)
    >>> tuple(plane.shape), [word.numpy().tobytes().hex(" ") for word in plane[0, :, 0]]
    ((1, 4, 16, 4), ['40 51 62 73', 'c8 d9 ea fb', '40 51 62 73', 'c8 d9 ea fb'])

    The same row at 3 bits, where codes are 0 to 7 four times. A word of the low plane has 16 codes, and its
    byte 0 holds the low two bits of codes 0, 4, 8 and 12. The high plane is a single word. Its byte 0 holds
    the high bits of codes 0, 4, ... 28, every other one of which is set:

    >>> low, high = pack(codes % 8, bits=3)
    >>> [[f"{byte:08b}" for byte in word.tolist()] for word in (low[0, 0, 0], high[0, 0, 0])]
    [['00000000', '01010101', '10101010', '11111111'], ['10101010', '10101010', '10101010', '10101010']]
    """
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(pack_plane(codes >> shift & mask(width), width))
        shift += width
    return planes


def unpack(planes: Sequence[Tensor], bits: int) -> Tensor:
    """Codes [N, K] uint8 from the planes that `pack` returned, or from some blocks of each.

    >>> codes = torch.randint(8, (32, 64), dtype=torch.uint8)
    >>> low, high = pack(codes, bits=3)
    >>> torch.equal(unpack([low, high], bits=3), codes)
    True
    >>> torch.equal(unpack([low[1:], high[1:]], bits=3), codes[16:])
    True
    """
    first, *others = PLANES[bits]
    codes, shift = unpack_plane(planes[0], first), first
    for width, plane in zip(others, planes[1:], strict=True):
        codes |= unpack_plane(plane, width) << shift
        shift += width
    return codes


def pack_plane(codes: Tensor, width: int) -> Tensor:  # [N, K] -> [N / 16, K * width / 32, 16, 4]
    """Four neighbouring codes, one to a byte, are taken as one number. A word is `8 / width` of these,
    shifted. No bit leaves its byte."""
    (N, K), parts = codes.shape, 8 // width
    blocks, words, _, _ = plane_shape(N, K, width)
    assert codes.dtype == torch.uint8 and N % ROWS == 0 and K % (WORD * parts) == 0, (codes.shape, width)
    fours = codes.contiguous().view(torch.int32).view(blocks, ROWS, words, parts)
    packed = fours[..., 0].clone()
    for part in range(1, parts):
        packed |= fours[..., part] << part * width
    return packed.transpose(1, 2).contiguous().view(torch.uint8).view(blocks, words, ROWS, WORD)


def unpack_plane(plane: Tensor, width: int) -> Tensor:  # [N / 16, K * width / 32, 16, 4] -> [N, K]
    """The inverse of `pack_plane`."""
    (blocks, words, _, _), parts = plane.shape, 8 // width
    assert plane.dtype == torch.uint8 and plane.shape[2:] == (ROWS, WORD), plane.shape
    rows = plane.contiguous().view(torch.int32).view(blocks, words, ROWS).transpose(1, 2).contiguous()
    masks = int.from_bytes(bytes([mask(width)]) * WORD, "little", signed=True)  # one in every byte
    codes = rows.new_empty(blocks, ROWS, words, parts)
    for part in range(parts):
        torch.bitwise_and(rows >> part * width, masks, out=codes[..., part])
    return codes.view(blocks * ROWS, -1).view(torch.uint8)


def mask(width: int) -> int:
    return (1 << width) - 1
