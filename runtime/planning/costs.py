"""What a model's parts take on a device, in given formats and a given dtype."""

import math
from dataclasses import dataclass

import torch

from model.attention import Attending
from model.config import ModelConfig
from model.quant.backends import keeps_as_stored, pick_backend, scratch_bytes
from model.quant.expert import ExpertFormat, aligned
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.rows import kernel_bytes
from model.target import Target
from runtime.planning.memory import driver_bytes, overhead_bytes

MATRIX_SHAPES = 4  # of a layer: qkv, o, w13 and w2


@dataclass(frozen=True)
class Costs:
    """What a plan adds up, apart from what follows from the configuration alone."""

    embedding_bytes: int
    attention_bytes: int  # a layer's projections
    head_bytes: int
    blob_bytes: int  # an expert
    scratch_bytes: int  # expanded weights, while a product with quantized ones lasts
    overhead_bytes: int  # of PyTorch's allocator on a GPU, of oneDNN's kernels on a CPU
    driver_bytes: int  # of a GPU, outside of PyTorch's allocator
    attending: Attending  # how attention of a prompt is computed
    mapped_attention_bytes: int = 0  # a layer's projections in files, if they are mapped; not counted above
    mapped_ends_bytes: int = 0  # the same of embeddings and head
    mapped_expert_bytes: int = 0  # an expert's in files, if resident experts are mapped; else 0
    from_files: bool = False  # whether an expert can be read alone, since files have it as memory keeps it

    @staticmethod
    def of(
        config: ModelConfig,
        formats: Formats,
        dtype: torch.dtype,
        target: Target,
        files: torch.dtype | None = None,
        maps: bool = False,
        embeds: bool = True,
        heads: bool = True,
    ) -> "Costs":
        """`files` is `Checkpoint.mappable`; `maps` says whether weights are to be mapped if they can be. A
        part of a model may lack embeddings or the head (see `model.part`). The number of layers changes
        nothing.

        Raises `ModelError` if a format's groups do not divide the model's matrices.
        """
        widest = max(config.hidden, config.ffn)
        kernels = kernel_bytes(MATRIX_SHAPES + heads, dtype, target.device)
        form = ExpertFormat.of(config, formats.experts, dtype, target)
        embedding_bytes = config.vocab * config.hidden * dtype.itemsize * embeds
        maps_embeddings = maps and dtype == files
        from_files = maps_experts(form, dtype, files)

        def place(name: str, spec: QuantSpec, shape: tuple[int, int]) -> tuple[int, int]:
            """The bytes of a matrix that are read into memory, and those that are mapped."""
            if maps and files and maps_matrix(spec, shape, dtype, target):
                return 0, matrix_fields(name, shape, spec)[-1].end
            return matrix_bytes(name, spec, shape, dtype, target), 0

        attention = [place(name, formats.attention, it) for name, it in attention_shapes(config).items()]
        head, mapped_head = place("lm_head", formats.head, (config.vocab, config.hidden)) if heads else (0, 0)
        return Costs(
            embedding_bytes=0 if maps_embeddings else embedding_bytes,
            attention_bytes=sum(read for read, _ in attention),
            head_bytes=head,
            mapped_attention_bytes=sum(mapped for _, mapped in attention),
            mapped_ends_bytes=mapped_head + maps_embeddings * embedding_bytes,
            mapped_expert_bytes=form.stored[-1].end if maps and from_files else 0,
            from_files=from_files,
            blob_bytes=form.blob_bytes,
            scratch_bytes=scratch_bytes(widest, dtype, target) if formats.quantized else 0,
            overhead_bytes=kernels + overhead_bytes(target),
            driver_bytes=driver_bytes(target),
            attending=Attending.of(config, dtype, target),
        )


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Count the trunk's weights, without the gates, and those of all experts."""
    c = config
    projections = sum(map(math.prod, attention_shapes(c).values()))
    trunk = 2 * c.vocab * c.hidden + c.hidden + c.layers * (2 * c.hidden + projections)
    return trunk, c.layers * c.experts * 3 * c.ffn * c.hidden


def attention_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Those of a layer's two matrices, by name."""
    qkv, out = (config.heads + 2 * config.kv_heads) * config.head_dim, config.heads * config.head_dim
    return {"qkv_proj": (qkv, config.hidden), "o_proj": (config.hidden, out)}


def maps_matrix(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target) -> bool:
    """Whether a matrix of the trunk can be a view of files."""
    return spec.quantized and keeps_as_stored(pick_backend(spec, shape, dtype, target)[0], spec, shape)


def maps_experts(form: ExpertFormat, dtype: torch.dtype, files: torch.dtype | None) -> bool:
    """Whether experts are the same bytes in memory and in files in which 16-bit weights have the dtype
    `files`. Then one can be a view of a file, and can be read from there alone."""
    return files is not None and form.as_stored and (form.spec.quantized or dtype == files)


def matrix_bytes(
    name: str, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target
) -> int:
    """What a matrix takes in memory that it is read into. A quantized one is rounded up so that another one
    can follow it."""
    if not spec.quantized:
        return math.prod(shape) * dtype.itemsize
    backend, _ = pick_backend(spec, shape, dtype, target)
    return aligned(backend.fields(name, shape, spec)[-1].end)
