"""The tiles of the kernels for GPUs, for any matrix that there may be."""

from hypothesis import given
from hypothesis import strategies as st

from model.kernels.matrices import FewRows, OneRow

BITS = st.sampled_from((8, 4, 3, 2))


@given(BITS, st.integers(1, 2000), st.integers(1, 2000))
def test_tiles_cover_any_matrix(bits: int, blocks: int, words: int) -> None:
    N, K = 16 * blocks, 32 * words
    one = OneRow.pick(N, K, bits)
    few, fewer = (FewRows.pick(N, K, tensor_cores) for tensor_cores in (True, False))
    assert N % one.rows == one.rows % 16 == 0
    for tile in (few, fewer):
        assert N % tile.rows == tile.rows % 16 == 0
    sizes = [size for tile in (one, few, fewer) for size in vars(tile).values()]
    for size in sizes:
        assert size > 0 and size & (size - 1) == 0  # powers of two, as Triton wants
    assert K % one.piece == 0 == one.piece % 32  # whole words, also of high bits
    assert one.piece * one.pieces <= 4096 and (one.pieces == 64 or one.piece * one.pieces >= K)
    # Words that a thread holds, of 4 rows each: those of a round, and of the next one if there is one.
    words_held = one.rows // 16 * one.piece * bits // 32 * (1 if one.piece * one.pieces >= K else 2)
    assert words_held <= 16
