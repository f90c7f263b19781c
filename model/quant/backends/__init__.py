"""How a quantized matrix is kept in memory and multiplied: one file per way, all behind `Backend`."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from model.quant.spec import QuantSpec
from model.quant.streams import Field
from model.quant.tensor import QuantizedTensor


class Backend(Protocol):
    """One matrix [N, K], bound to the memory that holds it.

    The memory belongs to the caller, who may put another matrix of the same format there: a slot of experts.
    """

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], memory: Mapping[str, Tensor]) -> None:
        """`memory` has the tensors that `fields` lists, by the last part of their names."""
        ...

    def __call__(self, x: Tensor) -> Tensor:  # [M, K] -> [M, N]
        """`x @ W.T` in x's dtype, which is the one that the backend was chosen for."""
        ...

    @staticmethod
    def fields(name: str, shape: Sequence[int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        """What it keeps of a matrix, one directly after the other from `offset`."""
        ...

    @staticmethod
    def store(matrix: QuantizedTensor, memory: Mapping[str, Tensor]) -> None:
        """Bring a matrix, as files have it, into the form that this backend keeps."""
        ...
