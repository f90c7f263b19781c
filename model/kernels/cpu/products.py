"""Products of a CPU with quantized matrices, read where they lie: in a file's mapping, the arena or a
slot."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.kernels.cpu.launching import launch, numbers
from model.kernels.cpu.rounding import TILE, Scheme
from model.quant.spec import ROWS, QuantSpec
from model.quant.streams import CODES

STREAMS = (*CODES, "scales", "zeros", "steps")


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [N, K], whose `streams` are by name as `QuantizedTensor.streams` has them."""

    spec: QuantSpec
    shape: tuple[int, int]
    streams: Mapping[str, Tensor]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of all `STREAMS`, in their order. 0 stands for one that the format does not have."""
        return tuple(self.streams[s].data_ptr() if s in self.streams else 0 for s in STREAMS)

    @cached_property
    def scheme(self) -> Scheme:
        return Scheme.of(self.spec)

    def __getstate__(self) -> dict[str, object]:
        """All but the addresses, because a copy has memory of its own."""
        return {"spec": self.spec, "shape": self.shape, "streams": self.streams}


class Rounded:
    """Rows of activations x [M, K], rounded as `rounding` says for a matrix [N, K], in tiles of up to `tile`
    rows."""

    def __init__(self, x: Tensor, matrix: PackedMatrix, tile: int = TILE) -> None:
        (M, K), x, scheme = x.shape, x.float().contiguous(), matrix.scheme
        if matrix.shape[1] != K:  # the kernel would read beyond the end of x
            raise ValueError(f"x has {K} columns, and the matrix {matrix.shape[1]}")
        # One run of bytes: the planes, int8, then scales and sums, float32.
        self.scales = scheme.planes * M * K
        self.sums = self.scales + M * K // scheme.unit * 4
        self.memory = torch.empty(self.sums + M * K // scheme.group * 4, dtype=torch.uint8, device="cpu")
        self.rows, self.inputs, self.scheme = M, K, scheme
        self.start = self.memory.data_ptr()
        launch("round_rows", scheme, M, (x.data_ptr(), K, M, tile, *self.at(0)), 4 * M * K)

    def at(self, row: int) -> tuple[int, int, int, int]:
        """Addresses of the planes, scales and sums of the rows from `row` on, where a tile begins."""
        done = row * self.inputs
        planes = self.start + done
        return (
            planes,
            planes + self.rows * self.inputs if self.scheme.planes == 2 else 0,
            self.start + self.scales + done // self.scheme.unit * 4,
            self.start + self.sums + done // self.scheme.group * 4,
        )


def multiply(x: Tensor, matrix: PackedMatrix) -> Tensor:  # [M, K] -> [M, N] float32
    """x @ W.T, from activations that are rounded to 8 bits."""
    rounded = Rounded(x, matrix)
    y = x.new_empty(x.shape[0], matrix.shape[0], dtype=torch.float32)
    compute("product", [matrix], [(rounded.at(0), len(x), y)])
    return y


def gate_up(x: Tensor, w13: PackedMatrix) -> Tensor:  # [M, D] -> [M, F] float32
    """silu(w1 x) * w3 x, where w13 [2 F, D] has the rows of w1, then those of w3."""
    rounded = Rounded(x, w13)
    h = x.new_empty(x.shape[0], w13.shape[0] // 2, dtype=torch.float32)
    compute("gate_up", [w13], [(rounded.at(0), len(x), h)])
    return h


def experts_of_a_token(x: Tensor, w13: Sequence[PackedMatrix], w2: Sequence[PackedMatrix]) -> Tensor:
    """The outputs of A experts for one token, x [1, D] -> [A, D] float32: two launches for all of them.

    Each is bit for bit what `multiply(gate_up(x, w13[a]), w2[a])` gives.
    """
    (N, K), A = w2[0].shape, len(w2)
    rounded = Rounded(x, w13[0])
    h = x.new_empty(A, K, dtype=torch.float32)
    compute("gate_up", w13, [(rounded.at(0), 1, row) for row in h])
    rounded = Rounded(h, w2[0], tile=1)
    y = x.new_empty(A, N, dtype=torch.float32)
    compute("product", w2, [(rounded.at(a), 1, row) for a, row in enumerate(y)])
    return y


# Where rounded rows are, how many, and the result [rows, height].
Job = tuple[tuple[int, int, int, int], int, Tensor]


def compute(name: str, matrices: Sequence[PackedMatrix], jobs: Sequence[Job]) -> None:
    """One launch for several matrices of the same format and shape, each with rows of its own."""
    matrix, height = matrices[0], jobs[0][2].shape[-1]
    spec, (N, K) = matrix.spec, matrix.shape
    table = numbers(
        [
            value
            for m, (at, rows, out) in zip(matrices, jobs, strict=True)
            for value in (*m.addresses, *at, rows, out.data_ptr())
        ]
    )
    blocks, rows = height // ROWS, sum(job[1] for job in jobs)
    arguments = (
        ctypes.addressof(table),
        blocks,
        K,
        K // spec.group_size,
        spec.meta_group_size.bit_length() - 1,
        height,
    )
    launch(name, matrix.scheme, len(matrices) * blocks, arguments, N * K * rows)
