"""The fast way of a CPU in bfloat16: PyTorch's kernel for 4-bit weights, which never expands them.

`torch.ops.aten._weight_int4pack_mm_for_cpu(x, nibbles, group, pairs)` computes `x @ W.T` with

    w = (q - 8) * pairs[group of k, n, 0] + pairs[group of k, n, 1]

from codes q of up to 4 bits, in groups of 32, 64, 128 or 256 along K, with x and pairs in bfloat16. Codes of
2 and 3 bits are moved to the middle of the nibble's range. That makes `(middle - zero) * scale` small, which
takes the place of a format's zero, and so rounding it to bfloat16 costs little. Formats that the kernel does
not know are sums of formats that it knows:

    groups of 16       even and odd groups apart, in groups of 32; x is 0 where the other groups are
    groups above 256   the same scale several times
    8 bits             16 * high nibble + low nibble

The kernel takes longer the more rows x has. From `FEW` rows on it pays to expand a block of W once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.moe import gated
from model.quant.spec import QuantSpec
from model.quant.streams import Field
from model.quant.tensor import QuantizedTensor
from model.rows import filled_up, in_pieces
from model.target import Target

KERNEL_GROUPS = (32, 64, 128, 256)
FEW = 48  # rows of x, measured at 14336 x 4096
ROWS = 64  # the kernel's own blocks have 64 rows, or 32 with AVX2
EXPANDED = 512  # rows of W expanded at a time
SIXTEEN = "where memory allows, leave them at 16 bits"


class Int4Pack:
    """A matrix as one or two sets of codes and (scale, zero) pairs. Each is a product of its own, and y is
    their sum."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    universal: ClassVar[bool] = False
    independent: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        self.spec, self.shape = spec, shape
        self.halves = spec.group_size < KERNEL_GROUPS[0]  # even and odd groups apart
        self.group = kernel_group(spec)
        self.nibbles = memory["nibbles"]  # [planes, N, K / 2] uint8, in the kernel's order
        self.pairs = memory["pairs"]  # [products, K / group, N, 2] bfloat16
        self.few = FEW // self.pairs.shape[0]

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N] bfloat16
        if x.shape[0] >= self.few:
            return self.expand_and_multiply(x)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        if self.pairs.shape[0] == 1:
            return product(x.contiguous(), self.nibbles[0], self.group, self.pairs[0])
        first, second = self.parts(x)
        return product(first, self.nibbles[0], self.group, self.pairs[0]) + product(
            second, self.nibbles[-1], self.group, self.pairs[1]
        )

    def gated(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N / 2]
        return gated(x, self)

    @staticmethod
    def together(x: Tensor, w13: Sequence[Any], w2: Sequence[Any]) -> None:
        return None

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the two products multiply with: both all of x, or one its even and one its odd groups."""
        if not self.halves:
            return x.contiguous(), x.contiguous()
        M, K = x.shape
        even, odd = (x.clone(memory_format=torch.contiguous_format) for _ in range(2))
        pairs = (M, K // (2 * self.spec.group_size), 2, self.spec.group_size)
        even.view(pairs)[:, :, 1] = 0
        odd.view(pairs)[:, :, 0] = 0
        return even, odd

    def expand_and_multiply(self, x: Tensor) -> Tensor:
        """`x @ W.T` for many rows: W.T is expanded in blocks of columns, and each is multiplied plainly.

        The blocks share their memory. Fresh pages for each took longer than the work on them.
        """
        (N, K), M = self.shape, x.shape[0]
        x = filled_up(x)
        out = x.new_empty(x.shape[0], N)
        work = Workspace(K, min(EXPANDED, N), len(self.nibbles), x.device)
        for start in range(0, N, EXPANDED):
            rows = slice(start, min(start + EXPANDED, N))
            out[:, rows] = in_pieces(partial(torch.mm, mat2=self.expand(rows, work)), x)
        return out[:M]

    def expand(self, rows: slice, work: "Workspace") -> Tensor:
        """Some rows of W, in whole blocks of the kernel's, transposed: [K, n] bfloat16."""
        K, n = self.shape[1], rows.stop - rows.start
        codes = [work.codes(plane, i, rows) for i, plane in enumerate(self.nibbles)]  # [K, n] each
        if self.halves:
            values = codes[0].view(-1, 2, self.spec.group_size, n)
            for half in (0, 1):
                self.apply(values[:, half], half, rows)
            return codes[0]
        for i, plane in enumerate(codes):
            self.apply(plane.view(-1, self.group, n), i, rows)
        return functools.reduce(Tensor.add_, codes).view(K, n)

    def apply(self, values: Tensor, product: int, rows: slice) -> None:
        """Turn codes less 8, [groups, weights of a group, n], into weights, in place."""
        scales, zeros = self.pairs[product, :, rows].unbind(-1)  # [groups, n]
        torch.addcmul(zeros.contiguous()[:, None], values, scales.contiguous()[:, None], out=values)

    @staticmethod
    def unsupported(
        spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target
    ) -> str | None:
        (N, K), inputs = shape, kernel_group(spec)
        if kernel_block() == 0:
            capability = torch.backends.cpu.get_cpu_capability()
            return f"needs a CPU with AVX2 or AVX-512, and PyTorch found {capability}; {SIXTEEN}"
        if dtype != torch.bfloat16:
            name = str(dtype).removeprefix("torch.")
            return f"computes in bfloat16, not {name}; choose the dtype bfloat16"
        if N % ROWS or K % inputs:
            return f"takes rows in multiples of {ROWS} and inputs of {inputs}, not {N} x {K}; {SIXTEEN}"
        if spec.bits == 8 and spec.group_size < KERNEL_GROUPS[0]:
            return f"takes 8 bits in groups of 32 or more, not {spec.group_size}; quantize them to 8g32"
        return None

    @staticmethod
    def kernels(spec: QuantSpec, gated: bool) -> list[Callable[[], object]]:
        return []

    @staticmethod
    def scratch_bytes(inputs: int, dtype: torch.dtype, target: Target) -> int:
        return EXPANDED * inputs * 8  # bytes for up to two planes in bfloat16, their codes, and some room

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        N, K = shape
        planes = 2 if spec.bits == 8 else 1
        products = 2 if spec.bits == 8 or spec.group_size < KERNEL_GROUPS[0] else 1
        nibbles = Field(f"{name}.nibbles", torch.uint8, (planes, N, K // 2), offset)
        pairs = (products, K // kernel_group(spec), N, 2)
        return [nibbles, Field(f"{name}.pairs", torch.bfloat16, pairs, nibbles.end)]

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        spec, codes = matrix.spec, matrix.unpack()
        scales, zeros = matrix.group_scales(), matrix.group_zeros()  # [N, J]
        repeats = max(spec.group_size // KERNEL_GROUPS[-1], 1)
        products = []  # (scale, zero as the kernel takes it), [N, groups] each
        if spec.bits == 8:
            pack_nibbles(codes >> 4, memory["nibbles"][0])
            pack_nibbles(codes & 15, memory["nibbles"][1])
            high = (zeros / 16).round()  # z = 16 * high + low, |low| <= 8
            products = [(16 * scales, (8 - high) * 16 * scales), (scales, (8 - zeros + 16 * high) * scales)]
        else:
            middle = 1 << spec.bits - 1
            pack_nibbles(codes + (8 - middle), memory["nibbles"][0])
            shifted = (middle - zeros) * scales
            halves = 2 if spec.group_size < KERNEL_GROUPS[0] else 1
            products = [(scales[:, i::halves], shifted[:, i::halves]) for i in range(halves)]
        for pairs, values in zip(memory["pairs"], products, strict=True):
            pairs.copy_(torch.stack(values, dim=-1).repeat_interleave(repeats, dim=1).transpose(0, 1))


def kernel_group(spec: QuantSpec) -> int:
    return min(max(spec.group_size, KERNEL_GROUPS[0]), KERNEL_GROUPS[-1])


@functools.cache
def kernel_block() -> int:
    """How many rows the kernel keeps together on this CPU: 64 with AVX-512, 32 with AVX2. 0 if it has no
    kernel here, or an order that `pack_in_blocks` does not know.

    Byte j of column k has row j in its low and row j + block / 2 in its high nibble. The kernel is asked to
    pack some codes, and the result is compared.
    """
    codes = (torch.arange(ROWS * 64, device="cpu") % 13).view(ROWS, 64).to(torch.uint8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (AttributeError, RuntimeError):
        return 0
    for block in (64, 32):
        ours = torch.empty_like(packed)
        pack_in_blocks(codes, ours, block)
        if torch.equal(ours, packed):
            return block
    return 0


def pack_nibbles(codes: Tensor, out: Tensor) -> None:  # [N, K] uint8 -> [N, K / 2]
    pack_in_blocks(codes, out, kernel_block())


def pack_in_blocks(codes: Tensor, out: Tensor, block: int) -> None:
    """Put two rows, half a block apart, in one byte, and a block's columns one after the other.

    `_convert_weight_to_int4pack_for_cpu` does the same, but from int32 and four times as slowly. Rows 0 and 2
    of a block of four share bytes, and so do rows 1 and 3:

    >>> out = torch.empty(4, 1, dtype=torch.uint8)
    >>> pack_in_blocks(torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]], dtype=torch.uint8), out, 4)
    >>> [f"{byte:02x}" for byte in out.flatten().tolist()]
    ['51', '73', '62', '84']
    """
    N, K = codes.shape
    halves = codes.view(N // block, 2, block // 2, K)
    both = halves[:, 1] << 4
    both |= halves[:, 0]  # [N / block, block / 2, K]
    for packed, pair in zip(out.view(N // block, K, block // 2), both, strict=True):
        packed.copy_(pair.t())  # one matrix at a time, which PyTorch transposes in tiles


class Workspace:
    """Memory for a block of up to n rows of W as it is expanded, used again for the next block."""

    def __init__(self, K: int, n: int, planes: int, device: torch.device) -> None:
        self.halves = torch.empty(2, K * n // 2, dtype=torch.uint8, device=device)
        self.values = torch.empty(planes, K * n, dtype=torch.bfloat16, device=device)

    def codes(self, nibbles: Tensor, plane: int, rows: slice) -> Tensor:
        """The codes of some rows of a plane [N, K / 2], less 8 and transposed: [K, n] bfloat16."""
        K, n, block = nibbles.shape[1] * 2, rows.stop - rows.start, kernel_block()
        packed = nibbles[rows].view(-1, K, block // 2)  # [n / block, K, block / 2]
        values = self.values[plane, : K * n].view(K, n // block, 2, block // 2)
        for half, codes in enumerate(self.halves[:, : packed.numel()]):
            codes = codes.view(packed.shape)
            if half:
                torch.bitwise_right_shift(packed, 4, out=codes)
            else:
                torch.bitwise_and(packed, 15, out=codes)
            values[:, :, half] = codes.sub_(8).view(torch.int8).transpose(0, 1)
        return values.view(K, n)
