"""An expert as one run of bytes, its blob: how long it is, how it is filled, and how it is computed.

All experts of a model are alike. So memory is bound to a computation once, and after that computes whichever
expert is in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kernels import experts as kernels
from model.kernels import launching
from model.linear import linear
from model.moe import OneToken, Product, gated, mix
from model.quant.backends import BACKENDS, Backend, pick_backend
from model.quant.spec import QuantSpec
from model.quant.streams import Field, expert_fields
from model.quant.tensor import QuantizedTensor
from model.router import Choice
from model.target import Target

# Bytes. cuBLAS may pick a kernel by the alignment of an address up to here, and no library looks further. So
# an expert is computed alike in every slot.
BLOB_ALIGNMENT = 256


@dataclass(frozen=True)
class ExpertFormat:
    """One expert in files (`stored`) and in memory (`kept`): the tensors of two runs of bytes.

    In a checkpoint the names of `stored` follow `layers.{n}.block_sparse_moe.experts.{e}.`. `kept` is what
    the device's fastest backend wants, which may be the same.
    """

    spec: QuantSpec
    shapes: dict[str, tuple[int, int]]  # of the matrices, by name
    stored: tuple[Field, ...]
    kept: tuple[Field, ...]
    backends: dict[str, type[Backend]]  # by matrix; empty at 16 bits
    remark: str | None  # why the device's fast way cannot compute a matrix, as `Backend.unsupported` says it
    layout: kernels.BlobLayout | None  # for `step`; None where the device has no kernels for it

    @staticmethod
    def of(config: ModelConfig, spec: QuantSpec, dtype: torch.dtype, target: Target) -> "ExpertFormat":
        """The format for a model that computes in `dtype`. Raises `ModelError` if the spec does not divide
        its dimensions."""
        shapes = {"w13": (2 * config.ffn, config.hidden), "w2": (config.hidden, config.ffn)}
        stored = tuple(expert_fields(config, spec, dtype=dtype))
        slow = launching.unsupported(target, dtype)
        layout = None if slow else kernels.BlobLayout(spec, config.hidden, config.ffn)
        if not spec.quantized:
            return ExpertFormat(spec, shapes, stored, stored, {}, None, layout)
        picked = {name: pick_backend(spec, shape, dtype, target) for name, shape in shapes.items()}
        kept: list[Field] = []
        for name, (backend, _) in picked.items():
            kept += backend.fields(name, shapes[name], spec, kept[-1].end if kept else 0)
        backends = {name: backend for name, (backend, _) in picked.items()}
        remark = next((remark for _, remark in picked.values() if remark), None)
        return ExpertFormat(spec, shapes, stored, tuple(kept), backends, remark, layout)

    def on(self, target: Target, dtype: torch.dtype) -> "ExpertFormat":
        """The same bytes in memory as another device computes them: by its fastest backend that keeps them
        so. The remark says why a faster one cannot, for the reference in float32, too."""
        backends: dict[str, type[Backend]] = {}
        remark = None
        for name, shape in self.shapes.items() if self.spec.quantized else ():
            kept = [field for field in self.kept if field.name.startswith(name + ".")]
            fit = [
                backend
                for backend in BACKENDS
                if target.device.type in backend.devices
                and backend.fields(name, shape, self.spec, kept[0].offset) == kept
            ]
            remark = remark or fit[0].unsupported(self.spec, shape, dtype, target)
            backends[name], _ = pick_backend(self.spec, shape, dtype, target, fit)
        return replace(self, backends=backends, remark=remark, layout=None)

    @property
    def as_stored(self) -> bool:
        """Whether memory has exactly the bytes that files have."""
        return self.stored == self.kept

    @property
    def blob_bytes(self) -> int:
        """The distance from one blob in memory to the next."""
        return aligned(self.kept[-1].end)

    def store(self, stored: Tensor, blob: Tensor) -> None:
        """Fill a blob from an expert's bytes [uint8], as files have them."""
        if self.as_stored:
            blob[: self.stored[-1].end].copy_(stored)
            return
        for name, backend in self.backends.items():
            matrix = QuantizedTensor.of(self.spec, self.shapes[name], views(self.stored, name, stored))
            backend.store(matrix, views(self.kept, name, blob))

    @property
    def first_bytes(self) -> int:
        """The bytes of w13, with which computing can begin."""
        return max(field.end for field in self.kept if field.name.startswith("w13."))

    def together(self, x: Tensor, experts: Sequence["BoundExpert"]) -> Tensor | None:
        """`Backend.together` for several experts: x [1, D] -> [A, D], or None."""
        kinds = set(self.backends.values())
        if len(kinds) != 1:
            return None
        return kinds.pop().together(x, [e.w13 for e in experts], [e.w2 for e in experts])

    def bind(self, blob: Tensor) -> "BoundExpert":
        """The expert in `blob` [blob_bytes] uint8: whichever one is there when it is called."""
        memory = {name: views(self.kept, name, blob) for name in self.shapes}
        if not self.spec.quantized:
            w13, w2 = (partial(linear, weight=tensors["weight"]) for tensors in memory.values())
            return BoundExpert(w13, w2, partial(gated, w13=w13), independent=False)
        first, second = (self.backends[name](self.spec, s, memory[name]) for name, s in self.shapes.items())
        independent = all(backend.independent for backend in self.backends.values())
        return BoundExpert(first, second, first.gated, independent)

    def step(
        self,
        x: Tensor,
        pool: Tensor,
        slots: Tensor,
        weights: Tensor,
        ids: Tensor | None = None,
        absent: bool = False,
    ) -> Tensor:
        """The weighted sum of one token's experts, which are in some slots of a GPU's pool of blobs: x [1, D]
        -> [1, D]. See `model.kernels.experts`."""
        assert self.layout is not None, self
        return kernels.experts_by_slot(x, pool, slots, weights, self.layout, ids, absent)


def aligned(size: int) -> int:
    return -(-size // BLOB_ALIGNMENT) * BLOB_ALIGNMENT


@dataclass(frozen=True)
class BoundExpert:
    """An expert that is computed from a blob: at once, or one product after the other, as its bytes
    arrive."""

    w13: Product
    w2: Product
    gated: Product  # x [N, D] -> [N, F], in x's dtype or in float32
    independent: bool  # whether a row's output has the same bits alone and among others

    def __call__(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        return self.output(self.gated(x), x.dtype)

    def output(self, h: Tensor, dtype: torch.dtype) -> Tensor:  # [N, F] -> [N, D]
        """The expert's output from its inner values."""
        return self.w2(h).to(dtype)


def views(fields: Sequence[Field], matrix: str, memory: Tensor) -> dict[str, Tensor]:
    """The tensors of one matrix in `memory`, by the last part of their names."""
    prefix = matrix + "."
    return {f.name.removeprefix(prefix): f.view(memory) for f in fields if f.name.startswith(prefix)}


def outputs_of(form: ExpertFormat, experts: Sequence[BoundExpert], x: Tensor) -> Sequence[Tensor]:
    """The outputs of several experts for one token, x [1, D], in few launches: [1, D] each."""
    outputs = form.together(x, experts)
    return [expert(x) for expert in experts] if outputs is None else outputs.to(x.dtype).split(1)


class BlobExperts:
    """All experts of a layer, each computed from its blob: `model.moe.Experts`."""

    def __init__(self, form: ExpertFormat, blobs: Tensor | Sequence[Tensor]) -> None:
        """`blobs` [experts, blob_bytes] uint8 is their memory. On a CPU it may be in several tensors."""
        self.form, self.blobs = form, blobs
        self.experts = [form.bind(blob) for blob in blobs]

    @staticmethod
    def empty(form: ExpertFormat, count: int, device: torch.device) -> "BlobExperts":
        """Experts to be filled, in memory of their own."""
        return BlobExperts(form, torch.empty(count, form.blob_bytes, dtype=torch.uint8, device=device))

    def __call__(self, x: Tensor, choice: Choice) -> Tensor:  # [N, D] -> [N, D]
        if x.shape[0] != 1:
            return mix(self.experts, x, choice)
        ids = choice.ids.tolist()[0]
        sums = OneToken(x, choice, ids)
        for e, y in zip(ids, outputs_of(self.form, [self.experts[e] for e in ids], x), strict=True):
            sums.add(e, y)
        return sums.total()

    rest = None  # `step` computes all experts

    def step(self, x: Tensor, choice: Choice) -> Tensor:  # [1, D] -> [1, D]
        assert isinstance(self.blobs, Tensor)
        return self.form.step(x, self.blobs, choice.ids[0], choice.weights[0])
