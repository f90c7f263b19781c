"""The tiles of the kernels for GPUs, for any matrix that there may be."""

from hypothesis import given
from hypothesis import strategies as st

from model.kernels.matrices import Expansion, FewRows, OneRow
from model.quant.spec import QuantSpec

SPECS = st.builds(QuantSpec, st.sampled_from((8, 4, 3, 2)), st.sampled_from([1 << i for i in range(4, 13)]))


@given(SPECS, st.integers(1, 2000), st.integers(1, 2000))
def test_tiles_cover_any_matrix(spec: QuantSpec, sixteens: int, groups: int) -> None:
    N, K = 16 * sixteens, groups * spec.group_size
    one = OneRow.pick(K, spec.bits, spec.group_size)
    few = FewRows.pick(N, K, spec.bits, spec.group_size)
    many = Expansion.pick(K, spec.group_size)
    assert N % one.rows == N % few.rows == N % many.rows == 0
    for size in (one.groups, one.warps, few.pieces, few.piece, few.splits, many.groups):
        assert size > 0 and size & (size - 1) == 0  # powers of two, as Triton wants
    assert one.groups * spec.group_size <= max(8192, spec.group_size)
    run = spec.group_size // 8 * (1 if spec.bits == 3 else spec.bits)
    assert run % few.piece == 0 and few.pieces * few.piece >= 16  # the least that a tensor core adds up
