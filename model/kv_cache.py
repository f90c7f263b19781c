"""The keys and values of the tokens so far. The caller owns them and may cut them back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kv_codes import STRETCH, decode, encode

BITS = (8, 16)  # 16 stands for the dtype that the model computes in

# Keys and values [B, G, S, K], and the scales [B, G, C] float32 of each if they are codes.
Stored = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]


class LayerKV:
    """One layer's keys and values, [B, G, C, K] each, with room for C tokens.

    With `scales`, two tensors [B, G, C] float32, `k` and `v` are the codes of `model.kv_codes`.
    """

    def __init__(self, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor] | None = None) -> None:
        self.k = k
        self.v = v
        self.scales = scales

    def append(self, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:  # [B, G, T, K] each
        """Store T tokens after the first `past`; return all, [B, G, past + T, K] each.

        Without scales they are views. With scales they are decoded, the new tokens too: so a token is seen as
        the same numbers by those of its own forward and by all later ones.
        """
        keys, values, scales = self.store(k, v, past)
        if scales is None:
            return keys, values
        end = keys.shape[2]
        return tuple(  # type: ignore[return-value]
            decode(codes, scale[:, :, :end], k.dtype)
            for codes, scale in zip((keys, values), scales, strict=True)
        )

    def store(self, k: Tensor, v: Tensor, past: int) -> Stored:
        """The same, but codes are returned as they are."""
        end = past + k.shape[2]
        if self.scales is None:
            self.k[:, :, past:end] = k
            self.v[:, :, past:end] = v
        else:
            (k_scales, v_scales), there = self.scales, slice(past, end)
            self.k[:, :, there], k_scales[:, :, there] = encode(k)
            self.v[:, :, there], v_scales[:, :, there] = encode(v)
        return self.k[:, :, :end], self.v[:, :, :end], self.scales

    def parts(self, length: int) -> dict[str, Tensor]:
        """Views of all that is stored of the first `length` tokens, by name."""
        tensors = {"keys": self.k, "values": self.v}
        if self.scales is not None:
            tensors |= dict(zip(("key_scales", "value_scales"), self.scales, strict=True))
        return {name: tensor[:, :, :length] for name, tensor in tensors.items()}


@dataclass(eq=False)
class KVCache:
    """All layers' keys and values."""

    layers: list[LayerKV]
    batch: int
    capacity: int  # tokens
    length: int = 0  # tokens stored; a forward moves it after its last layer

    @staticmethod
    def allocate(
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        bits: int = 16,
    ) -> "KVCache":
        """An empty KV cache of numbers in `dtype`, or with 8 `bits` of codes. It is in one tensor, because a
        GPU's allocator rounds every tensor up. One that is made in inference mode can be used outside of
        it."""
        shape = (config.layers, 2, batch, config.kv_heads, capacity, config.head_dim)
        with torch.inference_mode(False):
            if bits == 16:
                memory = torch.zeros(shape, dtype=dtype, device=device)
                return KVCache([LayerKV(k, v) for k, v in memory], batch, capacity)
            memory = torch.zeros(
                KVCache.bytes(config, batch, capacity, dtype, bits), dtype=torch.int8, device=device
            )
            end = math.prod(shape)  # a multiple of 4, since rotation takes an even K
            codes, scales = memory[:end].view(shape), memory[end:].view(torch.float32).view(shape[:-1])
            pairs = zip(codes, scales, strict=True)
            return KVCache([LayerKV(k, v, (ks, vs)) for (k, v), (ks, vs) in pairs], batch, capacity)

    @staticmethod
    def bytes(config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, bits: int = 16) -> int:
        """The bytes that `allocate` takes on the device."""
        vectors = 2 * config.layers * batch * config.kv_heads * capacity  # of K numbers
        return vectors * (config.head_dim * dtype.itemsize if bits == 16 else config.head_dim + 4)

    @staticmethod
    def decoded_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, bits: int = 16) -> int:
        """The bytes that one layer's decoded keys and values of a text take while attention computes."""
        if bits == 16:
            return 0
        return config.kv_heads * config.head_dim * (2 * tokens * dtype.itemsize + 4 * min(tokens, STRETCH))

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
