"""Counting the instructions of a kernel for a T4."""

from dev.t4 import executed

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
        /*0010*/                   IADD3 R0, R0, 0x1, RZ ;   /* 0x0000000100007810 */
        /*0020*/                   FFMA R2, R2, R3, R4 ;     /* 0x0000000302027223 */
        /*0030*/               @P0 BRA 0x20 ;                /* 0xffffffe000000947 */
        /*0040*/              @!P1 BRA 0x10 ;                /* 0xffffffc000009947 */
        /*0050*/                   EXIT ;                    /* 0x000000000000794d */
        /*0060*/                   BRA 0x60;                 /* 0xfffffff000007947 */
"""


def test_loops_are_counted_as_often_as_they_are_taken() -> None:
    assert executed(SASS, (1, 1)) == 7
    assert executed(SASS, (3, 1)) == 7 + 2 * 4
    assert executed(SASS, (1, 5)) == 7 + 4 * 2
    assert executed(SASS, (3, 5)) == 7 + 2 * 4 + 3 * 4 * 2
