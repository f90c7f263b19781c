"""The Triton code of `step.py`: norm, rotation, attention and router of one token.

Each launch takes a few microseconds, so a program's time is that of its loads: all of them should be under
way as soon as possible. Instructions hardly count.

Sums are float32, in an order that the shapes and the position decide. The capacity of the KV cache and the
number of gates are never part of a sum. A stretch of the cache or a gate that a token has no use for gets no
program, or one that ends at once.
"""

import triton
import triton.language as tl

from model.kernels.kv_kernels import load_rows, store_codes
from model.kernels.shared_kernels import rounded


@triton.jit
def fetch(
    target: tl.tensor,  # [COUNT]; either this
    source: tl.tensor,  # [COUNT]  or this is in the host's memory
    COUNT: tl.constexpr,
    WIDE: tl.constexpr,  # a power of two, at least COUNT
    INTERPRETED: tl.constexpr,
) -> None:  # grid [1]
    i = tl.arange(0, WIDE)
    tl.store(target + i, tl.load(source + i, mask=i < COUNT, other=0), mask=i < COUNT)


@triton.jit
def add_and_norm(
    x: tl.tensor,  # [D]
    more: tl.tensor,  # [D]
    weight: tl.tensor,  # [D]
    eps: tl.tensor,  # [1]
    total: tl.tensor,  # [D]
    y: tl.tensor,  # [D]
    D: tl.constexpr,
    WIDE: tl.constexpr,  # a power of two, at least D
    INTERPRETED: tl.constexpr,
) -> None:  # grid [1]
    dtype = y.dtype.element_ty
    i = tl.arange(0, WIDE)
    there = i < D
    wide = tl.load(x + i, mask=there, other=0.0).to(tl.float32)
    wide += tl.load(more + i, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(weight + i, mask=there, other=0.0).to(tl.float32)
    added = rounded(wide, dtype, INTERPRETED)
    tl.store(total + i, added, mask=there)
    wide = added.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) * (1.0 / D) + tl.load(eps))
    normed = rounded(wide * inverse, dtype, INTERPRETED).to(tl.float32)
    tl.store(y + i, rounded(normed * scale, dtype, INTERPRETED), mask=there)


@triton.jit(do_not_specialize=["C"])
def rotate_and_append(
    qkv: tl.tensor,  # [H + 2 G, K]
    cos: tl.tensor,  # [C', K]
    sin: tl.tensor,  # [C', K]
    k: tl.tensor,  # [G, C, K]
    v: tl.tensor,  # [G, C, K]
    k_scales: tl.tensor,  # [G, C] float32, if CODED
    v_scales: tl.tensor,  # [G, C] float32, if CODED
    position: tl.tensor,  # [1]
    queries: tl.tensor,  # [H, K]
    C: tl.tensor,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    CODED: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [H + 2 G]
    """A value's program rotates the key of its head again, and writes NaN if that is not finite. A score of
    -inf would hide it."""
    dtype = qkv.dtype.element_ty
    head = tl.program_id(0)
    row = tl.load(position).to(tl.int64)
    i = tl.arange(0, K)
    key = qkv + tl.where(head < H + G, head, head - G) * K
    turned = tl.load(key + i).to(tl.float32) * tl.load(cos + row * K + i).to(tl.float32)
    turned = rounded(turned, dtype, INTERPRETED).to(tl.float32)
    turned += tl.load(key + (i + K // 2) % K).to(tl.float32) * tl.load(sin + row * K + i).to(tl.float32)
    turned = rounded(turned, dtype, INTERPRETED)
    if head < H:
        tl.store(queries + head * K + i, turned)
    elif head < H + G:
        at = (head - H).to(tl.int64) * C + row
        if CODED:
            store_codes(turned.to(tl.float32), k + at * K, k_scales + at, i)
        else:
            tl.store(k + at * K + i, turned)
    else:
        at = (head - H - G).to(tl.int64) * C + row
        values = tl.load(qkv + head * K + i).to(tl.float32) + turned.to(tl.float32) * 0.0
        if CODED:
            store_codes(values, v + at * K, v_scales + at, i)
        else:
            tl.store(v + at * K + i, values.to(dtype))


@triton.jit(do_not_specialize=["C"])
def attend_stretch(
    q: tl.tensor,  # [G * SHARE, K]
    k: tl.tensor,  # [G, C, K]
    v: tl.tensor,  # [G, C, K]
    k_scales: tl.tensor,  # [G, C] float32, if CODED
    v_scales: tl.tensor,  # [G, C] float32, if CODED
    position: tl.tensor,  # [1]
    sums: tl.tensor,  # [G * SHARE, SPLITS, K] float32
    scales: tl.tensor,  # [G * SHARE, SPLITS, 2] float32
    C: tl.tensor,
    K: tl.constexpr,
    SHARE: tl.constexpr,  # query heads to a kv head
    HEADS: tl.constexpr,  # 16, the fewest that a tensor core multiplies; from SHARE on they are zeros
    TILE: tl.constexpr,  # positions
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,  # of scores, times log2(e)
    CODED: tl.constexpr,  # whether keys and values are codes
    INTERPRETED: tl.constexpr,
) -> None:  # grid [G, SPLITS]
    """For one kv head and one stretch of positions: the sum of 2^(score - largest) times values, the largest
    score, and the sum of 2^(score - largest)."""
    dtype = q.dtype.element_ty
    group, split = tl.program_id(0), tl.program_id(1)
    last = tl.load(position).to(tl.int32)
    tiles = last // TILE + 1
    each = (tiles + SPLITS - 1) // SPLITS
    first = split * each
    if first < tiles:
        h, d, t = tl.arange(0, HEADS), tl.arange(0, K), tl.arange(0, TILE)
        head = group * SHARE + h
        mine = h < SHARE
        queries = tl.load(q + head[:, None] * K + d[None, :], mask=mine[:, None], other=0.0)  # [HEADS, K]
        base = group.to(tl.int64) * C
        k, v, k_scales, v_scales = k + base * K, v + base * K, k_scales + base, v_scales + base
        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        out = tl.zeros([HEADS, K], tl.float32)
        for tile in range(first, tl.minimum(first + each, tiles)):
            row = tile * TILE + t
            there = row <= last  # true of the first row of a stretch
            keys = load_rows(k, k_scales, row, d, there, K, dtype, CODED, INTERPRETED)  # [TILE, K]
            values = load_rows(v, v_scales, row, d, there, K, dtype, CODED, INTERPRETED)  # [TILE, K]
            if INTERPRETED:  # the interpreter multiplies bfloat16's bits; float32 holds the same numbers
                queries, keys, values = queries.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALE  # [HEADS, TILE]
            scores = tl.where(there[None, :], scores, float("-inf"))
            highest = tl.maximum(top, tl.max(scores, axis=1))
            shrink = tl.exp2(top - highest)
            weights = tl.exp2(scores - highest[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            weights = rounded(weights, dtype, INTERPRETED)
            if INTERPRETED:
                weights = weights.to(tl.float32)
            out = tl.dot(weights, values, out * shrink[:, None], input_precision="ieee")
            top = highest
        place = head * SPLITS + split
        tl.store(sums + place[:, None] * K + d[None, :], out, mask=mine[:, None])
        tl.store(scales + place * 2, top, mask=mine)
        tl.store(scales + place * 2 + 1, total, mask=mine)


@triton.jit
def attend_sum(
    sums: tl.tensor,  # [H, SPLITS, K] float32
    scales: tl.tensor,  # [H, SPLITS, 2] float32
    position: tl.tensor,  # [1]
    y: tl.tensor,  # [H, K]
    K: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # grid [H]
    """Add up the stretches of a head. Those that `attend_stretch` left out are not read."""
    head = tl.program_id(0)
    tiles = tl.load(position).to(tl.int32) // TILE + 1
    each = (tiles + SPLITS - 1) // SPLITS
    s, d = tl.arange(0, SPLITS), tl.arange(0, K)
    there = s * each < tiles
    place = head * SPLITS + s
    top = tl.load(scales + place * 2, mask=there, other=float("-inf"))
    total = tl.load(scales + place * 2 + 1, mask=there, other=0.0)
    out = tl.load(sums + place[:, None] * K + d[None, :], mask=there[:, None], other=0.0)  # [SPLITS, K]
    share = tl.exp2(top - tl.max(top, axis=0))
    result = tl.sum(out * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(y + head * K + d, rounded(result, y.dtype.element_ty, INTERPRETED))


@triton.jit
def route(
    x: tl.tensor,  # [D]
    gates: tl.tensor,  # [(1 + d) * E, D] float32
    choice: tl.tensor,  # [2 A + d * E] int32: A weights, as float32; the A ids; d rankings
    D: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least E
    WIDE: tl.constexpr,  # columns at a time
    INTERPRETED: tl.constexpr,
) -> None:  # grid [1 + d]
    """Program 0 chooses for this layer. Each other program ranks the experts of one later layer."""
    layer = tl.program_id(0)
    e, i = tl.arange(0, EXPERTS), tl.arange(0, WIDE)
    real = e < E
    sums = tl.zeros([EXPERTS, WIDE], tl.float32)
    for start in tl.static_range(0, D, WIDE):
        there = start + i < D
        at = (layer * E + e)[:, None] * D + (start + i)[None, :]
        gate = tl.load(gates + at, mask=real[:, None] & there[None, :], other=0.0)
        values = tl.load(x + start + i, mask=there, other=0.0).to(tl.float32)
        sums = tl.fma(gate, values[None, :], sums)
    logits = tl.sum(sums, axis=1)  # [EXPERTS]; never -0, since sums begin with 0
    bits = logits.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the logits
    order = tl.where(real, order, -2147483648)
    ahead = (order[None, :] > order[:, None]) | (
        (order[None, :] == order[:, None]) & (e[None, :] < e[:, None])
    )
    rank = tl.sum(ahead.to(tl.int32), axis=1)  # [EXPERTS], all different
    if layer == 0:
        chosen = rank < A
        largest = tl.max(tl.where(chosen, logits, float("-inf")), axis=0)
        powers = tl.where(chosen, tl.exp(logits - largest), 0.0)
        weights = choice.to(tl.pointer_type(tl.float32), bitcast=True)
        tl.store(weights + rank, powers / tl.sum(powers, axis=0), mask=chosen)
        tl.store(choice + A + rank, e, mask=chosen)
    else:
        tl.store(choice + 2 * A + (layer - 1) * E + rank, e, mask=real)
