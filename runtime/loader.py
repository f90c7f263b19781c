"""Read a checkpoint into a model, in the form that the device computes with fastest."""

import queue
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from model.attention import Attention
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.linear import pack
from model.mixtral import Mixtral
from model.moe import Experts
from model.quant.expert import BlobExperts, ExpertFormat
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from model.quant.streams import EXPERT, matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target
from runtime.planning.costs import attention_bytes, matrix_bytes

WORKERS = 2  # one reads while the other converts


def load_model(
    checkpoint: Checkpoint,
    form: ExpertFormat,
    dtype: torch.dtype,
    device: torch.device,
    experts: Callable[[int], Experts],
    blob: Callable[[int, int], Tensor],
    progress: Callable[[int], None] | None = None,
) -> Mixtral:
    """The checkpoint's model, with its trunk on `device`.

    `experts(layer)` computes a layer's experts. `blob(layer, expert)` is the memory [uint8], on any device,
    that an expert is read into. `progress` is called with each number of bytes read.

    Warns, once for each reason, if quantized weights cannot be multiplied by the device's fast kernels.
    Raises `ModelError` if a file cannot be read, or no longer matches its header.
    """
    linear = quantized_linear(checkpoint.config, checkpoint.attention, dtype, device)
    model = Mixtral(checkpoint.config, dtype, device, experts, linear).requires_grad_(False)
    for message in slow_products(model, form):
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    checkpoint.fill(dict(model.named_parameters()), progress)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="loader")
    try:
        for size in pool.map(lambda read: read(), other_parts(checkpoint, model, form, blob)):
            if progress:
                progress(size)
    finally:  # after an error or Ctrl-C, reads that have not begun are dropped
        pool.shutdown(cancel_futures=True)
    pack_trunk(model)
    return model


def load_resident(
    checkpoint: Checkpoint,
    form: ExpertFormat,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Mixtral:
    """Like `load_model`, with all experts on the device."""
    config = checkpoint.config
    layers = [BlobExperts(form, config.experts, device) for _ in range(config.layers)]

    def blob(layer: int, e: int) -> Tensor:
        return layers[layer].blobs[e]

    return load_model(checkpoint, form, dtype, device, layers.__getitem__, blob, progress)


def slow_products(model: Mixtral, form: ExpertFormat) -> list[str]:
    """One line for each reason that keeps weights from the fast kernels, with the names of these weights."""
    users: dict[str, dict[str, None]] = {}  # names by reason, each once and in order
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.remark:
            users.setdefault(module.remark, {})[f"attention in format {module.spec}"] = None
    if form.remark:
        users.setdefault(form.remark, {})[f"experts in format {form.spec}"] = None
    return [
        f"{' and '.join(names)}: computed slowly, because the fast product {reason}"
        for reason, names in users.items()
    ]


def pack_trunk(model: Mixtral) -> None:
    """Reorder the 16-bit matrices of head and attention as a CPU multiplies them fastest."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv_proj, module.o_proj = pack(module.qkv_proj), pack(module.o_proj)
    model.lm_head = pack(model.lm_head)


def quantized_linear(
    config: ModelConfig, spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> Callable[[int, int], QuantizedLinear] | None:
    """A factory of attention's projections from their numbers of inputs and outputs; None if not quantized.

    All projections of a model share one tensor, because a GPU's allocator would round each up by a tenth.
    """
    if not spec.quantized:
        return None
    target = Target.of(device)
    size = attention_bytes(config, spec, dtype, target)
    free = torch.empty(config.layers * size, dtype=torch.uint8, device=device)

    def make(inputs: int, outputs: int) -> QuantizedLinear:
        nonlocal free
        taken = matrix_bytes(spec, (outputs, inputs), dtype, target)
        memory, free = free[:taken], free[taken:]
        return QuantizedLinear(inputs, outputs, spec, dtype, device, memory)

    return make


def other_parts(
    checkpoint: Checkpoint, model: Mixtral, form: ExpertFormat, blob: Callable[[int, int], Tensor]
) -> Iterator[Callable[[], int]]:
    """What remains to be read after the parameters. Each call reads one quantized matrix or one expert, and
    returns how many bytes of files that were."""
    direct = form.stored == form.kept
    stagings: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
    for _ in range(0 if direct else WORKERS):
        stagings.put(torch.empty(form.stored[-1].end, dtype=torch.uint8, device="cpu"))

    def read_matrix(name: str, module: QuantizedLinear) -> int:
        fields = matrix_fields(name, module.shape, module.spec)
        streams = {f.name: torch.empty(f.shape, dtype=f.dtype, device="cpu") for f in fields}
        checkpoint.fill(streams)
        by_stream = {full.rpartition(".")[2]: stream for full, stream in streams.items()}
        module.store(QuantizedTensor.of(module.spec, module.shape, by_stream))
        return bytes_in_files(checkpoint, streams)

    def read_expert(layer: int, e: int) -> int:
        target = blob(layer, e)
        staging = target if direct else stagings.get()
        try:
            prefix = EXPERT.format(n=layer, e=e)
            tensors = {prefix + field.name: field.view(staging) for field in form.stored}
            checkpoint.fill(tensors)
            if not direct:
                form.store(staging, target)
        finally:
            if not direct:
                stagings.put(staging)
        return bytes_in_files(checkpoint, tensors)

    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield partial(read_matrix, name, module)
    for layer in range(checkpoint.config.layers):
        for e in range(checkpoint.config.experts):
            yield partial(read_expert, layer, e)


def bytes_in_files(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """How many bytes the files hold for these tensors."""
    return sum(piece.bytes for piece in checkpoint.layout.filling(names))
