"""A step's kernels in plain PyTorch, on any device, and a stand-in for CUDA graphs.

Like the kernels, nothing here reads a number from the device. So both `Recorded` and CUDA can capture a step
of these functions.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.kernels import experts, launching
from model.kernels import step as kernels
from model.kernels.experts import BlobLayout
from model.kv_codes import decode, encode
from model.moe import gated
from model.quant.backends.blocks import Blocks
from model.quant.streams import matrix_fields
from model.rope import Rope
from runtime.gpu.graphs import Work


def fetch(source: Tensor, target: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def add_and_norm(x: Tensor, more: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    total = x + more
    wide = total.float()
    inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return total, (wide * inverse).to(x.dtype) * weight


def rotate_and_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    scales: kernels.Scales = None,
) -> Tensor:
    G, K = k.shape[1], k.shape[3]
    heads = qkv.view(1, -1, 1, K)  # [1, H + 2G, 1, K]
    rope = Rope(cos.index_select(0, position), sin.index_select(0, position))
    key = rope(heads[:, -2 * G : -G])
    value = heads[:, -G:] + 0 * key
    for rows, row, scale in zip((k, v), (key, value), scales or (None, None), strict=True):
        codes, step = (row, None) if scale is None else encode(row)
        rows.index_copy_(2, position, codes)
        if scale is not None and step is not None:
            scale.index_copy_(2, position, step)
    return rope(heads[:, : -2 * G]).reshape(-1, K)


def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor, scales: kernels.Scales = None) -> Tensor:
    G, C, K = k.shape[1:]
    if scales is not None:
        k, v = (decode(codes, scale, q.dtype) for codes, scale in zip((k, v), scales, strict=True))
    seen = torch.arange(C, device=q.device) <= position  # [C]
    k, v = (torch.where(seen[:, None], cached[0], 0) for cached in (k, v))  # [G, C, K] each
    scores = q.view(G, -1, K).float() @ k.float().mT * K**-0.5  # [G, H/G, C]
    weights = torch.where(seen, scores, -torch.inf).softmax(-1).to(q.dtype)
    return (weights @ v).view(1, -1)


def route(x: Tensor, gates: Tensor, experts: int, chosen: int) -> Tensor:
    logits = torch.stack([F.linear(x.float(), gate)[0] for gate in gates.split(experts)])  # [1 + d, E]
    order = logits.argsort(dim=-1, descending=True, stable=True).int()
    weights = logits[0].index_select(0, order[0, :chosen]).softmax(-1)
    return torch.cat([weights.view(torch.int32), order[0, :chosen], order[1:].flatten()])


def experts_by_slot(
    x: Tensor,
    pool: Tensor,
    slots: Tensor,
    weights: Tensor,
    layout: BlobLayout,
    ids: Tensor | None = None,
    absent: bool = False,
) -> Tensor:
    spec, D, ffn = layout.spec, layout.hidden, layout.ffn
    parts = []
    blobs = pool.index_select(0, slots.clamp(min=0) if absent else slots)
    for blob, weight in zip(blobs, weights.to(x.dtype), strict=True):
        products: list[Callable[[Tensor], Tensor]] = []
        for shape, start in (((2 * ffn, D), 0), ((D, ffn), layout.w2_offset(x.dtype))):
            if spec.quantized:
                fields = matrix_fields("", shape, spec, start)
                products.append(Blocks(spec, shape, {field.name[1:]: field.view(blob) for field in fields}))
            else:
                count = shape[0] * shape[1] * x.element_size()
                w = blob[start : start + count].view(x.dtype).view(shape)
                products.append(lambda x, w=w: F.linear(x, w))  # type: ignore[misc]
        parts.append(products[1](gated(x, products[0])) * weight)
    order = (slots if ids is None else ids).argsort()
    outputs = torch.cat(parts)
    if absent:
        outputs = torch.where(slots[:, None] < 0, 0, outputs)
    return reduce(torch.add, outputs.index_select(0, order).split(1))


def use_plain_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let every device have a decoder that calls the functions above."""
    patch.setattr(launching, "unsupported", lambda target, dtype: None)
    patch.setattr(experts, "experts_by_slot", experts_by_slot)
    for function in (fetch, add_and_norm, rotate_and_append, attend, route):
        patch.setattr(kernels, function.__name__, function)


class Recording(TorchDispatchMode):
    """Keeps the operations that PyTorch dispatches, with the tensors that they take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert "local_scalar" not in str(func), "the host reads a number from the device"
        out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        made = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in given]
        if func._schema.is_mutable:
            self.calls.append(lambda: func(*args, **kwargs))
        elif made and not func.name().startswith(("aten::new_empty", "aten::empty")):

            def again() -> None:
                for kept, new in zip(made, tensors(func(*args, **kwargs)), strict=True):
                    kept.copy_(new)

            self.calls.append(again)
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorded:
    """Stands in for CUDA graphs. A replay repeats operations on the same tensors and runs no other Python, so
    work that depends on anything but memory computes the wrong thing."""

    def shared(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def capture(self, work: Work) -> Work:
        with Recording() as recording:
            work()

        def replay() -> None:
            for call in recording.calls:
                call()

        return replay

    def wait(self) -> None: ...
