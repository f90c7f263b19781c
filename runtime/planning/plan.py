"""What a model takes of the device's and the host's memory, term by term.

The prefill chunk depends on the model and the context alone, and not on whether experts are resident. A
prompt that is cut elsewhere rounds elsewhere, so otherwise a smaller budget would change what a model writes.
"""

from dataclasses import dataclass
from typing import Any

import torch

from model.attention import Attending
from model.kv_cache import KVCache
from runtime.experts.arena import pitch
from runtime.experts.tiers import SPARE_BERTHS, SPARE_SLOTS
from runtime.planning.received import as_json, from_json
from runtime.planning.request import Request
from runtime.units import format_bytes

PREFILL_CHUNK = 512  # prompt tokens per forward, at least: enough rows for a product to be compute-bound
MAX_CHUNK = 2048
# Chunks of hidden states that a rank has besides the one that it computes. On a CPU, two have arrived and two
# leave. A GPU keeps those that leave until they are sent.
CHUNKS_UNDER_WAY = {"cpu": 4, "cuda": 2}


@dataclass(frozen=True)
class Plan:
    """Where each byte goes, for `parallel` texts of `context` tokens."""

    device: torch.device
    dtype: torch.dtype  # of activations, and of weights that are not quantized
    context: int  # tokens of KV cache
    chunk: int  # prompt tokens per forward
    trunk_bytes: int  # on the device: embeddings, attention, norms, gates, head, rotary tables
    kv_bytes: int  # on the device
    workspace_bytes: int  # on the device: activations of one chunk, expanded weights
    staging_bytes: int  # on the device, for guesses: spare slots, and gates that look ahead
    slots_bytes: int  # on the device: all layers' slots
    arena_bytes: int  # in host memory: all berths; 0 if all experts are resident
    slots_per_layer: tuple[int, ...]
    spares: int  # slots of no layer: guessed experts land there, or leave through them for a berth
    blob_bytes: int  # one expert in memory
    overhead_bytes: int = 0  # on the device: of PyTorch's allocator, or on a CPU of oneDNN's kernels
    driver_bytes: int = 0  # on the device, outside of PyTorch's allocator
    mapped_bytes: int = 0  # of files that a CPU computes from; not allocated, and in none of the terms above
    experts: int = 0  # of all layers together, as the two below
    berths: int = 0  # in host memory; 0 if all experts are resident
    file_experts: int = 0  # that find no room in slots and berths, and have to be read again and again
    misses: str = "copy"  # how to get an expert that no slot has
    link_gbps: float | None = None  # from host memory to the device; None if unknown
    disk_gbps: float | None = None  # from files to host memory; None if unknown
    direct_reads: bool = True  # past the system's page cache, where the file system can do that
    cpu_gbps: float | None = None  # of packed experts that the CPU computes; None if unknown
    parallel: int = 1  # KV caches
    kv: int = 16  # bits of a key's or value's number; 16 stands for the dtype

    @property
    def resident(self) -> bool:
        """Whether the device holds every expert for good, and there is no arena to bring any from."""
        return self.arena_bytes == 0

    @property
    def tiered(self) -> bool:
        """Whether host memory has fewer berths than there are experts, so that some are read from files."""
        return 0 < self.berths < self.experts

    @property
    def host_miss_seconds(self) -> float | None:
        """How long an expert takes from host memory to the device; None if the link's rate is unknown."""
        return self.blob_bytes / self.link_gbps / 1e9 if self.link_gbps else None

    @property
    def file_miss_seconds(self) -> float | None:
        """How long an expert takes from a file to the device; None if the disk's rate is unknown. It is read
        and copied piece by piece, so the slower of both counts."""
        read = self.blob_bytes / self.disk_gbps / 1e9 if self.disk_gbps else None
        return read and max(read, self.host_miss_seconds or 0)

    @property
    def device_bytes(self) -> int:
        """All that the device holds, without what is mapped."""
        inside = self.trunk_bytes + self.kv_bytes + self.workspace_bytes + self.staging_bytes
        return inside + self.slots_bytes + self.overhead_bytes + self.driver_bytes

    @property
    def host_bytes(self) -> int:
        """All that the host holds for the device."""
        return self.arena_bytes

    @property
    def where(self) -> str:
        """The dtype and the device, like "bfloat16 on cuda:0"."""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"

    def as_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has."""
        made: dict[str, Any] = as_json(self)
        return made

    @staticmethod
    def from_dict(value: object) -> "Plan":
        """The plan that `as_dict` wrote, in another process. Raises `DeviceError` for anything else."""
        return from_json(Plan, value, "a rank's plan")

    def __str__(self) -> str:
        """One line, or two if experts are offloaded.

        >>> sizes = (size << 20 for size in (10, 4, 6, 1, 5, 16))
        >>> print(Plan(torch.device("cpu"), torch.float32, 4096, 2048, *sizes, (3, 2), 1, 1 << 20))
        26.0 MiB: trunk 10.0 MiB, slots 5.0 MiB, kv 4.0 MiB, workspace 6.0 MiB, staging 1.0 MiB; context 4096 tokens
        slots: 2 in 1 layer, 3 in 1; 1 spare; 1.0 MiB an expert; arena 16.0 MiB of host memory
        """  # noqa: E501
        experts = "experts" if self.resident else "slots"
        terms = {"trunk": self.trunk_bytes}
        if self.slots_bytes:
            terms[experts] = self.slots_bytes
        terms["kv"] = self.kv_bytes
        terms["workspace"] = self.workspace_bytes
        rest = {name: getattr(self, f"{name}_bytes") for name in ("staging", "overhead", "driver")}
        terms |= {name: size for name, size in rest.items() if size}
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms.items())
        mapped = f"{format_bytes(self.mapped_bytes)} of files mapped; " if self.mapped_bytes else ""
        each = f"{self.parallel} times " if self.parallel > 1 else ""
        line = f"{format_bytes(self.device_bytes)}: {listed}; {mapped}context {each}{self.context} tokens"
        if self.resident:
            return line
        spares = f"{self.spares} spare{'s' * (self.spares != 1)}"
        slots = (
            f"{line}\nslots: {describe_slots(self.slots_per_layer)}; {spares}; "
            f"{format_bytes(self.blob_bytes)} an expert; "
            f"arena {format_bytes(self.arena_bytes)} of host memory"
        )
        return f"{slots}\n{self.describe_tiers()}" if self.tiered or self.costs_of_misses else slots

    def describe_tiers(self) -> str:
        """Where experts are, and what it takes to bring one to the device.

        >>> few = {"experts": 20, "berths": 12, "file_experts": 5, "link_gbps": 12.0, "disk_gbps": 2.0}
        >>> sizes = (size << 20 for size in (10, 4, 6, 1, 5, 16))
        >>> plan = Plan(torch.device("cuda"), torch.float16, 4096, 2048, *sizes, (3, 2), 3, 60_000_000, **few)
        >>> print(plan.describe_tiers())
        tiers: 5 slots, 12 berths, 5 experts read from files; a miss takes 5 ms from host memory (12 GB/s), 30 ms from files (2 GB/s)
        """  # noqa: E501
        places = f"tiers: {sum(self.slots_per_layer)} slots, {self.berths} berths"
        if self.tiered:
            places += f", {self.file_experts} experts read from files"
        costs = self.costs_of_misses
        return f"{places}; a miss takes {', '.join(costs)}" if costs else places

    @property
    def costs_of_misses(self) -> list[str]:
        """What a missing expert takes from each place, with the rates. Rates that a load measures have three
        digits, so the plan shows all of them."""
        costs = []
        if self.host_miss_seconds and self.link_gbps:
            costs.append(
                f"{milliseconds(self.host_miss_seconds)} from host memory ({self.link_gbps:.3g} GB/s)"
            )
        if self.file_miss_seconds and self.disk_gbps and self.tiered:
            costs.append(f"{milliseconds(self.file_miss_seconds)} from files ({self.disk_gbps:.3g} GB/s)")
        if self.cpu_gbps and self.misses != "copy":
            took = milliseconds(self.blob_bytes / self.cpu_gbps / 1e9)
            costs.append(f"{took} computed on the CPU ({self.cpu_gbps:.3g} GB/s)")
        return costs


def milliseconds(seconds: float) -> str:
    """A time with two digits, or with as many as it has before the point.

    >>> milliseconds(0.0055336), milliseconds(0.0351), milliseconds(0.0996), milliseconds(1.2345)
    ('5.5 ms', '35 ms', '100 ms', '1234 ms')
    """
    ms = 1000 * seconds
    return f"{ms:.2g} ms" if ms < 99.5 else f"{ms:.0f} ms"


def describe_slots(slots_per_layer: tuple[int, ...]) -> str:
    """Say how many slots layers have, for a message.

    >>> describe_slots((4, 3, 4, 3, 3)), describe_slots((2, 2))
    ('3 in 3 layers, 4 in 2', '2 in each of 2 layers')
    """
    fewest, layers = min(slots_per_layer), len(slots_per_layer)
    more = sum(slots > fewest for slots in slots_per_layer)
    if not more:
        return f"{fewest} in each of {layers} layers"
    return f"{fewest} in {layers - more} layer{'s' * (layers - more != 1)}, {fewest + 1} in {more}"


def lay_out(
    request: Request, slots_per_layer: tuple[int, ...], resident: bool = False, berths: int | None = None
) -> Plan:
    """The plan with these slots, whether or not it fits. By default the berths are as many as the options
    say, or one for every expert."""
    r, c, costs, wide = request, request.config, request.costs, request.dtype.itemsize
    berths = 0 if resident else min(berths or r.options.berths or r.experts, r.experts)
    tiered = 0 < berths < r.experts
    trunk = costs.embedding_bytes + costs.head_bytes + c.layers * costs.attention_bytes
    trunk += (r.heads + 2 * c.layers) * c.hidden * wide  # norms
    trunk += c.layers * c.experts * c.hidden * 4  # gates are float32
    trunk += 2 * c.context * c.head_dim * wide  # rotary tables
    chunk = chunk_tokens(r)
    attending = costs.attending.bytes(c, r.dtype, chunk, r.context)
    if costs.attending is not Attending.ROWS:
        attending += KVCache.decoded_bytes(c, r.context, r.dtype, r.options.kv)
    logits = (3 + r.options.parallel) * c.vocab * 4  # of a token of each text, and copies for the sampler
    alone = r.embeds and r.heads
    travelling = 0 if alone else CHUNKS_UNDER_WAY[r.target.device.type] * chunk * c.hidden * wide
    ends = r.heads * logits + travelling
    mapped_experts = c.layers * c.experts * costs.mapped_expert_bytes if resident else 0
    spares = 0 if resident else r.options.lookahead * r.options.prefetch + tiered * SPARE_SLOTS
    homeless = r.experts + SPARE_BERTHS - berths - sum(slots_per_layer)
    return Plan(
        device=r.target.device,
        dtype=r.dtype,
        context=r.context,
        chunk=chunk,
        trunk_bytes=trunk,
        kv_bytes=r.options.parallel * KVCache.bytes(c, 1, r.context, r.dtype, r.options.kv),
        workspace_bytes=chunk * activation_bytes(r, resident) + attending + ends + costs.scratch_bytes,
        staging_bytes=spares * costs.blob_bytes + (0 if resident else gate_bytes(r)),
        slots_bytes=0 if mapped_experts else sum(slots_per_layer) * costs.blob_bytes,
        arena_bytes=berths * berth_bytes(r, tiered),
        slots_per_layer=slots_per_layer,
        spares=spares,
        blob_bytes=costs.blob_bytes,
        overhead_bytes=costs.overhead_bytes,
        driver_bytes=costs.driver_bytes,
        mapped_bytes=c.layers * costs.mapped_attention_bytes + costs.mapped_ends_bytes + mapped_experts,
        experts=r.experts,
        berths=berths,
        file_experts=max(homeless, 0) if tiered else 0,
        misses=r.options.misses,
        link_gbps=r.options.link_gbps,
        disk_gbps=r.options.disk_gbps,
        cpu_gbps=r.options.cpu_gbps,
        parallel=r.options.parallel,
        kv=r.options.kv,
    )


def berth_bytes(request: Request, tiered: bool) -> int:
    """What a berth takes. With `tiered` there are fewer berths than experts."""
    return pitch(request.costs.blob_bytes, pin=not request.shared, tiered=tiered)


def chunk_tokens(request: Request) -> int:
    """Prompt tokens per forward.

    In each chunk, every expert that a layer lacks crosses the link, so long chunks are worth some slots. The
    chunk doubles while its activations take no more than a quarter of one slot per layer. The memory of
    attention's mask or scores does not count here: it grows with the context, so a longer context could
    otherwise mean a shorter chunk and more slots.

    A part of a model has the chunk that the request says, which is that of the whole.
    """
    if request.chunk is not None:
        return min(request.chunk, request.context)
    chunk = PREFILL_CHUNK
    quarter = request.config.layers * request.costs.blob_bytes // 4
    while chunk < MAX_CHUNK and 2 * chunk * activation_bytes(request, resident=False) <= quarter:
        chunk *= 2
    return min(chunk, request.context)


def activation_bytes(request: Request, resident: bool) -> int:
    """What one token's activations take, at the widest moment of a layer.

    That is the residual stream, its norm in float32 and back, and the larger of two: q, k, v, rotated and
    attended, or an expert's rows through w13. Offloaded experts' outputs are held until all are there.
    """
    c, wide = request.config, request.dtype.itemsize
    qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
    held = 0 if resident else c.experts_per_token * c.hidden * wide
    return 3 * c.hidden * wide + 2 * c.hidden * 4 + max(4 * qkv, 4 * c.ffn + 2 * c.hidden) * wide + held


def gate_bytes(request: Request) -> int:
    """What later layers' gates take, as lookahead combines them with each layer's own. A GPU's decoder holds
    them a second time, below a copy of the layer's own gate."""
    c, options = request.config, request.options
    distance = options.lookahead if options.prefetch else 0
    copies = distance if request.shared else 2 * distance + 1
    return c.layers * copies * c.experts * c.hidden * 4 if distance else 0
