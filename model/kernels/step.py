"""The small kernels of a token's step: all of a layer except its products with matrices.

There is one token, and no number that changes from token to token comes from the host. The position is a
tensor on the device. So a step can be captured once as a CUDA graph and replayed for every token.

**What is the same bit for bit.** What a launch works on depends on shapes alone. Neither the capacity of the
KV cache nor what lies in it after the position changes a bit. A gate's logits do not depend on how many gates
`route` is given, so a model without lookahead chooses as one with it.
"""

import math

import torch
from torch import Tensor

from model.kernels.launching import launch, power_of_two, uses_tensor_cores

SPLITS = 32  # stretches of positions: with 8 kv heads 256 programs, two to a multiprocessor
MAX_HEAD_DIM = 256
MAX_SHARE = 16  # query heads to a kv head: the rows that a tensor core multiplies
MAX_EXPERTS = 64  # more would not fit the registers of a program
MAX_HIDDEN = 1 << 15


def unfit(heads: int, kv_heads: int, head_dim: int, hidden: int, experts: int, chosen: int) -> str | None:
    """Why these kernels cannot serve a network of this shape. None if they can.

    A token chooses `chosen` of a layer's `experts`.

    >>> unfit(32, 8, 128, 4096, 8, 2)
    >>> unfit(32, 8, 96, 4096, 8, 2)
    'head_dim 96 is not a power of two from 16 to 256'
    """
    if not 16 <= head_dim <= MAX_HEAD_DIM or head_dim & (head_dim - 1):
        return f"head_dim {head_dim} is not a power of two from 16 to {MAX_HEAD_DIM}"
    if heads % kv_heads or heads // kv_heads > MAX_SHARE:
        return f"{heads} query heads for {kv_heads} kv heads are not 1 to {MAX_SHARE} for each"
    if hidden > MAX_HIDDEN:
        return f"hidden {hidden} is more than {MAX_HIDDEN}"
    if not 1 <= chosen <= experts <= MAX_EXPERTS:
        return f"{chosen} of {experts} experts are not 1 to all of at most {MAX_EXPERTS}"
    return None


def fetch(source: Tensor, target: Tensor) -> None:  # [n] integers each
    """Bring some numbers from page-locked host memory to the device, or from the device to such memory.

    A kernel reads and writes them. A copy would have to wait for the experts that are being copied.
    """
    from model.kernels import step_kernels

    n, wide = target.numel(), power_of_two(target.numel())
    assert source.shape == target.shape == (n,) and source.dtype == target.dtype, (source.shape, target.shape)
    there = source if target.device.type == "cpu" else target
    with torch.cuda.device_of(there):  # `launch` goes by the target, which may be in the host's memory
        warps = min(max(wide // 512, 1), 16)
        launch(step_kernels.fetch, (1,), target, source, COUNT=n, WIDE=wide, num_warps=warps)


def add_and_norm(x: Tensor, more: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream, `x + more` rounded, and its norm, [1, D] each, in one launch.

    The norm is that of `model.mixtral.RMSNorm`: computed in float32, rounded to x's dtype, times the weight,
    and rounded again. weight [D] is in x's dtype, eps [1] float32 on the device.
    """
    from model.kernels import step_kernels

    D = weight.shape[0]
    assert x.shape == more.shape == (1, D) and x.dtype == more.dtype == weight.dtype, (x.shape, x.dtype)
    assert eps.dtype == torch.float32, eps.dtype
    total, y, wide = x.new_empty(1, D), x.new_empty(1, D), power_of_two(D)
    launch(
        step_kernels.add_and_norm, (1,), x.contiguous(), more.contiguous(), weight, eps, total, y,
        D=D, WIDE=wide, num_warps=min(max(wide // 512, 1), 16),
    )  # fmt: skip
    return total, y


Scales = tuple[Tensor, Tensor] | None  # of keys and values in 8 bits


def rotate_and_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, position: Tensor, scales: Scales = None
) -> Tensor:  # -> [H, K]
    """Return the rotated queries of the token at `position`. Write its rotated keys and its values to their
    row of k and v.

    qkv [1, (H + 2G) K] comes from `qkv_proj`. cos and sin [rows, K] are the tables of `model.rope.Rope`, with
    sin negated in its first half. k and v [1, G, C, K] or [G, C, K] are one layer's. All are in one dtype.
    position [1] int64 has to be below C, which is not checked. With `scales`, k and v are codes in int8, as
    `model.kv_codes.encode` makes them, and the two scales [1, G, C] or [G, C] are float32.

    Rounds where `Rope` rounds. A value is NaN where its key is not finite, as in `attention.poisoned`. A
    query that is not finite becomes NaN in `attend`.
    """
    from model.kernels import step_kernels

    G, C, K = layer_shape(k, v, position)
    coded, k_scales, v_scales = scales_of(k, v, scales)
    H = qkv.shape[1] // K - 2 * G
    assert H > 0 and qkv.shape == (1, (H + 2 * G) * K), (qkv.shape, k.shape)
    assert cos.shape == sin.shape and cos.shape[1] == K and cos.is_contiguous() and sin.is_contiguous()
    assert qkv.dtype == cos.dtype == sin.dtype and (coded or qkv.dtype == k.dtype), (qkv.dtype, k.dtype)
    queries = qkv.new_empty(H, K)
    launch(
        step_kernels.rotate_and_append, (H + 2 * G,), qkv.contiguous(), cos, sin,
        k, v, k_scales, v_scales, position, queries, C, H=H, G=G, K=K, CODED=coded, num_warps=1,
    )  # fmt: skip
    return queries


def attend(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, scales: Scales = None
) -> Tensor:  # [H, K] -> [1, H K]
    """Attention of the token at `position` over rows 0 to `position` of k and v, in two launches.

    k, v, position and scales are those of `rotate_and_append`, which has written this token's row. Codes are
    decoded to q's dtype as they are read. Scores, softmax and sums are float32. Probabilities are rounded to
    q's dtype before they multiply values, as in flash attention.

    For each kv head the positions are cut into up to 32 even stretches of whole tiles, one for a program.
    Where they are cut depends on the position alone.
    """
    from model.kernels import step_kernels

    G, C, K = layer_shape(k, v, position)
    coded, k_scales, v_scales = scales_of(k, v, scales)
    H = q.shape[0]
    share, tile = H // G, tile_positions(K, uses_tensor_cores(q))
    assert q.shape == (G * share, K) and share <= MAX_SHARE, (q.shape, k.shape)
    assert coded or q.dtype == k.dtype, (q.dtype, k.dtype)
    sums = q.new_empty(H, SPLITS, K, dtype=torch.float32)
    totals = q.new_empty(H, SPLITS, 2, dtype=torch.float32)
    y = q.new_empty(1, H * K)
    warps, stages = (8, 1) if coded and q.dtype == torch.float32 else (4, 2)  # what fits the registers
    launch(
        step_kernels.attend_stretch, (G, SPLITS), q.contiguous(), k, v, k_scales, v_scales, position,
        sums, totals, C, K=K, SHARE=share, HEADS=MAX_SHARE, TILE=tile, SPLITS=SPLITS,
        SCALE=K**-0.5 * math.log2(math.e), CODED=coded, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch(
        step_kernels.attend_sum, (H,), sums, totals, position, y,
        K=K, TILE=tile, SPLITS=SPLITS, num_warps=4,
    )  # fmt: skip
    return y


def tile_positions(K: int, tensor_cores: bool) -> int:
    """How many positions a program reads at a time: up to 8,192 numbers of keys and as many of values, half
    of that without tensor cores.

    So the shared memory of a multiprocessor holds two such tiles for each of two programs, on every GPU from
    compute capability 8.0 on. Without tensor cores a thread multiplies numbers in its registers, which hold
    no more than half.

    >>> [tile_positions(K, True) for K in (16, 64, 128, 256)]
    [64, 64, 64, 32]
    >>> [tile_positions(K, False) for K in (16, 64, 128, 256)]
    [64, 64, 32, 16]
    """
    return min((1 << (13 if tensor_cores else 12)) // K, 64)


def layer_shape(k: Tensor, v: Tensor, position: Tensor) -> tuple[int, int, int]:
    """G, C and K of one layer's keys and values, for a batch of one."""
    G, C, K = k.shape[-3:]
    assert k.shape == v.shape and k.numel() == G * C * K, (k.shape, v.shape)
    assert k.dtype == v.dtype and k.is_contiguous() and v.is_contiguous(), (k.dtype, v.dtype)
    assert position.shape == (1,) and position.dtype == torch.int64, (position.shape, position.dtype)
    assert 16 <= K <= MAX_HEAD_DIM and K & (K - 1) == 0, K
    return G, C, K


def scales_of(k: Tensor, v: Tensor, scales: Scales) -> tuple[bool, Tensor, Tensor]:
    """Whether k and v are codes, and two tensors to pass as their scales: if they are not, any will do."""
    if scales is None:
        return False, k, v
    for codes, scale in zip((k, v), scales, strict=True):
        assert codes.dtype == torch.int8 and scale.dtype == torch.float32, (codes.dtype, scale.dtype)
        assert scale.shape == codes.shape[:-1] and scale.is_contiguous(), (scale.shape, codes.shape)
    return True, *scales


def route(x: Tensor, gates: Tensor, experts: int, chosen: int) -> Tensor:  # x [1, D] -> [2 A + d E] int32
    """The experts that x goes to, their weights, and a ranking of later layers' experts, in one launch.

    gates [(1 + d) E, D] float32 are the layer's own gate, then the gates of d later layers, which
    `model.router.seen_from` prepares. E = `experts` and A = `chosen`. All results are in one tensor, which
    the host can read in one transfer:

    - A weights, as the bits of float32 numbers: the softmax over the own gate's A largest logits, largest
      first;
    - the ids of these A experts, the lower id first where logits are equal;
    - for each of the d later layers all E experts, likeliest first.

    A logit that is NaN counts as larger than all others, so every id is valid.
    """
    from model.kernels import step_kernels

    R, D = gates.shape
    E, A = experts, chosen
    assert x.shape == (1, D) and gates.is_contiguous() and gates.dtype == torch.float32, gates.dtype
    assert R > 0 and R % E == 0 and 1 <= A <= E <= MAX_EXPERTS, (R, E, A)
    choice = torch.empty(2 * A + R - E, dtype=torch.int32, device=x.device)
    padded = power_of_two(E)
    launch(
        step_kernels.route, (R // E,), x.contiguous(), gates, choice,
        D=D, E=E, A=A, EXPERTS=padded, WIDE=min(gate_columns(padded), power_of_two(D)), num_warps=16,
    )  # fmt: skip
    return choice


def gate_columns(experts: int) -> int:
    """How many inputs of every expert's gate a program of 512 threads reads at a time.

    64 numbers for each thread, all under way at once, cover 4096 inputs of 8 experts. With more than 16
    experts that would spill, so fewer are read.
    """
    return (1 << 15) // experts if experts <= 16 else 256
