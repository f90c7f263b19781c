"""Random quantized matrices, and what products with them are held to. For tests that run where PyTorch and
pytest are all there is."""

import torch
from torch import Tensor

from model.quant.packing import pack
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor


def random_tensor(spec: QuantSpec, N: int, groups: int, seed: int = 0) -> tuple[QuantizedTensor, Tensor]:
    """Streams of random bytes, and the codes that they were packed from."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=generator, dtype=torch.uint8)

    codes = draw(1 << spec.bits, N, groups * spec.group_size)
    low, high = [*pack(codes, spec.bits), None][:2]
    assert low is not None
    scales, zeros = (draw(256, N // 16, groups, 16) for _ in range(2))
    steps = torch.rand(N // 16, -(-groups // spec.meta_group_size), 16, generator=generator)
    return QuantizedTensor(spec, (N, codes.shape[1]), low, high, scales, zeros, steps), codes


def make_matrix(spec: QuantSpec, N: int, K: int, seed: int = 0) -> QuantizedTensor:
    """Random codes, zeros and scales, of weights that add up to numbers within float16's range."""
    matrix, _ = random_tensor(spec, N, K // spec.group_size, seed)
    steps = matrix.steps / (100 * 2**spec.bits)
    return QuantizedTensor.of(spec, (N, K), matrix.streams() | {"steps": steps})


def check(y: Tensor, x: Tensor, matrix: QuantizedTensor, tolerance: float) -> None:
    """Every element within `tolerance` of what it would be, were all its terms of one sign."""
    assert y.shape == (x.shape[0], matrix.shape[0]) and y.dtype == x.dtype
    W = matrix.dequantize().double()
    terms = x.double().abs() @ W.abs().T
    error = (y.double() - x.double() @ W.T).abs()
    assert bool((error <= tolerance * terms).all()), (error / terms).nan_to_num().max()
