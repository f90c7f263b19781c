"""How well a model predicts texts it has never seen, in bits per byte of the text."""

import math

import torch
import torch.nn.functional as F

from model.mixtral import Mixtral


@torch.inference_mode()
def negative_log_likelihood(model: Mixtral, ids: list[int], window: int, stride: int) -> float:
    """Sum over ids[1:] of -ln p(id | those before it), in nats, with at most `window` tokens in view.

    Windows start `stride` tokens apart, and each scores only the tokens that the one before did not reach, so
    all but the first window's have at least `window - stride` tokens of context.
    """
    device = model.embed_tokens.weight.device
    total, scored = 0.0, 1
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        if end > scored:
            view = torch.tensor(ids[start:end], device=device)
            logits = model(view[None, :-1])[0, scored - start - 1 :].float()  # [end - scored, V]
            total += F.cross_entropy(logits, view[scored - start :], reduction="sum").item()
            scored = end
    return total


def bits_per_byte(model: Mixtral, texts: list[list[int]], size: int) -> float:
    """Bits that the texts' ids (each beginning with BOS) cost under the model, over their `size` in bytes."""
    window = model.config.context
    nats = sum(negative_log_likelihood(model, ids, window, window // 2) for ids in texts)
    return nats / math.log(2) / size
