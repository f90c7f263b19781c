"""Sixteen numbers at a time, in LLVM's intermediate representation: what the kernels of a CPU are written in.

A kernel is Python code that runs once, when the kernel is compiled. It writes instructions: each call of a
`builder`, as `builder.add(a, b)`, appends one to the kernel and returns a name for what it will compute. That
value exists when the kernel runs, not before, so Python's `if` and `+` cannot work with it. A value is
written once and never changes; what changes is in a `variable`.

Python's loops repeat what is written in them: they are unrolled. `Code.loop` makes a loop of the machine.
LLVM cuts vectors of sixteen into vectors of the processor's own width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
i8, i16, i32, i64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
f32 = ir.FloatType()
BYTES = ir.VectorType(i8, LANES)
INTS = ir.VectorType(i32, LANES)
FLOATS = ir.VectorType(f32, LANES)


@dataclass(frozen=True)
class Code:
    """The kernel as it is written so far. Values are those of llvmlite. Addresses are i64."""

    builder: Any

    # Numbers and addresses

    def number(self, value: int) -> Any:
        return ir.Constant(i64, value)

    def plus(self, a: Any, *more: Any) -> Any:
        """The sum of addresses or counts, i64. Python's numbers will do."""
        for b in more:
            if isinstance(b, int) and b == 0:
                continue
            a = self.builder.add(a, self.number(b) if isinstance(b, int) else b)
        return a

    def times(self, a: Any, b: Any) -> Any:
        return self.builder.mul(a, self.number(b) if isinstance(b, int) else b)

    @contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """A loop of the machine over 0 to count - 1."""
        with cgutils.for_range(self.builder, count) as loop:
            yield loop.index

    # Memory

    def load(self, address: Any, kind: Any) -> Any:
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 1

    def prefetch(self, address: Any) -> None:
        """Ask for a cache line to come to the second cache. An address beyond the end does no harm."""
        pointer = i8.as_pointer()
        function = self.function("llvm.prefetch.p0", ir.VoidType(), pointer, i32, i32, i32)
        self.builder.call(function, [self.builder.inttoptr(address, pointer), i32(0), i32(2), i32(1)])

    def variable(self, kind: Any, value: Any) -> Any:
        """A variable that a `loop` can change. It is `value` again whenever the machine comes here, also in
        every round of a loop around it. Read and write it by `builder.load` and `builder.store`."""
        variable = cgutils.alloca_once(self.builder, kind)
        self.builder.store(value, variable)
        return variable

    # Vectors

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of LLVM's, which becomes an instruction or a few, by its name and types."""
        found = self.builder.module.globals.get(name)
        return found or ir.Function(self.builder.module, ir.FunctionType(result, arguments), name)

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        """The same number in every lane."""
        kind = ir.VectorType(value.type, lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, i32(0))
        return self.builder.shuffle_vector(first, first, same(ir.VectorType(i32, lanes), 0))

    def spread(self, address: Any, kind: Any) -> Any:
        """A number of memory in every lane."""
        return self.splat(self.load(address, kind))

    def field(self, words: Any, shift: int, mask: int) -> Any:
        """A bit field of every byte, INTS: (byte >> shift) & mask, for fields that lie within a byte."""
        if shift:
            words = self.builder.lshr(words, same(INTS, shift))
        return self.builder.and_(words, same(INTS, mask * 0x01010101))

    def bytes_to_floats(self, address: Any) -> Any:
        """Sixteen bytes of memory as FLOATS."""
        return self.builder.uitofp(self.builder.zext(self.load(address, BYTES), INTS), FLOATS)

    def to_floats(self, ints: Any) -> Any:
        return self.builder.sitofp(ints, FLOATS)

    def rint(self, x: Any) -> Any:
        """FLOATS to whole numbers, halves to the even one."""
        return self.builder.call(self.function("llvm.rint.v16f32", FLOATS, FLOATS), [x])

    def reduce(self, operation: str, ints: Any) -> Any:
        """The sum ("add") or largest ("umax") of all lanes of INTS."""
        return self.builder.call(self.function(f"llvm.vector.reduce.{operation}.v16i32", i32, INTS), [ints])

    def sum(self, x: Any) -> Any:
        """The sum of all lanes of FLOATS, always in the same order: halves are added, then their halves."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            kind = ir.VectorType(i32, lanes)
            low, high = (ir.Constant(kind, [start + n for n in range(lanes)]) for start in (0, lanes))
            x = self.builder.fadd(
                self.builder.shuffle_vector(x, x, low), self.builder.shuffle_vector(x, x, high)
            )
        return self.builder.extract_element(x, i32(0))

    def largest(self, x: Any) -> Any:
        """The largest lane of FLOATS, none of which is NaN."""
        return self.builder.call(self.function("llvm.vector.reduce.fmax.v16f32", f32, FLOATS), [x])

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once."""
        return self.builder.call(self.function("llvm.fma.v16f32", FLOATS, FLOATS, FLOATS, FLOATS), [a, b, c])


def same(kind: Any, value: float) -> Any:
    """A constant with the same number in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def zero(kind: Any) -> Any:
    return same(kind, 0.0 if kind.element is f32 else 0)
