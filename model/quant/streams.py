"""Where the bytes of a quantized matrix go, of an expert, and of a whole model.

A matrix `name` [N, K] is up to five streams, which follow one another without gaps. Rows 16 b to 16 b + 15
are block b of each stream, and in it the 16 rows lie side by side. A row has J = K / group_size groups:

    name.codes       uint8    [N / 16, K * bits / 32, 16, 4]   3 bits: the low plane, [N / 16, K / 16, 16, 4]
    name.codes_high  uint8    [N / 16, K / 32, 16, 4]          3 bits only: the high plane
    name.scales      uint8    [N / 16, J, 16]
    name.zeros       uint8    [N / 16, J, 16]
    name.steps       float32  [N / 16, J / meta_group_size, rounded up, 16]

So every stream is a multiple of 16 bytes long, and all are aligned for 16-byte loads if the first one is. At
16 bits the matrix is the one stream `name.weight`, unchanged.

Groups and steps run along K, and none spans two rows. So matrices with the same inputs, such as q, k and v,
can be quantized as one with the same result.

An expert is one run of bytes, its **blob**: the streams of w13 (w1 above w3), then those of w2.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters import instances, parameter_rows
from model.quant.formats import Formats
from model.quant.packing import PLANES, plane_shape
from model.quant.spec import ROWS, QuantSpec

STREAM_ALIGNMENT = 16  # bytes
CODES = ("codes", "codes_high")  # the streams of the planes, the low one first


@dataclass(frozen=True)
class Field:
    """A tensor's place in a run of bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.bytes

    def view(self, buffer: Tensor) -> Tensor:
        """This tensor as a view of `buffer` [uint8], in which the offset counts."""
        return buffer[self.offset : self.end].view(self.dtype).view(self.shape)


def matrix_fields(
    name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0, dtype: torch.dtype = torch.bfloat16
) -> list[Field]:
    """The streams of one matrix. At 16 bits it is in `dtype`.

    >>> for field in matrix_fields("w2", (4096, 14336), QuantSpec(4)):
    ...     print(field.name, field.shape, field.offset, field.bytes)
    w2.codes (256, 1792, 16, 4) 0 29360128
    w2.scales (256, 224, 16) 29360128 917504
    w2.zeros (256, 224, 16) 30277632 917504
    w2.steps (256, 1, 16) 31195136 16384

    Raises `ModelError` if the format does not take the shape.
    """
    spec.check(name, shape)
    if not spec.quantized:
        return [Field(f"{name}.weight", dtype, tuple(shape), offset)]
    N, K = shape
    groups = (N // ROWS, K // spec.group_size, ROWS)
    streams: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
        (stream, torch.uint8, plane_shape(N, K, width))
        for stream, width in zip(CODES, PLANES[spec.bits], strict=False)
    ]
    streams += [("scales", torch.uint8, groups), ("zeros", torch.uint8, groups)]
    fields = []
    for stream, kind, size in [*streams, ("steps", torch.float32, (N // ROWS, spec.steps(K), ROWS))]:
        field = Field(f"{name}.{stream}", kind, size, offset)
        assert field.bytes % STREAM_ALIGNMENT == 0, field
        fields.append(field)
        offset = field.end
    return fields


def expert_fields(
    config: ModelConfig, spec: QuantSpec, name: str = "", offset: int = 0, dtype: torch.dtype = torch.bfloat16
) -> list[Field]:
    """The streams of one expert. Their names begin with `name`. All experts of a model are alike.

    The rows of w1 and of w3 are whole blocks each, since a quantized w2 has a multiple of 32 columns.

    >>> tiny = ModelConfig(vocab=9, hidden=64, layers=1, heads=2, kv_heads=1, head_dim=32, ffn=128, experts=2,
    ...                    experts_per_token=1, context=8, rope_theta=1e4, norm_eps=1e-5)
    >>> [(field.name, field.shape) for field in expert_fields(tiny, QuantSpec(3))][:5]
    [('w13.codes', (16, 4, 16, 4)), ('w13.codes_high', (16, 2, 16, 4)), ('w13.scales', (16, 1, 16)), ('w13.zeros', (16, 1, 16)), ('w13.steps', (16, 1, 16))]
    >>> expert_fields(tiny, QuantSpec(3))[-1]  # a step for each of 64 rows
    Field(name='w2.steps', dtype=torch.float32, shape=(4, 1, 16), offset=11008)
    """  # noqa: E501
    D, F = config.hidden, config.ffn
    first = matrix_fields(f"{name}w13", (2 * F, D), spec, offset, dtype)
    return first + matrix_fields(f"{name}w2", (D, F), spec, first[-1].end, dtype)


def model_fields(
    config: ModelConfig, formats: Formats, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Field]:
    """Every tensor of a model, in the order of its bytes, as if all were in one file.

    What is not quantized is in `dtype`. An expert's tensors follow one another without gaps.
    """
    shapes = parameter_rows(config)
    offset = 0
    for template, n, e in instances(config):
        rows, row = shapes[template]
        name = template.format(n=n, e=e).removesuffix(".weight")
        for field in matrix_fields(name, (sum(rows), *row), formats.spec_of(template), offset, dtype):
            yield field
            offset = field.end
