"""A model of random weights made in memory, quantized or not, to measure without a checkpoint.

Weights have the usual deviations, so activations stay finite and routers have preferences. The layout in
memory is that of `runtime.loader`.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.mixtral import Mixtral
from model.moe import Experts
from model.quant.expert import BlobExperts, ExpertFormat
from model.quant.formats import Formats
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.quant.tensor import QuantizedTensor
from model.target import Target
from runtime.loader import empty_model, pack_trunk, slow_products

POOL = 1 << 20  # random numbers that rows are cut from
ROWS = 1024  # filled at a time
SCALES = (145, 256)  # the range of scale bytes, about 200 on average


@torch.no_grad()
def random_model(
    config: ModelConfig,
    formats: Formats,
    dtype: torch.dtype,
    device: torch.device,
    distinct: int | None = None,
    provide: Callable[[int], Experts] | None = None,
) -> Mixtral:
    """A model ready to compute, with the same weights in every call.

    Only the first `distinct` experts and quantized matrices of each shape are made (default: all), and copies
    take the places of the others. For a benchmark copies are as good, because they are as many bytes to read,
    and on a GPU they take no time to make. Where `provide(layer)` gives a layer's experts, none are made;
    `random_blobs` makes the same ones.

    Warns as `runtime.loader.load_model` does. Raises `ModelError` for a format that does not fit the
    configuration.
    """
    generator = torch.Generator().manual_seed(0)
    form = ExpertFormat.of(config, formats.experts, dtype, Target.of(device))
    resident: list[BlobExperts] = []

    def all_there(layer: int) -> BlobExperts:
        resident.append(BlobExperts.empty(form, config.experts, device))
        return resident[-1]

    model = empty_model(config, formats, dtype, device, provide or all_there)
    for message in slow_products(model, form, device):
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    for weight in model.parameters():
        if weight.dim() == 2:  # norms are all ones
            fill_normal(weight, generator)
    fill_matrices([m for m in model.modules() if isinstance(m, QuantizedLinear)], generator, distinct)
    random_blobs(form, [blob for layer in resident for blob in layer.blobs], distinct)
    pack_trunk(model)
    return model


def fill_normal(weight: Tensor, generator: torch.Generator) -> None:  # [N, K], std 1 / sqrt(K)
    """Fill rows with stretches of one pool of random numbers, because drawing all would take minutes."""
    N, K = weight.shape
    pool = torch.randn(min(POOL, N * K) + K, generator=generator).div_(math.sqrt(K)).to(weight)
    starts = torch.randint(len(pool) - K, (N, 1), generator=generator).to(weight.device)
    along = torch.arange(K, device=weight.device)
    for rows, first in zip(weight.split(ROWS), starts.split(ROWS), strict=True):
        rows.copy_(pool[first + along])


def fill_matrices(
    modules: Sequence[QuantizedLinear], generator: torch.Generator, distinct: int | None
) -> None:
    """Fill quantized matrices: of each shape and format the first `distinct` ones, the others with copies in
    turn."""
    made: dict[tuple[QuantSpec, tuple[int, int]], list[QuantizedLinear]] = {}
    for module in modules:
        alike = made.setdefault((module.spec, module.shape), [])
        if distinct is None or len(alike) < distinct:
            module.store(random_matrix(module.spec, module.shape, generator))
        else:
            for name, stream in alike[len(alike) % distinct].memory.items():
                module.memory[name].copy_(stream)
        alike.append(module)


def random_blobs(form: ExpertFormat, blobs: Sequence[Tensor], distinct: int | None) -> None:
    """Fill `blobs`, each the memory of an expert on any device: the first `distinct` ones with experts of
    their own, the others with copies in turn."""
    generator = torch.Generator().manual_seed(1)
    stored = torch.empty(form.stored[-1].end, dtype=torch.uint8)
    for n, blob in enumerate(blobs):
        if distinct is None or n < distinct:
            fill_expert(form, stored, generator)
            form.store(stored, blob)
        else:
            blob.copy_(blobs[n % distinct])


def random_matrix(spec: QuantSpec, shape: tuple[int, int], generator: torch.Generator) -> QuantizedTensor:
    """Random codes with scales of about one size, as in files."""
    streams = {}
    for field in matrix_fields("", shape, spec):
        name = field.name.lstrip(".")
        streams[name] = torch.empty(field.shape, dtype=field.dtype)
        fill_stream(name, streams[name], spec, shape[1], generator)
    return QuantizedTensor.of(spec, shape, streams)


def fill_expert(form: ExpertFormat, stored: Tensor, generator: torch.Generator) -> None:
    """Fill `stored` [uint8] with an expert as a file has it."""
    for field in form.stored:
        matrix, _, name = field.name.partition(".")
        if name == "weight":
            fill_normal(field.view(stored), generator)
        else:
            fill_stream(name, field.view(stored), form.spec, form.shapes[matrix][1], generator)


def fill_stream(name: str, stream: Tensor, spec: QuantSpec, inputs: int, generator: torch.Generator) -> None:
    """Fill one stream of a matrix, so that its weights have a deviation of 1 / sqrt(inputs)."""
    if name == "steps":
        low, high = SCALES[0], SCALES[1] - 1
        square = (low * low + low * high + high * high) / 3  # of a scale byte, on average
        codes = math.sqrt((4**spec.bits - 1) / 12)  # standard deviation of random codes
        stream.fill_(1 / math.sqrt(inputs * square) / codes)
    elif name == "zeros":
        stream.fill_(round((2**spec.bits - 1) / 2 * 2 ** (8 - spec.bits)))  # the middle of the codes
    elif name == "scales":
        stream.copy_(torch.randint(*SCALES, stream.shape, generator=generator, dtype=torch.uint8))
    else:  # codes: every bit is random, and they are drawn 64 at a time
        stream.view(-1).view(torch.int64).random_(-(1 << 63), None, generator=generator)
