"""The experts of one token, computed by slot: two launches for all of them.

An expert is computed alike whichever others are computed with it, and `down` rounds and adds contributions as
`model.moe.OneToken` does. So one call for all of a token's experts gives the same bits as calls for one of
them at a time, added up in ascending order of expert. `model.kernels.matrices` rounds differently.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels.launching import launch, power_of_two
from model.kernels.matrices import OneRow, aligned, constants
from model.quant.spec import ROWS, QuantSpec
from model.quant.streams import matrix_fields


@dataclass(frozen=True)
class BlobLayout:
    """What the kernels know of a pool's blobs: w13 [2 F, D], then w2 [D, F], as files have them. At 16 bits
    both are in x's dtype, which may be float32."""

    spec: QuantSpec
    hidden: int  # D
    ffn: int  # F

    def w2_offset(self, dtype: torch.dtype) -> int:
        """The byte where w2 begins in a blob of a model that computes in `dtype`."""
        return matrix_fields("w13", (2 * self.ffn, self.hidden), self.spec, dtype=dtype)[-1].end

    def tile(self, rows: int, K: int) -> OneRow:
        """The tile of a program that multiplies with this many rows, or with some of them."""
        return OneRow.pick(rows, K, self.spec.bits) if self.spec.quantized else OneRow.plain(rows)


def experts_by_slot(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    weights: Tensor,
    layout: BlobLayout,
    ids: Tensor | None = None,
    absent: bool = False,
) -> Tensor:
    """The weighted sum of A experts of the pool, for one token: x [1, D] -> [1, D]. The other arguments are
    those of `gate_up` and `down`.

    With `absent`, a slot of -1 means that the expert is not in the pool. The others are summed, which may be
    none.
    """
    h = gate_up(x, pool, slots, layout, absent)
    return down(h, pool, slots, weights, layout, ids, absent)


def gate_up(x: Tensor, pool: Tensor, slots: Tensor, layout: BlobLayout, absent: bool = False) -> Tensor:
    """`silu(w1 x) * w3 x` for each of A experts and one token, in one launch: [A, F] in x's dtype.

    x is [1, D]. The rows of pool [S, bytes] uint8 are multiples of 16 bytes. slots [A] holds integers of any
    dtype, on x's device. w1 x, w3 x, silu and the product are rounded as by separate operations. With
    `absent`, the row of an expert whose slot is -1 is uninitialized.
    """
    from model.kernels import expert_kernels

    D, F, (A,) = layout.hidden, layout.ffn, slots.shape
    check(x, (1, D), pool, layout)
    # Of quantized matrices a program takes a block of w1 and a block of w3.
    tile = layout.tile(min(F, ROWS), D)
    h = x.new_empty(A, F)
    launch(
        expert_kernels.gate_up, (F // tile.rows, A), aligned(x), pool, slots.contiguous(), h,
        D=D, F=F, **constants(layout.spec), BLOB=pool.shape[1], **tile.constants(), ABSENT=absent,
        num_warps=tile.warps,
    )  # fmt: skip
    return h


def down(
    h: Tensor,
    pool: Tensor,
    slots: Tensor,
    weights: Tensor,
    layout: BlobLayout,
    ids: Tensor | None = None,
    absent: bool = False,
) -> Tensor:
    """The sum over A experts of `weight * w2 h`, in one launch: [1, D] in h's dtype.

    h [A, F] comes from `gate_up`. weights [A] are rounded to h's dtype first. slots [A] and ids [A] are each
    expert's own integers, and the ids all differ. A contribution is rounded, then its product with the
    weight, then each sum, in ascending order of id. Without ids, slots take their place, so slots must then
    lie in the order of ids. With `absent`, experts whose slot is -1 are left out.
    """
    from model.kernels import expert_kernels

    D, F, (A,) = layout.hidden, layout.ffn, slots.shape
    check(h, (A, F), pool, layout)
    tile = layout.tile(D, F)
    slots = slots.contiguous()
    y = h.new_empty(1, D)
    launch(
        expert_kernels.down, (D // tile.rows,), aligned(h), pool, slots,
        slots if ids is None else ids.contiguous(), weights.contiguous(), y,
        D=D, F=F, **constants(layout.spec), BLOB=pool.shape[1], OFFSET=layout.w2_offset(h.dtype),
        A=A, CHOICES=power_of_two(A), **tile.constants(), ABSENT=absent, num_warps=tile.warps,
    )  # fmt: skip
    return y


def check(x: Tensor, shape: tuple[int, int], pool: Tensor, layout: BlobLayout) -> None:
    assert tuple(x.shape) == shape, (x.shape, shape)
    assert pool.dtype == torch.uint8 and pool.is_contiguous() and pool.shape[1] % 16 == 0, pool.shape
    w2 = matrix_fields("w2", (layout.hidden, layout.ffn), layout.spec, layout.w2_offset(x.dtype), x.dtype)
    assert pool.shape[1] >= w2[-1].end, (pool.shape, w2[-1].end)
