"""What all ranks' KV caches hold of a text, as rank 0 saves and restores it: tensors travel with orders."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.checkpoint.writer import TensorSpec
from model.kv_cache import KVCache
from runtime.errors import RequestError
from runtime.planning.rank_plans import RankPlans
from runtime.ranks.orders import Kind
from runtime.ranks.pipeline import Pipeline, RemotePass

Result = TypeVar("Result")

UNDER_WAY = 2  # orders: one tensor travels while another is read from the file or written to it


class HeldByRanks:
    """A `Held` over ranks. It takes a turn for each order, so others may compute between two of them."""

    def __init__(
        self, pipeline: Pipeline, plans: RankPlans, alone: Callable[..., Any], kv: KVCache, length: int
    ) -> None:
        """`alone` is `ModelRunner.alone`, and `kv` has rank 0's layers. Raises `RequestError` if ranks
        compute in different dtypes, because a saved session has one."""
        check_dtypes([f"{plan.dtype}".removeprefix("torch.") for plan in plans.plans])
        self.pipeline, self.alone, self.kv, self.length = pipeline, alone, kv, length
        self.own = list(kv.parts(length).values())
        self.layer = kv.layers[0].parts(length)  # all layers' are alike
        self.places = [  # of each tensor: its rank, and its index in that rank's `KVCache.parts`
            (rank, index)
            for rank in (*range(1, len(plans.parts)), 0)  # in the order of layers
            for index in range(plans.parts[rank].layers * len(self.layer))
        ]

    @property
    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(f"layers.{n}.{name}", part.dtype, tuple(part.shape))
            for n in range(len(self.places) // len(self.layer))
            for name, part in self.layer.items()
        ]

    def read(self) -> Iterator[Tensor]:
        return overlapped(self.fetch(*place) for place in self.places)

    def write(self, values: Iterator[Tensor]) -> None:
        stores = (self.store(*place, value) for place, value in zip(self.places, values, strict=True))
        for _ in overlapped(stores):
            pass

    def fetch(self, rank: int, index: int) -> Callable[[], Tensor]:
        if rank == 0:
            return lambda: self.own[index]
        begun = self.order(Kind.FETCH, rank, index)
        like = list(self.layer.values())[index % len(self.layer)]

        def values() -> Tensor:
            rows = self.arrived(begun)
            assert rows is not None
            return rows.view(like.dtype).view(like.shape)

        return values

    def store(self, rank: int, index: int, value: Tensor) -> Callable[[], object]:
        if rank == 0:
            return lambda: self.own[index].copy_(value)
        return partial(self.arrived, self.order(Kind.STORE, rank, index, as_rows(value)))

    def order(self, kind: Kind, rank: int, index: int, rows: Tensor | None = None) -> RemotePass:
        place = self.kv, self.length, rank, index
        begun: RemotePass = self.alone(partial(self.pipeline.send_held, kind, *place, rows))
        return begun

    def arrived(self, begun: RemotePass) -> Tensor | None:
        rows: Tensor | None = self.alone(partial(self.pipeline.arrival, begun))[1]
        return rows


def overlapped(begun: Iterator[Callable[[], Result]]) -> Iterator[Result]:
    """Finish what has begun, in its order, with the next one under way."""
    under_way: deque[Callable[[], Result]] = deque()
    for finish in begun:
        under_way.append(finish)
        if len(under_way) == UNDER_WAY:
            yield under_way.popleft()()
    while under_way:
        yield under_way.popleft()()


def as_rows(part: Tensor) -> Tensor:
    """A tensor of a KV cache as a frame's rows [N, D], with the same bytes.

    >>> as_rows(torch.zeros(1, 2, 5, 8, dtype=torch.int8)).shape  # codes: two of them make a number
    torch.Size([10, 4])
    """
    rows = part.flatten(0, -2)
    return rows.view(torch.float16) if rows.dtype == torch.int8 else rows


def check_dtypes(dtypes: list[str]) -> None:
    """By rank.

    >>> check_dtypes(["bfloat16", "bfloat16"])
    """
    for rank, dtype in enumerate(dtypes):
        if dtype != dtypes[0]:
            raise RequestError(
                f"rank 0 computes in {dtypes[0]} and rank {rank} in {dtype}, and a saved session has one "
                "dtype; load the model with the same --dtype on all ranks"
            )
