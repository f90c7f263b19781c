"""Functions of sixteen numbers that have no instruction."""

from typing import Any

from model.kernels.cpu.lanes import FLOATS, INTS, Code, same


def silu(code: Code, x: Any) -> Any:
    """x / (1 + exp(-x)), with a relative error of about 1e-7."""
    b = code.builder
    return b.fdiv(x, b.fadd(same(FLOATS, 1.0), exp(code, b.fneg(x))))


def exp(code: Code, y: Any) -> Any:
    """exp(y), with a relative error of about 1e-7. It is 0 below -88, and infinity above 89 or of NaN.

    exp(y) = 2^n * exp(r), where n is y / ln 2 to the nearest integer, and exp(r) is a polynomial (Cephes'
    expf).
    """
    b = code.builder
    least, most = same(FLOATS, -88.0), same(FLOATS, 89.0)
    # At the limits 2^n is 0 and infinity already. The bits of a larger n would be those of other numbers.
    y = b.select(b.fcmp_ordered("<", y, most), y, most)
    y = b.select(b.fcmp_ordered(">", y, least), y, least)
    n = code.rint(b.fmul(y, same(FLOATS, 1.44269504088896341)))
    r = code.multiply_add(n, same(FLOATS, -0.693359375), y)
    r = code.multiply_add(n, same(FLOATS, 2.12194440e-4), r)
    p = same(FLOATS, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = code.multiply_add(p, r, same(FLOATS, c))
    p = code.multiply_add(b.fmul(p, r), r, b.fadd(r, same(FLOATS, 1.0)))
    exponent = b.shl(b.add(b.fptosi(n, INTS), same(INTS, 127)), same(INTS, 23))
    return b.fmul(p, b.bitcast(exponent, FLOATS))
