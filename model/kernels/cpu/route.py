"""A router's logits on a CPU: a row's bits do not depend on how many rows there are."""

from typing import Any

from model.kernels.cpu.lanes import FLOATS, LANES, Code, i64, zero
from model.kernels.cpu.rounding import Scheme

ARGUMENTS = ("x", "gates", "out", "inputs", "experts")


def route(code: Code, scheme: Scheme, way: Any, program: Any, arguments: Any) -> None:
    """The logits of row `program`, all float32."""
    b = code.builder
    a = {name: code.load(code.plus(arguments, 8 * i), i64) for i, name in enumerate(ARGUMENTS)}
    x = code.plus(a["x"], code.times(code.times(program, a["inputs"]), 4))
    with code.loop(a["experts"]) as e:
        gate = code.plus(a["gates"], code.times(code.times(e, a["inputs"]), 4))
        total = code.variable(FLOATS, zero(FLOATS))
        with code.loop(b.udiv(a["inputs"], code.number(LANES))) as c:
            values, weights = (code.load(code.plus(v, code.times(c, 4 * LANES)), FLOATS) for v in (x, gate))
            b.store(code.multiply_add(values, weights, b.load(total)), total)
        place = code.plus(code.times(program, a["experts"]), e)
        code.store(code.sum(b.load(total)), code.plus(a["out"], code.times(place, 4)))
