"""What a model takes of the device's and the host's memory, term by term: plain arithmetic.

The prefill chunk depends on the model and the context alone, and is the same for resident experts. A prompt
that is cut elsewhere rounds elsewhere, so otherwise a smaller budget would change what a model writes.
"""

from dataclasses import dataclass

import torch

from model.attention import Attending
from model.config import ModelConfig
from model.kv_cache import KVCache
from runtime.units import format_bytes

PREFILL_CHUNK = 512  # prompt tokens per forward, at least: enough rows for a product to be compute-bound
MAX_CHUNK = 2048


@dataclass(frozen=True)
class Plan:
    """Where each byte goes, for one session of `context` tokens."""

    context: int  # tokens of KV cache
    chunk: int  # prompt tokens per forward
    trunk_bytes: int  # on the device: embeddings, attention, norms, gates, head, rotary tables
    kv_bytes: int  # on the device
    workspace_bytes: int  # on the device: activations of one chunk, expanded weights
    staging_bytes: int  # on the device, for guesses: spare slots, and gates that look ahead
    slots_bytes: int  # on the device: all layers' slots
    arena_bytes: int  # in host memory: every expert's blob; 0 when all experts are resident
    slots_per_layer: tuple[int, ...]
    spares: int  # slots of no layer, where guessed experts land
    blob_bytes: int  # one expert in memory
    overhead_bytes: int = 0  # on the device: of PyTorch's allocator, or on a CPU of oneDNN's kernels
    driver_bytes: int = 0  # on the device, outside of PyTorch's allocator

    @property
    def resident(self) -> bool:
        """Whether the device holds every expert for good, and there is no arena to bring any from."""
        return self.arena_bytes == 0

    @property
    def device_bytes(self) -> int:
        inside = (
            self.trunk_bytes
            + self.kv_bytes
            + self.workspace_bytes
            + self.staging_bytes
            + self.slots_bytes
            + self.overhead_bytes
        )
        return inside + self.driver_bytes

    @property
    def host_bytes(self) -> int:
        return self.arena_bytes

    def __str__(self) -> str:
        """A line; two where experts are offloaded.

        >>> print(Plan(4096, 2048, 10 << 20, 4 << 20, 6 << 20, 1 << 20, 5 << 20, 16 << 20, (3, 2), 1, 1 << 20))
        26.0 MiB: trunk 10.0 MiB, slots 5.0 MiB, kv 4.0 MiB, workspace 6.0 MiB, staging 1.0 MiB; context 4096 tokens
        slots: 2 in 1 layer, 3 in 1; 1 spare; 1.0 MiB an expert; arena 16.0 MiB of host memory
        """  # noqa: E501
        terms = {
            "trunk": self.trunk_bytes,
            "experts" if self.resident else "slots": self.slots_bytes,
            "kv": self.kv_bytes,
        }
        terms |= {"workspace": self.workspace_bytes}
        terms |= {
            name: size
            for name in ("staging", "overhead", "driver")
            if (size := getattr(self, f"{name}_bytes"))
        }
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms.items())
        line = f"{format_bytes(self.device_bytes)}: {listed}; context {self.context} tokens"
        if self.resident:
            return line
        spares = f"{self.spares} spare{'s' * (self.spares != 1)}"
        return (
            f"{line}\nslots: {describe_slots(self.slots_per_layer)}; {spares}; "
            f"{format_bytes(self.blob_bytes)} an expert; "
            f"arena {format_bytes(self.arena_bytes)} of host memory"
        )


def describe_slots(slots_per_layer: tuple[int, ...]) -> str:
    """
    >>> describe_slots((4, 3, 4, 3, 3)), describe_slots((2, 2))
    ('3 in 3 layers, 4 in 2', '2 in each of 2 layers')
    """
    fewest, layers = min(slots_per_layer), len(slots_per_layer)
    more = sum(slots > fewest for slots in slots_per_layer)
    if not more:
        return f"{fewest} in each of {layers} layers"
    return f"{fewest} in {layers - more} layer{'s' * (layers - more != 1)}, {fewest + 1} in {more}"


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """How many weights the trunk has, less the gates, and how many all experts have."""
    c = config
    attention = 2 * (c.heads + c.kv_heads) * c.head_dim * c.hidden
    trunk = 2 * c.vocab * c.hidden + c.hidden + c.layers * (2 * c.hidden + attention)
    return trunk, c.layers * c.experts * 3 * c.ffn * c.hidden


@dataclass(frozen=True)
class Request:
    """All that a plan depends on; see `plan`."""

    config: ModelConfig
    dtype: torch.dtype
    context: int
    attention: int | None = None
    expert: int | None = None
    scratch: int = 0
    driver: int = 0
    overhead: int = 0
    attending: Attending = Attending.MASK
    budget: int | None = None
    host_budget: int | None = None
    shared: bool = False
    slots: int | None = None
    lookahead: int = 1
    prefetch: int = 1
    offload: str = "auto"

    @property
    def blob(self) -> int:
        """Bytes of one expert."""
        plain = 3 * self.config.ffn * self.config.hidden * self.dtype.itemsize
        return plain if self.expert is None else self.expert

    def used(self, plan: Plan) -> int:
        """Bytes that count against the budget."""
        return plan.device_bytes + (plan.arena_bytes if self.shared else 0)

    def allows(self, plan: Plan) -> bool:
        host = self.host_budget is None or plan.host_bytes <= self.host_budget
        return host and (self.budget is None or self.used(plan) <= self.budget)


def chunk_tokens(request: Request) -> int:
    """Prompt tokens per forward.

    In each chunk, every expert that a layer lacks crosses the link, so long chunks are worth some slots. The
    chunk doubles while its activations take no more than a quarter of what one slot per layer takes.

    A mask or scores of attention are left out of that: with them a longer context could mean a shorter chunk,
    and more slots.
    """
    chunk = PREFILL_CHUNK
    quarter = request.config.layers * request.blob // 4
    while chunk < MAX_CHUNK and 2 * chunk * activation_bytes(request, resident=False) <= quarter:
        chunk *= 2
    return min(chunk, request.context)


def activation_bytes(request: Request, resident: bool) -> int:
    """Of one token, at the widest moment of a layer.

    That is the residual stream, its norm in float32 and back, and either q, k, v turned and attended, or an
    expert's rows through w13. Where experts come as they arrive, their outputs are held until all are there.
    """
    c, wide = request.config, request.dtype.itemsize
    qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
    held = 0 if resident else c.experts_per_token * c.hidden * wide
    return 3 * c.hidden * wide + 2 * c.hidden * 4 + max(4 * qkv, 4 * c.ffn + 2 * c.hidden) * wide + held


def gate_bytes(request: Request) -> int:
    """Of the later layers' gates as lookahead has them; a GPU's decoder has them once more, beneath copies of
    its own."""
    c, distance = request.config, request.lookahead if request.prefetch else 0
    copies = distance if request.shared else 2 * distance + 1
    return c.layers * copies * c.experts * c.hidden * 4 if distance else 0


def lay_out(request: Request, slots_per_layer: tuple[int, ...], resident: bool = False) -> Plan:
    """What these slots come to, with all that goes with them, whether or not it fits."""
    r, c, wide = request, request.config, request.dtype.itemsize
    projections = 2 * (c.heads + c.kv_heads) * c.head_dim * c.hidden  # weights of a layer
    trunk = (count_weights(c)[0] - c.layers * projections) * wide
    trunk += c.layers * (projections * wide if r.attention is None else r.attention)
    trunk += c.layers * c.experts * c.hidden * 4  # gates are float32
    trunk += 2 * c.context * c.head_dim * wide  # rotary tables
    chunk = chunk_tokens(r)
    attending = r.attending.bytes(c, r.dtype, chunk, r.context)
    logits = 4 * c.vocab * 4  # of one token, and copies for the sampler
    spares = 0 if resident else r.lookahead * r.prefetch
    return Plan(
        context=r.context,
        chunk=chunk,
        trunk_bytes=trunk,
        kv_bytes=KVCache.bytes(c, 1, r.context, r.dtype),
        workspace_bytes=chunk * activation_bytes(r, resident) + attending + logits + r.scratch,
        staging_bytes=spares * r.blob + (0 if resident else gate_bytes(r)),
        slots_bytes=sum(slots_per_layer) * r.blob,
        arena_bytes=0 if resident else c.layers * c.experts * r.blob,
        slots_per_layer=slots_per_layer,
        spares=spares,
        blob_bytes=r.blob,
        overhead_bytes=r.overhead,
        driver_bytes=r.driver,
    )
