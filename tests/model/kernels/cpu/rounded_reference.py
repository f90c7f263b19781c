"""What the kernels of a CPU compute, in NumPy and one operation after the other: the slow reference."""

import numpy as np
import torch
from torch import Tensor

from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.quant.tensor import QuantizedTensor

F32 = np.float32


def random_matrix(spec: QuantSpec, shape: tuple[int, int], seed: int = 0) -> QuantizedTensor:
    """Random bytes in every stream: every code, scale and zero occurs. Steps make weights of about 0.01."""
    rng = np.random.default_rng(seed)
    streams = {}
    for field in matrix_fields("", shape, spec):
        if field.dtype == torch.uint8:
            values = rng.integers(0, 256, field.shape, dtype=np.uint8)
        else:
            values = rng.uniform(1e-5, 1e-4, field.shape).astype(F32)
        streams[field.name.lstrip(".")] = torch.from_numpy(values)
    return QuantizedTensor.of(spec, shape, streams)


def round_activations(x: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """x [M, K] as integers [M, K] and the scale of each unit [M, units]."""
    unit, top = min(spec.group_size, 64), 63 * 128 + 63 if spec.bits == 8 else 127
    units = x.reshape(len(x), -1, unit)
    largest = np.abs(units).max(axis=2)
    usable = largest >= 2.0**-100
    inverse = np.divide(F32(top), largest, where=usable, out=np.zeros_like(largest))
    integers = np.rint(units * inverse[..., None]).astype(np.int64)
    return integers.reshape(x.shape), np.where(usable, largest / F32(top), F32(0)).astype(F32)


def multiply(x: Tensor, matrix: QuantizedTensor) -> Tensor:  # [M, K] -> [M, N] float32
    """Each step in float32, except that a multiplication and the addition after it are rounded together. (The
    float64 that stands for that may round the last bit otherwise.)"""
    spec, (N, K) = matrix.spec, matrix.shape
    group, unit = spec.group_size, min(spec.group_size, 64)
    q, d = round_activations(x.float().numpy(), spec)
    codes = matrix.unpack().numpy().astype(np.int64)
    scales = matrix.group_scales().numpy()  # [N, J]
    shifts = -matrix.group_zeros().numpy() * scales
    M, J, per = len(q), K // group, group // unit
    y = np.zeros((M, N), F32)
    for g in range(J):
        total, e = np.zeros((M, N), F32), np.zeros((M, 1), F32)
        for u in range(g * per, (g + 1) * per):
            part = slice(u * unit, (u + 1) * unit)
            n = (q[:, part] @ codes[:, part].T).astype(F32)
            total = (n.astype(np.float64) * d[:, u, None] + total).astype(F32)
            e = e + q[:, part].sum(1, keepdims=True).astype(F32) * d[:, u, None]
        y = (total.astype(np.float64) * scales[:, g] + y).astype(F32)
        y = (shifts[:, g].astype(np.float64) * e + y).astype(F32)
    return torch.from_numpy(y)
