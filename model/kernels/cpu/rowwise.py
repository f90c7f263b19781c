"""What is computed row by row on a CPU, beside products: attention and the router's logits. A row has the
same bits alone and among others."""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.kernels.cpu import launching
from model.kernels.cpu.rounding import Scheme
from model.kernels.cpu.texts import BFLOAT16, CODES, FLOAT16, ROW
from model.quant.spec import ROWS as LANES

KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
HEADS = 8  # of a group, at most: a program keeps a sum for each in registers
PROGRAMS = 64  # of a prompt: enough for many threads, and few scores in memory
PLAIN = Scheme(32, 1)  # float32

# Keys and values [G, C, K] of a text, in the dtype of the queries, the tokens of a group one after the other;
# and for how many tokens after which of its tokens there are queries.
Text = tuple[Tensor, Tensor, int, int]
Scales = tuple[Tensor, Tensor]  # [G, C] float32 each, of a text's keys and values if these are codes


def takes(dtype: torch.dtype, device: torch.device, width: int, heads: int = 1) -> bool:
    """Whether the kernels compute in `dtype` on this device, with numbers of a multiple of 16 in a row and
    `heads` query heads in a group."""
    shapes = width % LANES == 0 and heads <= HEADS
    return device.type == "cpu" and dtype in KINDS and shapes and launching.unsupported() is None


def kernels(dtype: torch.dtype, heads: int, kv_bits: int = 16) -> list[Callable[[], object]]:
    """Calls that each compile a kernel, or find it compiled."""
    from model.kernels.cpu import compiling

    return [
        lambda: compiling.kernel("attend", Scheme(CODES if kv_bits == 8 else KINDS[dtype], heads)),
        lambda: compiling.kernel("route", PLAIN),
    ]


def attend_rows(
    q: Tensor, texts: Sequence[Text], scales: Sequence[Scales] | None = None
) -> Tensor:  # [M, H, K] -> [M, H, K]
    """Attention of the queries of several texts, one text's after the other's. The rows of a text
    (k, v, past, T) are its tokens `past` to `past + T - 1`, and each sees all tokens up to its own. If each
    text has `scales`, keys and values are codes of `model.kv_codes`."""
    (M, H, K), G = q.shape, texts[0][0].shape[0]
    wide = (q.float() * K**-0.5).contiguous()
    out, reach = torch.empty_like(wide), filled_up(max(past + T for *_, past, T in texts))
    tile = -(-M // tiles(G))
    count = -(-M // tile) * G
    scores = wide.new_empty(count * H // G * reach)
    values: list[int] = []
    for n, (k, v, past, T) in enumerate(texts):
        of = (0, 0) if scales is None else tuple(scale.data_ptr() for scale in scales[n])
        assert scales is None or all(s.stride() == (k.stride(0) // K, 1) for s in scales[n])
        where = k.data_ptr(), v.data_ptr(), *of, k.stride(0) * k.element_size()
        for seen in range(past + 1, past + T + 1):
            values += (*where, seen)
    table = launching.numbers(values)
    arguments = (
        ctypes.addressof(table), M, tile, G, K, reach, wide.data_ptr(), out.data_ptr(), scores.data_ptr(),
    )  # fmt: skip
    work = 2 * H * K * sum(values[len(ROW) - 1 :: len(ROW)])
    kind = KINDS[q.dtype] if scales is None else CODES
    launching.launch("attend", Scheme(kind, H // G), count, arguments, work)
    return out.to(q.dtype)


def tiles(groups: int) -> int:
    """Into how many parts the rows are cut, at most."""
    return max(PROGRAMS // groups, 1)


def attend_bytes(M: int, H: int, G: int, K: int, S: int) -> int:
    """What `attend_rows` allocates beside its result, for rows that see up to S tokens."""
    return 2 * M * H * K * 4 + min(tiles(G), M) * H * filled_up(S) * 4


def filled_up(tokens: int) -> int:
    """A number of scores that whole vectors hold."""
    return -(-tokens // LANES) * LANES


def route(x: Tensor, gates: Tensor) -> Tensor:  # [N, D], [E, D] float32 -> [N, E]
    """`x @ gates.T`."""
    (N, D), E = x.shape, len(gates)
    x, out = x.contiguous(), x.new_empty(N, E)
    launching.launch("route", PLAIN, N, (x.data_ptr(), gates.data_ptr(), out.data_ptr(), D, E), N * E * D)
    return out
