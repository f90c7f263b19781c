"""A quantized matrix: its streams, and the numbers that they stand for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.quant.packing import unpack
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix [N, K] in the streams of `model.quant.streams`, with J = K / group_size groups to a row.

    A weight with code q, in a group with scale byte s and zero byte z, with the step t, is

        w = (q - z / 2 ** (8 - bits)) * (s * t)

    The zero is the code that stands for the weight 0. It may be a fraction: its unit is 1/16 of a code at 4
    bits, 1/64 at 2 bits, and 1 at 8 bits. So it needs no scale of its own, and q - zero is exact even in
    bfloat16. A group costs 16 bits for s and z, and 32 / meta_group_size for its share of t: with 3g128, a
    weight costs 3 + 16 / 128 + 32 / (128 * 128) = 3.127 bits.

    >>> spec = QuantSpec(4, group_size=16)
    >>> fill = lambda value, *shape: torch.full(shape, value, dtype=torch.uint8)
    >>> w = QuantizedTensor(spec, (16, 16), codes=fill(0xF5, 16, 8), codes_high=None, scales=fill(100, 16, 1),
    ...                     zeros=fill(120, 16, 1), steps=torch.tensor([0.01, 0, 0, 0]))
    >>> w.dequantize()[0, [0, 15]]  # (5 - 120/16) * (100 * 0.01) and (15 - 120/16) * 1.0
    tensor([-2.5000,  7.5000])
    """

    spec: QuantSpec
    shape: tuple[int, int]
    codes: Tensor  # [N, K * bits / 8] uint8; at 3 bits the low plane, [N, K / 4]
    codes_high: Tensor | None  # [N, K / 8] uint8, at 3 bits only
    scales: Tensor  # [N, J] uint8
    zeros: Tensor  # [N, J] uint8
    steps: Tensor  # [N J / meta_group_size, rounded up, then with zeros to a multiple of 4] float32

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

    def planes(self) -> list[Tensor]:
        """The streams of codes, the low plane first."""
        return [self.codes] if self.codes_high is None else [self.codes, self.codes_high]

    def unpack(self) -> Tensor:
        """The codes, one to a byte [N, K]."""
        return unpack(self.planes(), self.spec.bits, self.spec.group_size)

    def group_scales(self) -> Tensor:
        """Every group's scale s * t, [N, J] float32."""
        return scale_values(self.scales, self.steps, self.spec)

    def group_zeros(self) -> Tensor:
        """Every group's zero z / 2 ** (8 - bits), [N, J] float32: the code that stands for 0."""
        return zero_values(self.zeros, self.spec)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K], computed in float32 and rounded to `dtype`. This is the reference, and slow."""
        N, K = self.shape
        codes = self.unpack().view(N, -1, self.spec.group_size).float()  # [N, J, group_size]
        centred = codes - self.group_zeros()[..., None]  # [N, J, group_size]
        return (centred * self.group_scales()[..., None]).view(N, K).to(dtype)


def scale_values(scales: Tensor, steps: Tensor, spec: QuantSpec) -> Tensor:  # [N, J] uint8 -> float32
    """
    >>> scale_values(torch.tensor([[9] * 20], dtype=torch.uint8), torch.tensor([1.0, 2.0]), QuantSpec(4, 16, 16))[0, 14:18]
    tensor([ 9.,  9., 18., 18.])
    """  # noqa: E501
    each = steps.repeat_interleave(spec.meta_group_size)[: scales.numel()]
    return scales * each.view(scales.shape)


def zero_values(zeros: Tensor, spec: QuantSpec) -> Tensor:  # [N, J] uint8 -> float32
    return zeros.float() / 2 ** (8 - spec.bits)
