"""An expert as one run of bytes, its blob: how long it is, how it is filled, and how it is computed from
there.

All experts of a model are alike. So memory is bound to a computation once, and from then on computes whatever
expert has been put there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model.config import ModelConfig
from model.linear import linear
from model.moe import Product, gated, mix
from model.quant.backends import Backend, fused
from model.quant.backends.fused import ExpertForm
from model.quant.product import choose_backend
from model.quant.spec import QuantSpec
from model.quant.streams import Field, expert_fields
from model.quant.tensor import QuantizedTensor
from model.router import Choice

# Bytes. No library tells addresses apart beyond this (cuBLAS's choice of a kernel may depend on it up to
# here), so an expert is computed alike in every slot.
ALIGNMENT = 256


@dataclass(frozen=True)
class ExpertFormat:
    """One expert in files (`stored`) and in memory (`kept`): the tensors of two runs of bytes.

    `stored` has the names that follow `layers.{n}.block_sparse_moe.experts.{e}.` in a checkpoint; `kept` is
    what the fastest way to compute on the device wants, which may be the same. `remark` is as
    `choose_backend` gives it.
    """

    spec: QuantSpec
    shapes: dict[str, tuple[int, int]]  # of the matrices, by name
    stored: tuple[Field, ...]
    kept: tuple[Field, ...]
    backends: dict[str, type[Backend]]  # by matrix; empty at 16 bits
    remark: str | None
    pair: ExpertForm | None  # for one token, all of whose experts are computed in two launches, by slot

    @staticmethod
    def choose(
        config: ModelConfig, spec: QuantSpec, dtype: torch.dtype, device: torch.device
    ) -> "ExpertFormat":
        """For a model that computes in `dtype`. Raises `ModelError` for dimensions that the spec does not
        divide."""
        shapes = {"w13": (2 * config.ffn, config.hidden), "w2": (config.hidden, config.ffn)}
        stored = tuple(expert_fields(config, spec, dtype=dtype))
        pair = None if fused.unsupported(device) else ExpertForm(spec, config.hidden, config.ffn)
        if not spec.quantized:
            return ExpertFormat(spec, shapes, stored, stored, {}, None, pair)
        chosen = {name: choose_backend(spec, shape, dtype, device) for name, shape in shapes.items()}
        kept: list[Field] = []
        for name, (backend, _) in chosen.items():
            kept += backend.fields(name, shapes[name], spec, kept[-1].end if kept else 0)
        remarks = [remark for _, remark in chosen.values() if remark]
        backends = {name: backend for name, (backend, _) in chosen.items()}
        remark = remarks[0] if remarks else None
        return ExpertFormat(spec, shapes, stored, tuple(kept), backends, remark, pair)

    @property
    def blob_bytes(self) -> int:
        """From one blob in memory to the next."""
        return aligned(self.kept[-1].end)

    def store(self, stored: Tensor, blob: Tensor) -> None:
        """Fill a blob from the bytes [uint8] of an expert as files have it."""
        if self.stored == self.kept:
            blob[: self.stored[-1].end].copy_(stored)
            return
        for name, backend in self.backends.items():
            matrix = QuantizedTensor.of(self.spec, self.shapes[name], views(self.stored, name, stored))
            backend.store(matrix, views(self.kept, name, blob))

    @property
    def first_bytes(self) -> int:
        """How much of a blob w13 takes: with that, computing can begin."""
        return max(field.end for field in self.kept if field.name.startswith("w13."))

    def bind(self, blob: Tensor) -> "BoundExpert":
        """The expert in `blob` [blob_bytes] uint8, whichever it is at the time."""
        products: list[Product] = []
        for name, shape in self.shapes.items():
            memory = views(self.kept, name, blob)
            if self.spec.quantized:
                products.append(self.backends[name](self.spec, shape, memory))
            else:
                products.append(partial(linear, weight=memory["weight"]))
        return BoundExpert(*products)


def blob_bytes(config: ModelConfig, spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> int:
    """Of an expert in memory, as `ExpertFormat` has it. A GPU need not be there: whatever computes on one
    keeps what files have."""
    if device.type == "cuda":
        return aligned(expert_fields(config, spec, dtype=dtype)[-1].end)
    return ExpertFormat.choose(config, spec, dtype, device).blob_bytes


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class BoundExpert:
    """An expert that is computed from a blob: as a function of x, or in two steps, as its bytes arrive."""

    w13: Product
    w2: Product

    def __call__(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        return self.w2(gated(x, self.w13))


def views(fields: Sequence[Field], matrix: str, memory: Tensor) -> dict[str, Tensor]:
    """The tensors of one matrix in `memory`, by the last part of their names."""
    prefix = matrix + "."
    return {f.name.removeprefix(prefix): f.view(memory) for f in fields if f.name.startswith(prefix)}


class BlobExperts:
    """All experts of a layer, each computed from its blob: `model.moe.Experts`."""

    def __init__(self, form: ExpertFormat, count: int, device: torch.device) -> None:
        self.form = form
        self.blobs = torch.empty(count, form.blob_bytes, dtype=torch.uint8, device=device)
        self.experts = [form.bind(blob) for blob in self.blobs]

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:  # [N, D] -> [N, D]
        return mix(self.experts, x, choice)

    def step(self, x: Tensor, choice: Choice) -> Tensor:  # [1, D] -> [1, D]
        assert self.form.pair is not None, self.form
        return fused.expert_pair(x, self.blobs, choice.ids[0], choice.weights[0], self.form.pair)
