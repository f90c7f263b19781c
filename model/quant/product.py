"""A linear layer whose weight is quantized."""

import torch
from torch import Tensor, nn

from model.quant.backends import keeps_as_stored, pick_backend
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor
from model.target import Target


class QuantizedLinear(nn.Module):
    """`x @ W.T` without bias, with W [outputs, inputs] in a quantized format.

    Its memory is uninitialized until `store` fills it.
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
        """`memory` [uint8], on the device, is where W is kept. By default the layer allocates it.

        `remark` says why the device's fast way cannot compute the product, as `Backend.unsupported` does.
        """
        super().__init__()
        self.spec, self.shape = spec, (outputs, inputs)
        self.backend, self.remark = pick_backend(spec, self.shape, dtype, Target.of(device))
        if memory is None:
            size = self.backend.fields("", self.shape, spec)[-1].end
            memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.bind(memory)

    def bind(self, memory: Tensor) -> None:
        """Keep W in `memory` [uint8] from now on, in place of the memory so far."""
        fields = self.backend.fields("", self.shape, self.spec)
        self.memory = {field.name.lstrip("."): field.view(memory) for field in fields}
        self.product = self.backend(self.spec, self.shape, self.memory)

    @property
    def independent(self) -> bool:
        """Whether a row's product has the same bits alone and among others."""
        return self.backend.independent

    @property
    def as_stored(self) -> bool:
        """Whether W is kept in exactly the bytes that files have of it."""
        return keeps_as_stored(self.backend, self.spec, self.shape)

    def store(self, matrix: QuantizedTensor) -> None:
        self.backend.store(matrix, self.memory)

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.shape[0])
