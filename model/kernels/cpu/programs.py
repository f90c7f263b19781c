"""The kernels of a CPU: each computes one program of a grid, like those of a GPU.

`launching.launch` calls `kernel(program, arguments)` for every program of a grid. `arguments` is the address
of an array of int64: sizes, and addresses of other arrays. Work on several matrices at a time is listed as
jobs.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from model.kernels.cpu import tile
from model.kernels.cpu.attention import attend
from model.kernels.cpu.dots import Way
from model.kernels.cpu.functions import silu
from model.kernels.cpu.lanes import FLOATS, INTS, LANES, Code, f32, i8, i32, i64, same, zero
from model.kernels.cpu.rounding import TILE, Scheme
from model.kernels.cpu.route import route
from model.quant.packing import PLANES

# The fields of a job, int64 each: a matrix, rounded activations, and where the product goes.
JOB = ("codes", "codes_high", "scales", "zeros", "steps", "x", "x_low", "x_scales", "x_sums", "rows", "out")
# The arguments of `product` and `gate_up`. `height` is N, or F; `meta` is the binary logarithm of META.
ARGUMENTS = ("jobs", "blocks", "inputs", "groups", "meta", "height")
# The arguments of `round_rows`: x [rows, inputs] float32, and what becomes of it. `tile` is the most rows of
# a tile.
ROUNDING = ("source", "inputs", "rows", "tile", "x", "x_low", "x_scales", "x_sums")

Compute = Callable[[tile.Activations, int, Any], None]  # a tile of m rows, m, and the number of its first row

FINITE = 0x7F800000  # the bits of the first float32 that is not
SMALLEST = 2.0**-100  # a unit whose largest value is smaller becomes 0


def product(code: Code, scheme: Scheme, way: Way, program: Any, arguments: Any) -> None:
    """A block of a matrix times all rows of x: one job's program of [jobs * blocks]."""
    a = read(code, arguments, ARGUMENTS)
    job, number = read_job(code, a, program)
    block = block_at(code, scheme, a, job, number)

    def compute(x: tile.Activations, m: int, row: Any) -> None:
        sums = tile.multiply(code, scheme, way, block, x, m, a["groups"], a["meta"])
        for i, y in enumerate(sums):
            code.store(y, out_at(code, a, job, row, i, number))

    over_tiles(code, scheme, a, job, compute)


def gate_up(code: Code, scheme: Scheme, way: Way, program: Any, arguments: Any) -> None:
    """silu(w1 x) * w3 x for a block of w1 and the same one of w3, which follows w1 in the matrix."""
    a = read(code, arguments, ARGUMENTS)
    job, number = read_job(code, a, program)
    w1 = block_at(code, scheme, a, job, number)
    w3 = block_at(code, scheme, a, job, code.plus(number, a["blocks"]))

    def compute(x: tile.Activations, m: int, row: Any) -> None:
        gate = tile.multiply(code, scheme, way, w1, x, m, a["groups"], a["meta"])
        up = tile.multiply(code, scheme, way, w3, x, m, a["groups"], a["meta"])
        for i in range(m):
            h = code.builder.fmul(silu(code, gate[i]), up[i])
            code.store(h, out_at(code, a, job, row, i, number))

    over_tiles(code, scheme, a, job, compute)


def read(code: Code, address: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The int64 at `address` and after it, by name."""
    return {name: code.load(code.plus(address, 8 * i), i64) for i, name in enumerate(names)}


def read_job(code: Code, a: dict[str, Any], program: Any) -> tuple[dict[str, Any], Any]:
    """The job of a program, and which block of its matrix."""
    b = code.builder
    address = code.plus(a["jobs"], code.times(b.udiv(program, a["blocks"]), 8 * len(JOB)))
    return read(code, address, JOB), b.urem(program, a["blocks"])


def block_at(code: Code, scheme: Scheme, a: dict[str, Any], job: dict[str, Any], number: Any) -> tile.Block:
    """Where the streams of block `number` of a job's matrix begin."""
    b = code.builder
    last = code.plus(b.shl(code.number(1), a["meta"]), -1)
    steps = b.lshr(code.plus(a["groups"], last), a["meta"])  # of a row, rounded up

    def at(name: str, size: Any) -> Any:
        return code.plus(job[name], code.times(number, size))

    streams = zip(("codes", "codes_high"), PLANES[scheme.bits], strict=False)
    return tile.Block(
        [at(name, code.times(a["inputs"], 2 * width)) for name, width in streams],
        at("scales", code.times(a["groups"], LANES)),
        at("zeros", code.times(a["groups"], LANES)),
        at("steps", code.times(steps, 4 * LANES)),
    )


def out_at(code: Code, a: dict[str, Any], job: dict[str, Any], row: Any, i: int, number: Any) -> Any:
    """Where the product of a block and row `row` + i goes, in [rows, height] float32."""
    place = code.plus(code.times(code.plus(row, i), a["height"]), code.times(number, LANES))
    return code.plus(job["out"], code.times(place, 4))


def over_tiles(code: Code, scheme: Scheme, a: dict[str, Any], job: dict[str, Any], compute: Compute) -> None:
    """`compute` for each tile of a job's rows: as many tiles of `TILE` rows as there are, then 4, 2 and 1.

    `compute` is called here, in Python, once for each size: it writes the code for tiles of that size.
    """
    b = code.builder
    units = b.udiv(a["inputs"], code.number(scheme.unit))

    def at(row: Any, m: int) -> None:
        x = [job["x"], job["x_low"]][: scheme.planes]
        activations = tile.Activations(
            [code.plus(plane, code.times(row, a["inputs"])) for plane in x],
            code.plus(job["x_scales"], code.times(code.times(row, units), 4)),
            code.plus(job["x_sums"], code.times(code.times(row, a["groups"]), 4)),
        )
        compute(activations, m, row)

    whole = b.udiv(job["rows"], code.number(TILE))
    with code.loop(whole) as index:
        at(code.times(index, TILE), TILE)
    row, m = code.times(whole, TILE), TILE // 2
    while m:
        rest = b.and_(job["rows"], code.number(m))
        with b.if_then(b.icmp_unsigned("!=", rest, code.number(0))):
            at(row, m)
        row, m = code.plus(row, rest), m // 2


def round_rows(code: Code, scheme: Scheme, way: Way, program: Any, arguments: Any) -> None:
    """Row `program` of x, rounded as `rounding` says. A unit with a value that is not finite has the scale
    NaN."""
    b = code.builder
    a = read(code, arguments, ROUNDING)
    first, m = tile_of(code, program, a["rows"], a["tile"])
    i = b.sub(program, first)
    units = b.udiv(a["inputs"], code.number(scheme.unit))
    count = scheme.group // scheme.unit
    groups = b.udiv(units, code.number(count))
    source = code.plus(a["source"], code.times(code.times(program, a["inputs"]), 4))
    planes = [code.plus(a[name], code.times(first, a["inputs"])) for name in ("x", "x_low")[: scheme.planes]]
    scales = code.plus(a["x_scales"], code.times(code.plus(code.times(first, units), i), 4))
    sums = code.plus(a["x_sums"], code.times(code.plus(code.times(first, groups), i), 4))
    with code.loop(groups) as g:
        total = code.variable(f32, ir.Constant(f32, 0.0))
        with code.loop(code.number(count)) as u:
            number = code.plus(code.times(g, count), u)
            start = code.times(number, scheme.unit)
            values = [
                code.load(code.plus(source, code.times(start, 4), 4 * LANES * j), FLOATS)
                for j in range(scheme.unit // LANES)
            ]
            d, integers = round_unit(code, scheme, values)
            added = zero(INTS)
            for j, q in enumerate(integers):
                added = b.add(added, q)
                for plane, part in zip(planes, split(code, scheme, q), strict=True):
                    place = code.plus(code.times(start, m), code.times(i, 4), code.times(m, LANES * j))
                    scatter(code, part, code.plus(plane, place), code.times(m, 4))
            code.store(d, code.plus(scales, code.times(code.times(number, m), 4)))
            n = b.sitofp(code.reduce("add", added), f32)
            b.store(b.fadd(b.load(total), b.fmul(n, d)), total)
        code.store(b.load(total), code.plus(sums, code.times(code.times(g, m), 4)))


def tile_of(code: Code, row: Any, rows: Any, largest: Any) -> tuple[Any, Any]:
    """The first row of a row's tile, and how many rows the tile has."""
    b = code.builder
    first = code.times(b.udiv(row, largest), largest)
    m = largest
    size = TILE
    while size > 1:  # a tile that has too few rows left is cut in halves
        cut = b.and_(
            b.icmp_unsigned("==", m, code.number(size)), b.icmp_unsigned(">", code.plus(first, m), rows)
        )
        half = code.number(size // 2)
        m = b.select(cut, half, m)
        second = code.plus(first, half)
        first = b.select(b.and_(cut, b.icmp_unsigned(">=", row, second)), second, first)
        size //= 2
    return first, m


def round_unit(code: Code, scheme: Scheme, values: list[Any]) -> tuple[Any, list[Any]]:
    """The scale of a unit, float32, and its integers, INTS each."""
    b = code.builder
    magnitudes = [b.and_(b.bitcast(v, INTS), same(INTS, 0x7FFFFFFF)) for v in values]
    bits = magnitudes[0]
    for other in magnitudes[1:]:  # magnitudes of floats are ordered as their bits are; NaN is above all
        bits = b.select(b.icmp_unsigned(">", other, bits), other, bits)
    bits = code.reduce("umax", bits)
    finite = b.icmp_unsigned("<", bits, ir.Constant(i32, FINITE))
    largest = b.bitcast(bits, f32)
    top = ir.Constant(f32, float(scheme.top))
    usable = b.and_(finite, b.fcmp_ordered(">=", largest, ir.Constant(f32, SMALLEST)))
    inverse = b.select(usable, b.fdiv(top, largest), ir.Constant(f32, 0.0))
    d = b.select(usable, b.fdiv(largest, top), ir.Constant(f32, 0.0))
    d = b.select(finite, d, ir.Constant(f32, float("nan")))
    multiplier, keep = code.splat(inverse), code.splat(finite)
    kept = [b.select(keep, v, zero(FLOATS)) for v in values]
    return d, [b.fptosi(code.rint(b.fmul(v, multiplier)), INTS) for v in kept]


def split(code: Code, scheme: Scheme, q: Any) -> list[Any]:
    """The planes of integers, the high one first: INTS that fit into bytes."""
    b = code.builder
    if scheme.planes == 1:
        return [q]
    shift = same(INTS, scheme.LOW_BITS)
    high = b.ashr(b.add(q, same(INTS, 1 << scheme.LOW_BITS - 1)), shift)
    return [high, b.sub(q, b.shl(high, shift))]


def scatter(code: Code, q: Any, address: Any, distance: Any) -> None:
    """Store sixteen bytes, four at a time, `distance` bytes apart."""
    b = code.builder
    words = b.bitcast(b.trunc(q, ir.VectorType(i8, LANES)), ir.VectorType(i32, 4))
    for k in range(4):
        code.store(b.extract_element(words, i32(k)), code.plus(address, code.times(distance, k)))


KERNELS = (product, gate_up, round_rows, attend, route)
NAMES = [kernel.__name__ for kernel in KERNELS]


@intrinsic(prefer_literal=True)
def run_program(typing_context, kernel, bits, group, way, program, arguments):  # type: ignore[no-untyped-def]
    """One program of a kernel. The first four arguments are literals, by which the kernel is written."""

    def codegen(context, builder, signature, values):  # type: ignore[no-untyped-def]
        scheme = Scheme(bits.literal_value, group.literal_value)
        write = KERNELS[kernel.literal_value]
        write(Code(builder), scheme, Way(way.literal_value), values[4], values[5])
        return context.get_dummy_value()

    return types.void(kernel, bits, group, way, program, arguments), codegen


@intrinsic
def call_program(typing_context, kernel, program, arguments):  # type: ignore[no-untyped-def]
    """Call the kernel at this address."""

    def codegen(context, builder, signature, values):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [i64, i64])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(kernel, program, arguments), codegen


@intrinsic
def take(typing_context, counter, count):  # type: ignore[no-untyped-def]
    """Add `count` to the int64 at the address `counter`. Returns what it was, which no other thread gets."""

    def codegen(context, builder, signature, values):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(values[0], i64.as_pointer())
        return builder.atomic_rmw("add", pointer, values[1], "monotonic")

    return types.int64(counter, count), codegen
