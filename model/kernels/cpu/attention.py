"""Attention on a CPU, of any rows to any texts: a row's bits depend on nothing but its query and its text.

PyTorch's kernel cuts a prompt into blocks whose size depends on how many tokens are computed at a time. So a
token would get other bits in a prompt than after it. Here each token is a row of its own, with the address of
its text's keys and values and the number of tokens that it sees. It makes no difference which rows are
computed together: those of a prompt, or the next tokens of several texts.

A program computes the query heads of one group for a few rows. It writes out a row's scores, then their
softmax, and then adds up values, 64 tokens at a time, which stay in the first cache meanwhile.

Keys and values in 8 bits are codes with a scale for each token. They become float32 as they are read.
"""

from typing import Any

from llvmlite import ir

from model.kernels.cpu.functions import exp
from model.kernels.cpu.lanes import BYTES, FLOATS, INTS, LANES, Code, f32, i16, i64, same, zero
from model.kernels.cpu.rounding import Scheme
from model.kernels.cpu.texts import CODES, FLOAT16, ROW

ARGUMENTS = ("table", "rows", "tile", "groups", "width", "reach", "queries", "out", "scores")
BLOCK = 64  # tokens whose values stay in the first cache: 16 KiB of 128 numbers each


def attend(code: Code, scheme: Scheme, way: Any, program: Any, arguments: Any) -> None:
    """The heads of one group for up to `tile` rows: program of [tiles of rows, groups]. A scheme's `bits`
    tell the dtype of keys and values, and its `group` is the number of query heads in a group."""
    b, heads = code.builder, scheme.group
    a = {name: code.load(code.plus(arguments, 8 * i), i64) for i, name in enumerate(ARGUMENTS)}
    group = b.urem(program, a["groups"])
    first = code.times(b.udiv(program, a["groups"]), a["tile"])
    left = b.sub(a["rows"], first)
    count = b.select(b.icmp_unsigned("<", left, a["tile"]), left, a["tile"])
    scores = code.plus(a["scores"], code.times(code.times(program, a["reach"]), 4 * heads))
    with code.loop(count) as i:
        row = code.plus(first, i)
        job = code.plus(a["table"], code.times(row, 8 * len(ROW)))
        row_of = {name: code.load(code.plus(job, 8 * n), i64) for n, name in enumerate(ROW)}
        at = code.times(code.times(code.plus(code.times(row, a["groups"]), group), a["width"]), 4 * heads)
        text = Text(code, scheme, a, row_of, scores, group)
        text.score(code.plus(a["queries"], at))
        scales = text.softmax()
        text.add_up(code.plus(a["out"], at), scales)


class Text:
    """One row's text, for the code of a program."""

    def __init__(
        self, code: Code, scheme: Scheme, a: dict[str, Any], row: dict[str, Any], scores: Any, group: Any
    ) -> None:
        self.code, self.heads, self.kind = code, range(scheme.group), scheme.bits
        self.width, self.reach, self.length = a["width"], a["reach"], row["length"]
        self.scores, self.row = scores, row
        self.offset = code.times(row["stride"], group)
        self.bytes = 1 if self.kind == CODES else 2  # of a number
        self.chunks = code.builder.udiv(self.width, code.number(LANES))

    def score(self, queries: Any) -> None:
        """Write the scores of all heads, and -infinity up to a multiple of 16 tokens."""
        code, b = self.code, self.code.builder
        with code.loop(self.length) as s:
            key = self.token("keys", s)
            sums = [code.variable(FLOATS, zero(FLOATS)) for _ in self.heads]
            with code.loop(self.chunks) as c:
                k = self.numbers(code.plus(key, code.times(c, self.bytes * LANES)))
                for head, total in enumerate(sums):
                    q = code.load(self.chunk_of(queries, head, c), FLOATS)
                    b.store(code.multiply_add(q, k, b.load(total)), total)
            for head, total in enumerate(sums):
                score = code.sum(b.load(total))
                if self.kind == CODES:
                    score = b.fmul(score, code.load(self.scale_at("key_scales", s), f32))
                code.store(score, self.score_at(head, s))
        rest = b.and_(b.sub(code.number(0), self.length), code.number(LANES - 1))
        with code.loop(rest) as s:
            for head in self.heads:
                nothing = ir.Constant(f32, float("-inf"))
                code.store(nothing, self.score_at(head, code.plus(self.length, s)))

    def softmax(self) -> list[Any]:
        """Replace scores by their exponentials. Returns what scales each head's sum to 1."""
        code, b = self.code, self.code.builder
        vectors = b.udiv(code.plus(self.length, LANES - 1), code.number(LANES))
        scales = []
        for head in self.heads:
            most = code.variable(FLOATS, same(FLOATS, float("-inf")))
            with code.loop(vectors) as v:
                x = code.load(self.score_at(head, code.times(v, LANES)), FLOATS)
                b.store(b.select(b.fcmp_ordered(">", x, b.load(most)), x, b.load(most)), most)
            largest = code.splat(code.largest(b.load(most)))
            total = code.variable(FLOATS, zero(FLOATS))
            with code.loop(vectors) as v:
                at = self.score_at(head, code.times(v, LANES))
                y = exp(code, b.fsub(code.load(at, FLOATS), largest))
                code.store(y, at)
                b.store(b.fadd(b.load(total), y), total)
            scales.append(code.splat(b.fdiv(ir.Constant(f32, 1.0), code.sum(b.load(total)))))
        return scales

    def add_up(self, out: Any, scales: list[Any]) -> None:
        """Write the weighted sum of the values for each head."""
        code, b = self.code, self.code.builder
        with code.loop(self.chunks) as c:
            for head in self.heads:
                code.store(zero(FLOATS), self.chunk_of(out, head, c))
        blocks = b.udiv(code.plus(self.length, BLOCK - 1), code.number(BLOCK))
        with code.loop(blocks) as block:
            start = code.times(block, BLOCK)
            left = b.sub(self.length, start)
            count = b.select(b.icmp_unsigned("<", left, code.number(BLOCK)), left, code.number(BLOCK))
            with code.loop(self.chunks) as c:
                sums = [
                    code.variable(FLOATS, code.load(self.chunk_of(out, head, c), FLOATS))
                    for head in self.heads
                ]
                with code.loop(count) as i:
                    s = code.plus(start, i)
                    at = code.plus(self.token("values", s), code.times(c, self.bytes * LANES))
                    v = self.numbers(at)
                    if self.kind == CODES:
                        v = b.fmul(v, code.spread(self.scale_at("value_scales", s), f32))
                    for head, total in enumerate(sums):
                        weight = code.spread(self.score_at(head, s), f32)
                        b.store(code.multiply_add(weight, v, b.load(total)), total)
                for head, total in enumerate(sums):
                    code.store(b.load(total), self.chunk_of(out, head, c))
        with code.loop(self.chunks) as c:
            for head, scale in enumerate(scales):
                at = self.chunk_of(out, head, c)
                code.store(b.fmul(code.load(at, FLOATS), scale), at)

    def token(self, name: str, s: Any) -> Any:
        """Where a token's keys or values of this group are."""
        past = self.code.times(self.code.times(s, self.width), self.bytes)
        return self.code.plus(self.row[name], self.offset, past)

    def scale_at(self, name: str, s: Any) -> Any:
        """Where the scale of a token's codes of this group is. One scale stands for a row of codes."""
        past = self.code.builder.udiv(self.offset, self.width)
        return self.code.plus(self.row[name], self.code.times(self.code.plus(past, s), 4))

    def numbers(self, address: Any) -> Any:
        """Sixteen numbers as FLOATS, codes without their scale."""
        code, b = self.code, self.code.builder
        if self.kind == CODES:
            return code.to_floats(b.sext(code.load(address, BYTES), INTS))
        if self.kind == FLOAT16:
            return b.fpext(code.load(address, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        words = b.zext(code.load(address, ir.VectorType(i16, LANES)), INTS)
        return b.bitcast(b.shl(words, same(INTS, 16)), FLOATS)

    def score_at(self, head: int, s: Any) -> Any:
        return self.code.plus(
            self.scores, self.code.times(self.code.plus(s, self.code.times(self.reach, head)), 4)
        )

    def chunk_of(self, start: Any, head: int, c: Any) -> Any:
        """Where chunk c of a head's float32 numbers is."""
        place = self.code.plus(self.code.times(c, LANES), self.code.times(self.width, head))
        return self.code.plus(start, self.code.times(place, 4))
