"""What a model's parts take on a device, in given formats and a given dtype."""

from dataclasses import dataclass

import torch

from model.attention import Attending
from model.config import ModelConfig
from model.quant.backends import pick_backend, scratch_bytes
from model.quant.expert import ExpertFormat, aligned
from model.quant.spec import QuantSpec
from model.rows import kernel_bytes
from model.target import Target
from runtime.planning.memory import driver_bytes, overhead_bytes

MATRIX_SHAPES = 5  # of a model: qkv, o, w13, w2 and the head


@dataclass(frozen=True)
class Costs:
    """What a plan adds up, apart from what follows from the configuration alone."""

    attention_bytes: int  # a layer's projections
    blob_bytes: int  # an expert
    scratch_bytes: int  # expanded weights, while a product with quantized ones lasts
    overhead_bytes: int  # of PyTorch's allocator on a GPU, of oneDNN's kernels on a CPU
    driver_bytes: int  # of a GPU, outside of PyTorch's allocator
    attending: Attending  # how attention of a prompt is computed

    @staticmethod
    def of(
        config: ModelConfig, attention: QuantSpec, experts: QuantSpec, dtype: torch.dtype, target: Target
    ) -> "Costs":
        """Raises `ModelError` if a format's groups do not divide the model's matrices."""
        quantized = attention.quantized or experts.quantized
        kernels = kernel_bytes(MATRIX_SHAPES, dtype, target.device)
        return Costs(
            attention_bytes=attention_bytes(config, attention, dtype, target),
            blob_bytes=ExpertFormat.of(config, experts, dtype, target).blob_bytes,
            scratch_bytes=scratch_bytes(max(config.hidden, config.ffn), dtype, target) if quantized else 0,
            overhead_bytes=kernels + overhead_bytes(target),
            driver_bytes=driver_bytes(target),
            attending=Attending.of(config, dtype, target),
        )


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """Count the trunk's weights, without the gates, and those of all experts."""
    c = config
    trunk = 2 * c.vocab * c.hidden + c.hidden + c.layers * (2 * c.hidden + projections(c))
    return trunk, c.layers * c.experts * 3 * c.ffn * c.hidden


def projections(config: ModelConfig) -> int:
    """Count the weights of a layer's attention."""
    return 2 * (config.heads + config.kv_heads) * config.head_dim * config.hidden


def attention_bytes(config: ModelConfig, spec: QuantSpec, dtype: torch.dtype, target: Target) -> int:
    """What a layer's attention takes in memory in this format."""
    if not spec.quantized:
        return projections(config) * dtype.itemsize
    qkv, out = (config.heads + 2 * config.kv_heads) * config.head_dim, config.heads * config.head_dim
    shapes = (qkv, config.hidden), (config.hidden, out)
    return sum(matrix_bytes(spec, shape, dtype, target) for shape in shapes)


def matrix_bytes(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, target: Target) -> int:
    """What a quantized matrix takes in memory, rounded up so that another one can follow it."""
    backend, _ = pick_backend(spec, shape, dtype, target)
    return aligned(backend.fields("", shape, spec)[-1].end)
