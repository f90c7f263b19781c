"""Four products of bytes in each lane, added to a sum: the step that all time is spent in.

There is a way for each kind of processor. All give the same integers, so every processor computes the same
bits. They need the products of two neighbouring bytes to add up to 16 bits: see `rounding`.
"""

from collections.abc import Callable, Collection
from enum import IntEnum
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from model.kernels.cpu.lanes import INTS, LANES, Code, i8, i32, same


class Way(IntEnum):
    """How four products are added up."""

    VNNI_512 = 0
    VNNI_256 = 1
    AVX2 = 2
    GENERIC = 3

    @staticmethod
    def of(features: Collection[str]) -> "Way":
        """The fastest way with these features of a processor, as LLVM names them.

        >>> Way.of({"avx2", "avx512vl", "avx512bw", "avx512vnni"}), Way.of({"avx2"}), Way.of({"neon"})
        (<Way.VNNI_512: 0>, <Way.AVX2: 2>, <Way.GENERIC: 3>)
        """
        if {"avx512vnni", "avx512bw", "avx512vl"} <= {*features}:
            return Way.VNNI_512
        if {"avxvnni", "avx2"} <= {*features}:
            return Way.VNNI_256
        return Way.AVX2 if "avx2" in features else Way.GENERIC


def vnni_512(code: Code, sums: Any, codes: Any, x: Any) -> Any:
    return vnni(code, sums, codes, x)


def vnni_256(code: Code, sums: Any, codes: Any, x: Any) -> Any:
    return in_halves(code, vnni, sums, codes, x)


def vnni(code: Code, sums: Any, codes: Any, x: Any) -> Any:
    """One instruction, for vectors of 8 or 16 lanes."""
    lanes, words = sums.type.count, codes.type
    if llvm.llvm_version_info[0] >= 22:  # before, LLVM called the bytes of a lane an integer
        words = ir.VectorType(i8, 4 * lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    function = code.function(name, sums.type, sums.type, words, words)
    return code.builder.call(
        function, [sums, code.builder.bitcast(codes, words), code.builder.bitcast(x, words)]
    )


def avx2(code: Code, sums: Any, codes: Any, x: Any) -> Any:
    return in_halves(code, pairs, sums, codes, x)


def pairs(code: Code, sums: Any, codes: Any, x: Any) -> Any:
    """Products are added in pairs to 16 bits, then again to 32."""
    b = code.builder
    words, shorts = ir.VectorType(i8, 32), ir.VectorType(ir.IntType(16), 16)
    multiply = code.function("llvm.x86.avx2.pmadd.ub.sw", shorts, words, words)
    add = code.function("llvm.x86.avx2.pmadd.wd", sums.type, shorts, shorts)
    products = b.call(multiply, [b.bitcast(codes, words), b.bitcast(x, words)])
    return b.add(sums, b.call(add, [products, same(shorts, 1)]))


def in_halves(code: Code, work: Callable[..., Any], *vectors: Any) -> Any:
    """`work` on the lower and on the upper half of the vectors, put together again."""
    b, half = code.builder, LANES // 2
    results = []
    for lanes in (range(half), range(half, LANES)):
        chosen = ir.Constant(ir.VectorType(i32, half), list(lanes))
        results.append(work(code, *(b.shuffle_vector(v, v, chosen) for v in vectors)))
    return b.shuffle_vector(*results, ir.Constant(INTS, list(range(LANES))))


def generic(code: Code, sums: Any, codes: Any, x: Any) -> Any:
    """Any processor: byte by byte, in 32 bits. This is the reference for the others."""
    b = code.builder
    for byte in range(4):
        q = b.and_(b.lshr(codes, same(INTS, 8 * byte)), same(INTS, 255))
        v = b.ashr(b.shl(x, same(INTS, 24 - 8 * byte)), same(INTS, 24))
        sums = b.add(sums, b.mul(q, v))
    return sums


DOTS: dict[Way, Callable[[Code, Any, Any, Any], Any]] = {
    Way.VNNI_512: vnni_512, Way.VNNI_256: vnni_256, Way.AVX2: avx2, Way.GENERIC: generic,
}  # fmt: skip
