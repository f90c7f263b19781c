"""The matrix product of the network with a quantized matrix, and the choice of how it is computed."""

import torch
from torch import Tensor, nn

from model.quant.backends import Backend, blocks, fused, int4pack
from model.quant.backends.blocks import Blocks
from model.quant.backends.fused import Fused
from model.quant.backends.int4pack import Int4Pack
from model.quant.spec import ROWS, QuantSpec
from model.quant.tensor import QuantizedTensor


def choose_backend(
    spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[type[Backend], str | None]:
    """The fastest way to multiply a matrix of this format on this device; and, where that is not the device's
    fast way, why not and what to do about it: the end of a sentence that begins with "the fast product".

    On a CPU, float32 is the reference: it is computed plainly, and that is nothing to remark on.
    """
    if device.type == "cuda":
        if reason := fused.unsupported(device):
            return Blocks, reason
        return Fused, None
    if dtype == torch.float32:
        return Blocks, None
    if reason := int4pack.unsupported(spec, shape, dtype):
        return Blocks, reason
    return Int4Pack, None


def scratch_bytes(device: torch.device, inputs: int, dtype: torch.dtype, fast: bool = True) -> int:
    """At least what a product in `dtype` takes for expanded weights, for matrices of up to so many inputs;
    `fast` as `choose_backend` found. A GPU need not be there."""
    if device.type == "cuda" and fast:
        return max(fused.BLOCK, ROWS * inputs) * dtype.itemsize
    block = max(blocks.CPU_BLOCK if device.type == "cpu" else blocks.GPU_BLOCK, int4pack.EXPANDED * inputs)
    return block * (4 + 2 + 2)  # as float32, as x's dtype, as codes


class QuantizedLinear(nn.Module):
    """`x @ W.T` without bias, with W [outputs, inputs] in a quantized format.

    `store` fills it; until then its memory is as it happens to be.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        spec: QuantSpec,
        dtype: torch.dtype,
        device: torch.device,
        memory: Tensor | None = None,
    ) -> None:
        """`memory` [uint8], on the device, is where it is kept, if that is not to be memory of its own."""
        super().__init__()
        self.spec, self.shape = spec, (outputs, inputs)
        self.backend, self.remark = choose_backend(spec, self.shape, dtype, device)
        fields = self.backend.fields("", self.shape, spec)
        if memory is None:
            memory = torch.empty(fields[-1].end, dtype=torch.uint8, device=device)
        self.memory = {field.name.lstrip("."): field.view(memory) for field in fields}
        self.product = self.backend(spec, self.shape, self.memory)

    def store(self, matrix: QuantizedTensor) -> None:
        self.backend.store(matrix, self.memory)

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.shape[0])
