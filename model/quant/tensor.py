"""A quantized matrix: its streams, and the numbers that they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.quant.packing import unpack
from model.quant.spec import ROWS, QuantSpec
from model.quant.streams import matrix_fields


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix [N, K] in the streams of `model.quant.streams`: B = N / 16 blocks of 16 rows, with J = K /
    group_size groups to a row.

    A weight with code q, in a group with scale byte s and zero byte z, with the step t, is

        w = (q - z / 2 ** (8 - bits)) * (s * t)

    The zero is the code that stands for the weight 0. It may be a fraction: its unit is 1/16 of a code at 4
    bits, 1/64 at 2 bits, and 1 at 8 bits. So it needs no scale of its own, and q - zero is exact even in
    bfloat16. A group costs 16 bits for s and z, and a row 32 for each step: with 3g128, a weight of a matrix
    of 4096 columns costs 3 + 16 / 128 + 32 / 4096 = 3.133 bits.

    >>> fill = lambda value, *shape: torch.full(shape, value, dtype=torch.uint8)
    >>> w = QuantizedTensor(QuantSpec(4, group_size=32), (16, 32), codes=fill(0xF5, 1, 4, 16, 4), codes_high=None,
    ...                     scales=fill(100, 1, 1, 16), zeros=fill(120, 1, 1, 16), steps=torch.full((1, 1, 16), 0.01))
    >>> w.dequantize()[0, 2:6]  # (5 - 120/16) * (100 * 0.01) and (15 - 120/16) * 1.0
    tensor([-2.5000, -2.5000,  7.5000,  7.5000])
    """  # noqa: E501

    spec: QuantSpec
    shape: tuple[int, int]
    codes: Tensor  # [B, K * bits / 32, 16, 4] uint8; at 3 bits the low plane, [B, K / 16, 16, 4]
    codes_high: Tensor | None  # [B, K / 32, 16, 4] uint8, at 3 bits only
    scales: Tensor  # [B, J, 16] uint8
    zeros: Tensor  # [B, J, 16] uint8
    steps: Tensor  # [B, J / meta_group_size rounded up, 16] float32

    def __post_init__(self) -> None:
        expected = {f.name: (f.dtype, f.shape) for f in matrix_fields("", self.shape, self.spec)}
        given = {f".{name}": (t.dtype, tuple(t.shape)) for name, t in self.streams().items()}
        assert given == expected, (given, expected)

    @staticmethod
    def of(spec: QuantSpec, shape: tuple[int, int], streams: Mapping[str, Tensor]) -> "QuantizedTensor":
        """A matrix of these streams by name, as `streams` returns them."""
        high = streams.get("codes_high")
        return QuantizedTensor(
            spec, shape, streams["codes"], high, streams["scales"], streams["zeros"], streams["steps"]
        )

    def streams(self) -> dict[str, Tensor]:
        """The tensors by name, in the order in which they are stored."""
        high = {} if self.codes_high is None else {"codes_high": self.codes_high}
        return {
            "codes": self.codes, **high, "scales": self.scales, "zeros": self.zeros, "steps": self.steps,
        }  # fmt: skip

    def copy_to(self, memory: Mapping[str, Tensor]) -> None:
        """Copy the streams to tensors of the same names."""
        for name, stream in self.streams().items():
            memory[name].copy_(stream)

    def part(self, rows: slice) -> "QuantizedTensor":
        """Some rows, in whole blocks, as a matrix that shares this one's memory."""
        blocks = slice(rows.start // ROWS, rows.stop // ROWS)
        streams = {name: stream[blocks] for name, stream in self.streams().items()}
        return QuantizedTensor.of(self.spec, (rows.stop - rows.start, self.shape[1]), streams)

    def planes(self) -> list[Tensor]:
        """The streams of codes, the low plane first."""
        return [self.codes] if self.codes_high is None else [self.codes, self.codes_high]

    def unpack(self) -> Tensor:
        """The codes, one to a byte [N, K]."""
        return unpack(self.planes(), self.spec.bits)

    def group_scales(self) -> Tensor:
        """Every group's scale s * t, [N, J] float32."""
        return by_row(scale_values(self.scales, self.steps, self.spec))

    def group_zeros(self) -> Tensor:
        """Every group's zero z / 2 ** (8 - bits), [N, J] float32: the code that stands for 0."""
        return by_row(zero_values(self.zeros, self.spec))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K], computed in float32 and rounded to `dtype`. This is the reference, and slow."""
        N, K = self.shape
        codes = self.unpack().view(N, -1, self.spec.group_size).float()  # [N, J, group_size]
        centred = codes - self.group_zeros()[..., None]  # [N, J, group_size]
        return (centred * self.group_scales()[..., None]).view(N, K).to(dtype)


def scale_values(scales: Tensor, steps: Tensor, spec: QuantSpec) -> Tensor:  # [B, J, 16] uint8 -> float32
    """
    >>> scales, steps = torch.full((1, 3, 16), 9, dtype=torch.uint8), torch.tensor([1.0, 2.0]).view(1, 2, 1)
    >>> scale_values(scales, steps.expand(1, 2, 16), QuantSpec(4, 16, meta_group_size=2))[0, :, 0]
    tensor([ 9.,  9., 18.])
    """
    return scales * steps.repeat_interleave(spec.meta_group_size, dim=1)[:, : scales.shape[1]]


def zero_values(zeros: Tensor, spec: QuantSpec) -> Tensor:  # [B, J, 16] uint8 -> float32
    return zeros.float() / 2 ** (8 - spec.bits)


def by_row(values: Tensor) -> Tensor:  # [B, J, 16] -> [N, J]
    return values.transpose(1, 2).contiguous().view(-1, values.shape[1])


def by_block(values: Tensor) -> Tensor:  # [N, J] -> [B, J, 16]
    """The inverse of `by_row`."""
    return values.view(-1, ROWS, values.shape[1]).transpose(1, 2).contiguous()
