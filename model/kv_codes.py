"""Keys and values in 8 bits: the K numbers of a token and kv head are K codes and one scale.

A code is a whole number from -127 to 127, and stands for that many times the scale. The scale is the largest
magnitude of the K numbers over 127, so no number is off by more than half a scale. It is float32 because
float16 ends where the keys of some models do not, and costs 0.25 bits a number in a head of 128.
"""

import torch
from torch import Tensor

MOST = 127  # the largest code
LEAST = torch.finfo(torch.float32).tiny  # the smallest scale, for numbers that are all 0 or nearly
STRETCH = 512  # tokens that `decode` holds in float32 at a time


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [..., K] of any float dtype as codes [..., K] int8 and scales [...] float32.

    If one of the K is not finite, `decode` makes NaN of them all.

    >>> codes, scales = encode(torch.tensor([[1.0, -2.0, 0.008, 0.0]]))
    >>> codes.tolist(), round(scales.item() * 127, 6)
    ([[64, -127, 1, 0]], 2.0)
    """
    wide = x.float()
    scales = (wide.abs().amax(-1) / MOST).clamp_min(LEAST)  # NaN or infinite if a number is
    codes = (wide / scales[..., None]).round_().nan_to_num_(0)
    return codes.to(torch.int8), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of codes [B, G, S, K] and scales [B, G, S], multiplied in float32 and rounded to `dtype`.

    >>> codes, scales = encode(torch.tensor([[[[1.0, -2.0, 0.008, 0.0]]]]))
    >>> [round(x, 3) for x in decode(codes, scales, torch.float32).flatten().tolist()]
    [1.008, -2.0, 0.016, 0.0]
    """
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for start in range(0, codes.shape[2], STRETCH):
        part = slice(start, start + STRETCH)
        x[:, :, part] = codes[:, :, part] * scales[:, :, part, None]
    return x
