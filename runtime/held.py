"""What KV caches hold of a text, as saving and restoring see it: one tensor after the other.

In one process these are the parts of one KV cache. Over ranks (`runtime.ranks.held`) each rank holds those of
its own layers. They have the names that one process would give them.
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from model.checkpoint.writer import TensorSpec
from model.kv_cache import KVCache


class Held(Protocol):
    """All layers' keys and values of the first `length` tokens of a text, in the order of `KVCache.parts`."""

    @property
    def specs(self) -> list[TensorSpec]:
        """What there is, [B, G, length, K] or [B, G, length] each."""
        ...

    def read(self) -> Iterator[Tensor]:
        """The values of each. Each has to be used before the next one is taken. Raises `RequestError` if
        another rank fails or is gone."""
        ...

    def write(self, values: Iterator[Tensor]) -> None:
        """Store values, which are on the CPU and are taken one by one. The caller sets `KVCache.length` when
        all have been stored. Raises `RequestError` as `read` does."""
        ...


class HeldHere:
    """In a KV cache of all layers."""

    def __init__(self, kv: KVCache, length: int) -> None:
        self.parts = kv.parts(length)

    @property
    def specs(self) -> list[TensorSpec]:
        return [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in self.parts.items()]

    def read(self) -> Iterator[Tensor]:
        return iter(self.parts.values())

    def write(self, values: Iterator[Tensor]) -> None:
        for part, value in zip(self.parts.values(), values, strict=True):
            part.copy_(value)
