"""What a model's parts take on a device, in given formats and a given dtype."""

import math
from dataclasses import dataclass

import torch

from model.attention import Attending
from model.config import ModelConfig
from model.quant.backends import keeps_as_stored, pick_backend, scratch_bytes
from model.quant.expert import ExpertFormat, aligned
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.rows import kernel_bytes
from model.target import Target
from runtime.planning.memory import driver_bytes, overhead_bytes

MATRIX_SHAPES = 5  # of a model: qkv, o, w13, w2 and the head


@dataclass(frozen=True)
class Costs:
    """What a plan adds up, apart from what follows from the configuration alone."""

    embedding_bytes: int
    attention_bytes: int  # a layer's projections
    blob_bytes: int  # an expert
    scratch_bytes: int  # expanded weights, while a product with quantized ones lasts
    overhead_bytes: int  # of PyTorch's allocator on a GPU, of oneDNN's kernels on a CPU
    driver_bytes: int  # of a GPU, outside of PyTorch's allocator
    attending: Attending  # how attention of a prompt is computed
    mapped_trunk_bytes: int = 0  # of files, and not counted above: embeddings and attention of all layers
    mapped_expert_bytes: int = 0  # an expert's in files, if resident experts are mapped; else 0

    @staticmethod
    def of(
        config: ModelConfig,
        attention: QuantSpec,
        experts: QuantSpec,
        dtype: torch.dtype,
        target: Target,
        files: torch.dtype | None = None,
    ) -> "Costs":
        """`files` is `Checkpoint.mappable` if weights are to be mapped, else None.

        Raises `ModelError` if a format's groups do not divide the model's matrices.
        """
        quantized = attention.quantized or experts.quantized
        kernels = kernel_bytes(MATRIX_SHAPES, dtype, target.device)
        form = ExpertFormat.of(config, experts, dtype, target)
        embedding_bytes = config.vocab * config.hidden * dtype.itemsize
        maps_embeddings = dtype == files
        shapes = attention_shapes(config)
        mapped = [shape for shape in shapes if files and maps_matrix(attention, shape, dtype, target)]
        stored = sum(matrix_fields("", shape, attention)[-1].end for shape in mapped)
        read = sum(matrix_bytes(attention, shape, dtype, target) for shape in shapes if shape not in mapped)
        return Costs(
            embedding_bytes=0 if maps_embeddings else embedding_bytes,
            attention_bytes=read,
            mapped_trunk_bytes=config.layers * stored + maps_embeddings * embedding_bytes,
            mapped_expert_bytes=form.stored[-1].end if maps_experts(form, dtype, files) else 0,
            blob_bytes=form.blob_bytes,
            scratch_bytes=scratch_bytes(max(config.hidden, config.ffn), dtype, target) if quantized else 0,
            overhead_bytes=kernels + overhead_bytes(target),
            driver_bytes=driver_bytes(target),
            attending=Attending.of(config, dtype, target),
        )


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Count the trunk's weights, without the gates, and those of all experts."""
    c = config
    projections = sum(map(math.prod, attention_shapes(c)))
    trunk = 2 * c.vocab * c.hidden + c.hidden + c.layers * (2 * c.hidden + projections)
    return trunk, c.layers * c.experts * 3 * c.ffn * c.hidden


def attention_shapes(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Those of a layer's two matrices."""
    qkv, out = (config.heads + 2 * config.kv_heads) * config.head_dim, config.heads * config.head_dim
    return (qkv, config.hidden), (config.hidden, out)


def maps_matrix(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target) -> bool:
    """Whether a matrix of the trunk can be a view of files."""
    return spec.quantized and keeps_as_stored(pick_backend(spec, shape, dtype, target)[0], spec, shape)


def maps_experts(form: ExpertFormat, dtype: torch.dtype, files: torch.dtype | None) -> bool:
    """Whether resident experts can be views of files in which 16-bit weights have the dtype `files`."""
    return files is not None and form.as_stored and (form.spec.quantized or dtype == files)


def matrix_bytes(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target) -> int:
    """What a matrix takes in memory that it is read into. A quantized one is rounded up so that another one
    can follow it."""
    if not spec.quantized:
        return math.prod(shape) * dtype.itemsize
    backend, _ = pick_backend(spec, shape, dtype, target)
    return aligned(backend.fields("", shape, spec)[-1].end)
