"""The plans of all ranks, and what crosses between them: what rank 0 prints."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from model.part import Part
from runtime.planning.plan import Plan
from runtime.units import format_bytes

ID_BYTES = 8  # of a token's id


@dataclass(frozen=True)
class Hop:
    """What goes from a rank to the next one for each token, of a prompt or decoded."""

    sender: int
    receiver: int
    token_bytes: int
    chunk_bytes: int  # for a whole chunk of a prompt


@dataclass(frozen=True)
class RankPlans:
    """By rank, its part of the model, its plan and the name of its machine."""

    parts: Sequence[Part]
    plans: Sequence[Plan]
    hosts: Sequence[str]
    hidden: int  # numbers of a hidden state

    @property
    def hops(self) -> list[Hop]:
        """In the order of the ring, from rank 0, which sends ids. The others send hidden states in their own
        dtype. A single rank sends nothing."""
        P = len(self.plans)
        sizes = [
            self.hidden * plan.dtype.itemsize if rank else ID_BYTES for rank, plan in enumerate(self.plans)
        ]
        chunk = self.plans[0].chunk
        return [Hop(rank, (rank + 1) % P, size, chunk * size) for rank, size in enumerate(sizes) if P > 1]

    def __str__(self) -> str:
        """For each rank its layers, and its plan as `Plan` writes it; then what crosses.

        >>> import torch
        >>> sizes = tuple(size << 20 for size in (10, 4, 6, 0, 20, 0))
        >>> plan = Plan(torch.device("cpu"), torch.bfloat16, 4096, 2048, *sizes, (4, 4), 0, 1 << 20)
        >>> parts = Part(2, 2, embeds=False, heads=True), Part(0, 2, embeds=True, heads=False)
        >>> print(RankPlans(parts, (plan, plan), ("box", "attic"), 4096))
        rank 0 on box: layers 2 to 3 and the head, in bfloat16 on cpu, 40.0 MiB: trunk 10.0 MiB, experts 20.0 MiB, kv 4.0 MiB, workspace 6.0 MiB; context 4096 tokens
        rank 1 on attic: embeddings and layers 0 to 1, in bfloat16 on cpu, 40.0 MiB: trunk 10.0 MiB, experts 20.0 MiB, kv 4.0 MiB, workspace 6.0 MiB; context 4096 tokens
        rank 0 to 1: 8 B a token, 16.0 KiB a chunk of a prompt
        rank 1 to 0: 8.0 KiB a token, 16.0 MiB a chunk of a prompt
        """  # noqa: E501
        ranks = zip(self.parts, self.plans, self.hosts, strict=True)
        lines = [
            f"rank {rank} on {host}: {describe(part)}, in {plan.where}, {plan}"
            for rank, (part, plan, host) in enumerate(ranks)
        ]
        return "\n".join([*lines, self.crossing] if self.hops else lines)

    @property
    def crossing(self) -> str:
        """The hops, those of the same size on one line."""
        lines = []
        for size, hops in groupby(self.hops, key=lambda hop: hop.token_bytes):
            found = list(hops)
            where = ", ".join(f"{hop.sender} to {hop.receiver}" for hop in found)
            chunk = format_bytes(found[0].chunk_bytes)
            lines.append(f"rank {where}: {format_bytes(size)} a token, {chunk} a chunk of a prompt")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON has."""
        ranks = zip(self.parts, self.plans, self.hosts, strict=True)
        return {
            "ranks": [
                {"rank": rank, "host": host, "first_layer": part.first, "layers": part.layers}
                | plan.as_dict()
                for rank, (part, plan, host) in enumerate(ranks)
            ],
            "hops": [vars(hop) for hop in self.hops],
        }


def describe(part: Part) -> str:
    """The layers of a part, and what else it has.

    >>> describe(Part(0, 1, embeds=True, heads=True))
    'embeddings and layer 0 and the head'
    """
    last = part.first + part.layers - 1
    layers = f"layers {part.first} to {last}" if part.layers > 1 else f"layer {last}"
    return "embeddings and " * part.embeds + layers + " and the head" * part.heads
