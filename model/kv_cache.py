"""The keys and values of the tokens so far. The caller owns them and may cut them back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


class LayerKV:
    """One layer's keys and values, [B, G, C, K] each, with room for C tokens."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k = k
        self.v = v

    def append(self, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:  # [B, G, T, K] each
        """Store T tokens after the first `past`; return views of all, [B, G, past + T, K] each."""
        end = past + k.shape[2]
        self.k[:, :, past:end] = k
        self.v[:, :, past:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]

    def parts(self, length: int) -> dict[str, Tensor]:
        """Views of all that is stored of the first `length` tokens, by name."""
        return {"keys": self.k[:, :, :length], "values": self.v[:, :, :length]}


@dataclass(eq=False)
class KVCache:
    """All layers' keys and values."""

    layers: list[LayerKV]
    batch: int
    capacity: int  # tokens
    length: int = 0  # tokens stored; a forward moves it after its last layer

    @staticmethod
    def allocate(
        config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        """An empty KV cache in one tensor, because a GPU's allocator rounds every tensor up. One that is made
        in inference mode can be used outside of it."""
        shape = (config.layers, 2, batch, config.kv_heads, capacity, config.head_dim)
        with torch.inference_mode(False):
            memory = torch.zeros(shape, dtype=dtype, device=device)
            return KVCache([LayerKV(k, v) for k, v in memory], batch, capacity)

    @staticmethod
    def bytes(config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype) -> int:
        """The bytes that `allocate` takes on the device."""
        return 2 * config.layers * batch * config.kv_heads * capacity * config.head_dim * dtype.itemsize

    def parts(self, length: int) -> dict[str, Tensor]:
        """Views of all that is stored of the first `length` tokens, by name, such as `layers.0.keys`
        [B, G, length, K]. Who writes all of them and sets `length` has restored a text's keys and values.
        """
        return {
            f"layers.{n}.{name}": part
            for n, layer in enumerate(self.layers)
            for name, part in layer.parts(length).items()
        }

    def copy_from(self, other: "KVCache", length: int) -> None:
        """Hold the first `length` tokens of another KV cache of the same model, and nothing else."""
        mine, theirs = self.parts(length), other.parts(length)
        for name, part in mine.items():
            part.copy_(theirs[name])
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on. Raises `ValueError` if there are fewer.

        >>> kv = KVCache([], batch=1, capacity=8, length=5)
        >>> kv.truncate(3); kv.length
        3
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a KV cache of {self.length} tokens to {length}")
        self.length = length
