"""Tiers over links that take copies and do them later, as a GPU's streams do. Each direction has a stream,
and nothing but marks orders them."""

import queue
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime import RequestError
from runtime.experts.link import HostLink
from runtime.experts.split import Split


class Mark(threading.Event):
    """An event on a stream. The disk's thread waits for it as for CUDA's."""

    def synchronize(self) -> None:
        assert self.wait(30)


class Stream(HostLink):
    """A thread that does one copy after the other, and waits for marks of other streams before it goes on."""

    def __init__(self, seed: int, piece: int, delay: float = 1e-3) -> None:
        """Some copies come up to `delay` seconds late."""
        super().__init__()
        self.piece, self.random, self.delay = piece, random.Random(seed), delay
        self.work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while (do := self.work.get()) is not None:
            if self.random.random() < 0.1:
                time.sleep(self.random.random() * self.delay)
            do()

    def blocks(self, source: Tensor) -> bool:
        return False

    def begin(self, free: Mark | None) -> None:
        if free is not None:
            self.work.put(free.synchronize)

    def move(self, source: Tensor, target: Tensor, demand: bool) -> Mark:  # type: ignore[override]
        mark = Mark()
        self.work.put(partial(target.copy_, source))
        self.work.put(mark.set)
        return mark

    def reached(self, mark: Mark) -> None:
        mark.synchronize()

    def settle(self) -> None:
        idle = Mark()
        self.work.put(idle.set)
        idle.synchronize()

    def close(self) -> None:
        self.work.put(None)
        self.thread.join()


class Unordered(Stream):
    """Ignores the marks of other streams."""

    def begin(self, free: Mark | None) -> None:
        pass


returned: list[int] = []  # bytes that each text copied back


def wrong(
    rig: Any, sample: Any, kind: type[Stream], case: dict[str, Any], seed: int, delay: float = 1e-3
) -> bool:
    """Whether a text over such streams differs from the resident engine's. Copies back have the delay."""
    ids, size = rig.ids(9, seed), rig.form.blob_bytes // 3
    with rig.cached(link=kind(seed, size), back=kind(seed + 1, size, delay), **case) as cache:
        right = torch.equal(rig.engine.logits(ids), rig.logits(ids))
        try:
            right = right and sample(rig.engine, ids, 24) == rig.tokens(ids, 24)
        except RequestError:  # some bytes are no numbers
            right = False
        returned.append(cache.store.channels.back.moved)
    return not right


def test_streams_are_ordered_by_marks_alone(rigs: Any, sample: Any) -> None:
    rig = rigs(4)

    @settings(max_examples=20)
    @given(
        case=st.fixed_dictionaries(
            {
                "slots": st.integers(2, 5), "berths": st.integers(2, 24), "lookahead": st.integers(0, 2),
                "prefetch": st.integers(0, 3), "policy": st.sampled_from(("lru", "lfu", "random", "static")),
            }
        ),
        seed=st.integers(0, 99),
    )  # fmt: skip
    def all_cases(case: dict[str, Any], seed: int) -> None:
        assert not wrong(rig, sample, Stream, case, seed)

    returned.clear()
    all_cases()
    assert sum(size > 0 for size in returned) > len(returned) / 2


def test_the_host_computes_what_comes_back(rigs: Any, sample: Any) -> None:
    """From a berth whose bytes are still on their way, and that a read or a copy back will overwrite."""
    rig = rigs(4, "bfloat16")

    @settings(max_examples=10)
    @given(
        case=st.fixed_dictionaries(
            {
                "slots": st.integers(2, 4), "berths": st.integers(2, 20), "lookahead": st.integers(0, 2),
                "policy": st.sampled_from(("lru", "random")),
            }
        ),
        seed=st.integers(0, 99),
        demand=st.booleans(),
    )  # fmt: skip
    def all_cases(case: dict[str, Any], seed: int, demand: bool) -> None:
        split = Split(copy=1.0, compute=0.7, demand=demand)
        assert not wrong(rig, sample, Stream, case | {"split": split}, seed, delay=0.005)

    all_cases()


def test_without_marks_bytes_get_mixed_up(rigs: Any, sample: Any) -> None:
    """The test above can fail."""
    rig = rigs(4)
    case = {"slots": 2, "berths": 6, "lookahead": 1, "prefetch": 2}
    assert any(wrong(rig, sample, Unordered, case, seed, delay=0.1) for seed in range(20))


@pytest.mark.parametrize("berths", [2, 10])
def test_a_forward_that_is_broken_off(
    rigs: Any, sample: Any, berths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are still in the streams when the next forward begins with empty slots."""
    rig = rigs(4)
    size = rig.form.blob_bytes // 3
    with rig.cached(3, berths=berths, prefetch=2, link=Stream(1, size), back=Stream(2, size)) as cache:
        compute = cache.compute
        for countdown in range(5, 60, 6):
            left = countdown

            def breaking(*arguments: Any) -> Tensor:
                nonlocal left
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
                return compute(*arguments)

            monkeypatch.setattr(cache, "compute", breaking)
            with pytest.raises(KeyboardInterrupt):
                sample(rig.engine, rig.ids(9), 12)
            monkeypatch.setattr(cache, "compute", compute)
            assert sample(rig.engine, rig.ids(9), 12) == rig.tokens(rig.ids(9), 12)
