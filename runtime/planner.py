"""What a model will take of the device's memory, worked out before anything is allocated."""

from dataclasses import dataclass, fields

import torch

from model.config import ModelConfig
from model.kv_cache import KVCache
from runtime.errors import DeviceError
from runtime.units import format_bytes

PREFILL_CHUNK = 512  # prompt tokens per forward: enough rows for every expert's product to be compute-bound


@dataclass(frozen=True)
class Plan:
    """Where each byte goes, for one session of `context` tokens."""

    context: int  # tokens
    trunk: int  # bytes: embeddings, attention, norms, gates, head, rotary tables
    experts: int  # bytes: all experts of all layers
    kv: int  # bytes
    workspace: int  # bytes: activations of one prefill chunk

    @property
    def total(self) -> int:
        return self.trunk + self.experts + self.kv + self.workspace

    def __str__(self) -> str:
        terms = (f"{field.name} {format_bytes(getattr(self, field.name))}" for field in fields(self)[1:])
        return f"{format_bytes(self.total)}: {', '.join(terms)}; context {self.context} tokens"


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """How many weights the trunk has, less the gates, and how many all experts have."""
    c = config
    attention = 2 * (c.heads + c.kv_heads) * c.head_dim * c.hidden
    trunk = 2 * c.vocab * c.hidden + c.hidden + c.layers * (2 * c.hidden + attention)
    return trunk, c.layers * c.experts * 3 * c.ffn * c.hidden


def plan(config: ModelConfig, dtype: torch.dtype, context: int) -> Plan:
    """The bytes of a model whose experts are all resident.

    >>> mixtral = ModelConfig(
    ...     vocab=32000, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, experts=8,
    ...     experts_per_token=2, context=32768, rope_theta=1e6, norm_eps=1e-5)
    >>> print(plan(mixtral, torch.bfloat16, context=4096))
    87.6 GiB: trunk 3.0 GiB, experts 84.0 GiB, kv 512.0 MiB, workspace 98.5 MiB; context 4096 tokens
    """
    c, wide = config, dtype.itemsize
    trunk_weights, expert_weights = count_weights(c)
    trunk = trunk_weights * wide
    trunk += c.layers * c.experts * c.hidden * 4  # gates are float32
    trunk += 2 * c.context * c.head_dim * wide
    qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
    N = min(PREFILL_CHUNK, context)
    # The widest moment of a layer: the residual stream, its norm in float32 and back, and either q, k, v
    # turned and attended, or an expert's rows through w13; and the mask, as bool and as the kernel's dtype.
    # The logits are one row.
    workspace = N * (3 * c.hidden * wide + 2 * c.hidden * 4 + max(4 * qkv, 4 * c.ffn + 2 * c.hidden) * wide)
    workspace += N * context * (1 + wide) + 4 * c.vocab * 4
    return Plan(
        context=context,
        trunk=trunk,
        experts=expert_weights * wide,
        kv=KVCache.bytes(c, 1, context, dtype),
        workspace=workspace,
    )


def check_budget(plan: Plan, budget: int, place: str) -> None:
    """Raises `DeviceError`, saying what would help, if `plan` needs more than `budget` bytes of `place`."""
    if plan.total <= budget:
        return
    remedy = "use a device with more memory"
    room = (budget - plan.total + plan.kv) * plan.context // plan.kv  # tokens
    if room >= 2:
        remedy = f"lower --context to {room}"
    raise DeviceError(
        f"need {format_bytes(plan.total)} of {place} ({plan}), "
        f"and the budget is {format_bytes(budget)}; {remedy}"
    )
