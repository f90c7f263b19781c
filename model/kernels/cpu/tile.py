"""Sixteen rows of a quantized matrix times a few rows of activations: the inner part of every kernel of a
CPU.

The lanes of a vector are the rows of a block (`model.quant.packing`). One lane multiplies four neighbouring
codes of its row with the same four activations, and adds the products to an integer. Integers become floats
at the end of each unit, then meet the activations' scale, and at the end of each group the weights' scale
and zero:

    y = sum over groups of  s * (sum over units of d * n)  -  z * s * e

n is the integer of a unit, d the scale of its activations, s and z the group's scale and zero. e is the sum
of the group's activations after rounding: the exact sum would not cancel what the rounding did to n.

The order of these operations does not depend on how many rows of activations there are, nor on the processor.
So one row gets the same bits alone and among others, everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from model.kernels.cpu.dots import DOTS, Way
from model.kernels.cpu.lanes import FLOATS, INTS, LANES, Code, f32, i32, same, zero
from model.kernels.cpu.rounding import Scheme
from model.quant.packing import PLANES

AHEAD = 8192  # bytes, two pages: a processor's own prefetcher stops where a page of memory ends
STRETCH = 32  # codes that are unrolled for several rows of x
PAIR = 32  # codes in a word of a 3-bit matrix's high plane; K is a multiple of it


@dataclass(frozen=True)
class Block:
    """Addresses of the streams of sixteen rows of a matrix, as i64. `planes` begins with the low one."""

    planes: Sequence[Any]
    scales: Any
    zeros: Any
    steps: Any


@dataclass(frozen=True)
class Activations:
    """Addresses of m rows that `rounding` has rounded, as i64."""

    planes: Sequence[Any]  # [K / 4, m, 4] int8 each; the high one first
    scales: Any  # [units, m] float32
    sums: Any  # [J, m] float32


def multiply(
    code: Code, scheme: Scheme, way: Way, block: Block, x: Activations, m: int, groups: Any, meta: Any
) -> list[Any]:
    """The m products of a block with m rows of x, FLOATS each. `groups` is J, and a step serves 2 ** `meta`
    groups of a row."""
    b = code.builder
    sums = [code.variable(FLOATS, zero(FLOATS)) for _ in range(m)]

    def finish_group(g: Any, totals: list[Any]) -> None:
        step = code.load(code.plus(block.steps, code.times(b.lshr(g, meta), 4 * LANES)), FLOATS)
        scale = b.fmul(code.bytes_to_floats(code.plus(block.scales, code.times(g, LANES))), step)
        zeros = code.bytes_to_floats(code.plus(block.zeros, code.times(g, LANES)))
        shift = b.fmul(b.fmul(zeros, same(FLOATS, -1 / 2 ** (8 - scheme.bits))), scale)
        for i, total in enumerate(totals):
            e = code.spread(code.plus(x.sums, code.times(g, 4 * m), 4 * i), f32)
            y = code.multiply_add(total, scale, b.load(sums[i]))
            b.store(code.multiply_add(shift, e, y), sums[i])

    if scheme.group < PAIR:  # two groups share a word of the high plane
        with code.loop(b.lshr(groups, code.number(1))) as pair:
            words = [code.plus(plane, code.times(pair, PAIR * 2 * w)) for plane, w in planes(scheme, block)]
            for half in (0, 1):
                g = code.plus(code.times(pair, 2), half)
                finish_group(g, unit(code, scheme, way, words, x, m, g, PAIR // 2 * half, None))
    else:
        count = scheme.group // scheme.unit
        with code.loop(groups) as g:
            totals = [code.variable(FLOATS, zero(FLOATS)) for _ in range(m)]
            with code.loop(code.number(count)) as u:
                number = code.plus(code.times(g, count), u)
                words = [
                    code.plus(plane, code.times(number, scheme.unit * 2 * w))
                    for plane, w in planes(scheme, block)
                ]
                before = [b.load(total) for total in totals]
                for total, value in zip(
                    totals, unit(code, scheme, way, words, x, m, number, 0, before), strict=True
                ):
                    b.store(value, total)
            finish_group(g, [b.load(total) for total in totals])
    return [b.load(total) for total in sums]


def planes(scheme: Scheme, block: Block) -> list[tuple[Any, int]]:
    """The address of each plane of codes, and its width in bits. A code takes 2 * width bytes in a block."""
    return list(zip(block.planes, PLANES[scheme.bits], strict=True))


def unit(
    code: Code, scheme: Scheme, way: Way, words: list[Any], x: Activations, m: int, number: Any, first: int,
    before: list[Any] | None,
) -> list[Any]:  # fmt: skip
    """`before` + d * n for each row of x: a unit of activations with one scale.

    `words` are the addresses of each plane's words, and the unit begins `first` codes after them.
    """
    b = code.builder
    values = [code.plus(plane, code.times(number, scheme.unit * m)) for plane in x.planes]
    n = integers(code, scheme, way, words, values, m, first)
    results = []
    for i in range(m):
        high, *low = n[i]
        total = b.add(b.shl(high, same(INTS, scheme.LOW_BITS)), low[0]) if low else high
        d = code.spread(code.plus(x.scales, code.times(number, 4 * m), 4 * i), f32)
        total = code.to_floats(total)
        results.append(code.multiply_add(total, d, before[i]) if before else b.fmul(total, d))
    return results


def integers(
    code: Code, scheme: Scheme, way: Way, words: list[Any], values: list[Any], m: int, first: int
) -> list[list[Any]]:
    """The sums of products of a unit, INTS for each row and each of its planes, which begin at `values`."""
    b = code.builder

    def stretch(sums: list[Any], words: list[Any], values: list[Any], first: int, length: int) -> list[Any]:
        """Add the products of `length` codes to the sums of all rows' planes, in turns to several if there
        are."""
        sums, field, chains = [*sums], fields(code, scheme.bits, words), len(sums) // (m * scheme.planes)
        for k in range(length // 4):
            codes = field(first + 4 * k)
            for i in range(m):
                for p, plane in enumerate(values):
                    four = code.spread(code.plus(plane, 4 * (k * m + i)), i32)
                    place = (i * scheme.planes + p) * chains + k % chains
                    sums[place] = DOTS[way](code, sums[place], codes, four)
        return sums

    count = m * scheme.planes
    if m == 1:  # unrolled, and with two sums, since each product would wait for the one before
        both = stretch([zero(INTS)] * 2 * count, words, values, first, scheme.unit)
        sums = [b.add(*pair) for pair in zip(both[::2], both[1::2], strict=True)]
    elif scheme.unit <= STRETCH:
        sums = stretch([zero(INTS)] * count, words, values, first, scheme.unit)
    else:  # a loop of the machine, which takes LLVM less time to compile
        variables = [code.variable(INTS, zero(INTS)) for _ in range(count)]
        with code.loop(code.number(scheme.unit // STRETCH)) as s:
            here = [
                code.plus(word, code.times(s, STRETCH * 2 * width))
                for word, width in zip(words, PLANES[scheme.bits], strict=True)
            ]
            rows = [code.plus(value, code.times(s, STRETCH * m)) for value in values]
            added = stretch([b.load(v) for v in variables], here, rows, first, STRETCH)
            for variable, value in zip(variables, added, strict=True):
                b.store(value, variable)
        sums = [b.load(variable) for variable in variables]
    return [sums[i * scheme.planes : (i + 1) * scheme.planes] for i in range(m)]


def fields(code: Code, bits: int, words: list[Any]) -> Callable[[int], Any]:
    """A function of k that gives the codes k to k + 3 of every row, INTS. It loads each word once."""
    loaded: dict[tuple[int, int], Any] = {}

    def word(plane: int, width: int, k: int) -> tuple[Any, int]:
        """The word that holds code k, and the bit where the code's field begins."""
        index, inside = divmod(k, 32 // width)
        if (plane, index) not in loaded:
            address = code.plus(words[plane], 4 * LANES * index)
            code.prefetch(code.plus(address, AHEAD))
            loaded[plane, index] = code.load(address, INTS)
        return loaded[plane, index], inside // 4 * width

    def codes(k: int) -> Any:
        b = code.builder
        low, *high = PLANES[bits]
        value = code.field(*word(0, low, k), (1 << low) - 1)
        for width in high:  # of 3 bits
            bit, shift = word(1, width, k)
            move = (
                b.shl(bit, same(INTS, low - shift)) if shift < low else b.lshr(bit, same(INTS, shift - low))
            )
            value = b.or_(value, b.and_(move, same(INTS, (1 << low) * 0x01010101)))
        return value

    return codes
