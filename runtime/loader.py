"""Bring a checkpoint into a model, in the form that the device computes with fastest: read, or mapped.

On a CPU, what a model keeps exactly as files have it can be a view of the mapped files. `Costs` plans it so.
"""

import queue
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from model.attention import Attention
from model.checkpoint import Checkpoint, MappedFiles
from model.config import ModelConfig
from model.kernels.cpu import rowwise
from model.linear import pack
from model.mixtral import Mixtral
from model.moe import Experts
from model.parameters import EMBEDDINGS, EXPERT, HEAD
from model.quant.expert import BlobExperts, ExpertFormat
from model.quant.formats import Formats
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target
from runtime.expanding import cost_of_expanding, memory_bandwidth
from runtime.planning.costs import attention_shapes, maps_experts, matrix_bytes

WORKERS = 2  # one reads while the other converts


def load_model(
    checkpoint: Checkpoint,
    form: ExpertFormat,
    dtype: torch.dtype,
    device: torch.device,
    experts: Callable[[int], Experts],
    blobs: Mapping[tuple[int, int], Tensor],
    progress: Callable[[int], None] | None = None,
    files: MappedFiles | None = None,
) -> Mixtral:
    """The checkpoint's model, with its trunk on `device`.

    `experts(layer)` computes a layer's experts. `blobs` has the memory [uint8], on any device, that each
    expert is read into, by layer and expert. Those that it lacks are not read. With `files`, those of a
    mappable checkpoint, what they can serve as memory is not read. `progress` is called with each number of
    bytes read, and once with all that are mapped.

    Warns, once for each reason, if quantized weights cannot be multiplied by the device's fast kernels.
    Raises `ModelError` if a file cannot be read, or no longer matches its header.
    """
    has = checkpoint.embeds, checkpoint.heads
    model = empty_model(checkpoint.config, checkpoint.formats, dtype, device, experts, *has)
    for message in slow_products(model, form, device):
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    parameters = dict(model.named_parameters())
    if files:
        map_trunk(model, checkpoint, files)
        if model.embeds and dtype == checkpoint.mappable:
            del parameters[EMBEDDINGS]
        if progress:
            progress(files.bytes)
    checkpoint.fill(parameters, progress)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="loader")
    try:
        for size in pool.map(lambda read: read(), other_parts(checkpoint, model, form, blobs, files)):
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
    files: MappedFiles | None = None,
) -> Mixtral:
    """Like `load_model`, with all experts on the device."""
    config, layers = checkpoint.config, range(checkpoint.config.layers)
    if files and maps_experts(form, dtype, checkpoint.mappable):
        mapped = [BlobExperts(form, map_experts(n, config.experts, form, files)) for n in layers]
        return load_model(checkpoint, form, dtype, device, mapped.__getitem__, {}, progress, files)
    empty = [BlobExperts.empty(form, config.experts, device) for _ in layers]
    blobs = {(n, e): blob for n in layers for e, blob in enumerate(empty[n].blobs)}
    return load_model(checkpoint, form, dtype, device, empty.__getitem__, blobs, progress, files)


def map_experts(layer: int, count: int, form: ExpertFormat, files: MappedFiles) -> list[Tensor]:
    """The blobs of a layer's experts as files have them."""
    prefixes = [EXPERT.format(n=layer, e=e) for e in range(count)]
    return [files.run(prefix + field.name for field in form.stored) for prefix in prefixes]


def map_trunk(model: Mixtral, checkpoint: Checkpoint, files: MappedFiles) -> None:
    """Have the embeddings and the quantized matrices in the files' memory where they are kept as there. The
    memory that they were made with, and which nothing has touched, is given back."""
    if model.embeds and model.dtype == checkpoint.mappable:
        weight = model.embed_tokens.weight
        weight.data = files.run([EMBEDDINGS]).view(weight.dtype).view(weight.shape)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.as_stored:
            module.bind(files.run(f.name for f in matrix_fields(name, module.shape, module.spec)))


def empty_model(
    config: ModelConfig,
    formats: Formats,
    dtype: torch.dtype,
    device: torch.device,
    experts: Callable[[int], Experts],
    embeds: bool = True,
    heads: bool = True,
) -> Mixtral:
    """A model to be filled, whose trunk has memory in these formats. A part may lack its ends."""
    linear = quantized_linear(config, formats.attention, dtype, device)
    head = partial(QuantizedLinear, spec=formats.head, dtype=dtype, device=device)
    its_head = head if formats.head.quantized else None
    model = Mixtral(config, dtype, device, experts, linear, its_head, embeds, heads)
    return model.requires_grad_(False)


def slow_products(model: Mixtral, form: ExpertFormat, device: torch.device) -> list[str]:
    """One line for each reason that keeps weights from the fast kernels, with the names of these weights. Of
    a GPU it says what that costs."""
    users: dict[str, dict[str, None]] = {}  # names by reason, each once and in order
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.remark:
            kind = "head" if name == HEAD.removesuffix(".weight") else "attention"
            users.setdefault(module.remark, {})[f"{kind} in format {module.spec}"] = None
    if form.remark:
        users.setdefault(form.remark, {})[f"experts in format {form.spec}"] = None
    lines = []
    for reason, names in users.items():
        *others, last = names
        listed = f"{', '.join(others)} and {last}" if others else last
        lines.append(f"{listed}: computed slowly, because the fast product {reason}")
    if lines and device.type == "cuda":  # there one reason keeps all weights from the kernels
        lines[-1] += f"; {cost_of_expanding(model, form, memory_bandwidth(device))}"
    return lines


def kernels_to_compile(model: Mixtral, form: ExpertFormat, kv_bits: int) -> list[Callable[[], object]]:
    """Calls that compile what the model needs on a CPU: for quantized matrices (see `Backend.kernels`), and
    for what is computed row by row."""
    needed = {(module.backend, module.spec, False): None for module in quantized_modules(model)}
    for name, backend in form.backends.items():
        needed[backend, form.spec, name == "w13"] = None
    calls = [call for backend, spec, gated in needed for call in backend.kernels(spec, gated)]
    config = model.config
    heads = config.heads // config.kv_heads
    if rowwise.takes(model.dtype, model.device, config.head_dim, heads):
        calls += rowwise.kernels(model.dtype, heads, kv_bits)
    return calls


def quantized_modules(model: Mixtral) -> Iterator[QuantizedLinear]:
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


def pack_trunk(model: Mixtral) -> None:
    """Reorder the 16-bit matrices of head and attention as a CPU multiplies them fastest."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.qkv_proj, module.o_proj = pack(module.qkv_proj), pack(module.o_proj)
    if model.heads:
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
    size = sum(matrix_bytes("", spec, shape, dtype, target) for shape in attention_shapes(config).values())
    free = torch.empty(config.layers * size, dtype=torch.uint8, device=device)

    def make(inputs: int, outputs: int) -> QuantizedLinear:
        nonlocal free
        taken = matrix_bytes("", spec, (outputs, inputs), dtype, target)
        memory, free = free[:taken], free[taken:]
        return QuantizedLinear(inputs, outputs, spec, dtype, device, memory)

    return make


def other_parts(
    checkpoint: Checkpoint,
    model: Mixtral,
    form: ExpertFormat,
    blobs: Mapping[tuple[int, int], Tensor],
    files: MappedFiles | None,
) -> Iterator[Callable[[], int]]:
    """What remains to be read after the parameters. Each call reads one quantized matrix or one expert, and
    returns how many bytes of files that were."""
    direct = form.as_stored
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

    def read_expert(target: Tensor, layer: int, e: int) -> int:
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
        if isinstance(module, QuantizedLinear) and not (files and module.as_stored):
            yield partial(read_matrix, name, module)
    for layer, e in sorted(blobs):
        yield partial(read_expert, blobs[layer, e], layer, e)


def bytes_in_files(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """How many bytes the files hold for these tensors."""
    return sum(piece.bytes for piece in checkpoint.layout.filling(names))
