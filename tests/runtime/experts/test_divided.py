"""Missed experts that the host computes: where each is computed is what an independent simulation of the rule
says, whatever the delays, and the sums are those of plain PyTorch."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.mixtral import Block
from model.quant.expert import BlobExperts
from model.router import Choice
from runtime import RequestError
from runtime.experts.host import HostExperts, Job
from runtime.experts.split import Split
from runtime.experts.trace import Miss
from tests.runtime.experts.interrupts import Thrown
from tests.runtime.experts.test_bookkeeping import Layer

COUNT = 8


class Reference:
    """Computes a resident engine's experts as a divided cache must: a simulation that shares no code with the
    runtime says where, and each token's two sums are spelled out."""

    def __init__(
        self, rig: Any, slots: int | list[int], policy: str, lookahead: int, prefetch: int, split: Split
    ) -> None:
        self.rig, self.prefetch = rig, prefetch
        self.spares = lookahead * prefetch
        self.copy, self.host, self.demand = split.copy, split.compute, split.demand
        counts = [slots] * rig.layers if isinstance(slots, int) else slots
        self.tables = [Layer(n, count, policy) for n, count in enumerate(counts)]
        self.spare: list[tuple[int, int]] = []  # guesses
        self.queue: list[list[Any]] = []  # [(layer, expert), seconds left], first sent first
        self.pace = self.host
        self.by_host = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        model = self.rig.resident.model
        blocks = [cast(Block, block).block_sparse_moe for block in model.layers]
        known = [block.experts for block in blocks]
        model.look_ahead(self.spares // max(self.prefetch, 1))
        for n, block in enumerate(blocks):
            block.experts = self.layer(n, known[n])  # type: ignore[assignment]
        try:
            yield
        finally:
            model.look_ahead(0)
            for block, experts in zip(blocks, known, strict=True):
                block.experts = experts

    def layer(self, number: int, resident: BlobExperts) -> Callable[[Tensor, Choice], Tensor]:
        def apply(x: Tensor, choice: Choice) -> Tensor:
            ahead = [] if choice.ranking is None else choice.ranking.tolist()
            if len(x) > 1:
                self.prompt(number, choice)
                return resident(x, choice)
            ids, weights = choice.ids[0].tolist(), choice.weights[0].to(x.dtype)
            by_host = self.token(number, sorted(ids), ahead)
            self.by_host += len(by_host)
            sums: list[Tensor | None] = [None, None]
            for e in sorted(ids):
                part = resident.experts[e](x) * weights[ids.index(e)]
                which, known = int(e in by_host), sums[e in by_host]
                sums[which] = part if known is None else known + part
            device, host = sums
            if device is None or host is None:
                return cast(Tensor, host if device is None else device)
            return device + host

        return apply

    def prompt(self, layer: int, choice: Choice) -> None:
        last = {e: row for row, ids in enumerate(choice.ids.tolist()) for e in ids}
        self.queue.clear()
        self.tables[layer].step(tuple(sorted(last, key=lambda e: (last[e], e))))

    def left(self, layer: int, e: int) -> float | None:
        return next((left for key, left in self.queue if key == (layer, e)), None)

    def drop(self, layer: int, e: int) -> None:
        self.queue = [entry for entry in self.queue if entry[0] != (layer, e)]

    def token(self, layer: int, needed: list[int], ahead: list[list[int]]) -> set[int]:
        """The experts that the host computes."""
        table = self.tables[layer]
        self.spare, wrong = (
            [g for g in self.spare if g[0] != layer or g[1] in needed],
            [g for g in self.spare if g[0] == layer and g[1] not in needed],
        )
        for guess in wrong:
            self.drop(*guess)
        missing = [e for e in needed if e not in table.here]
        waits = sum(self.left(layer, e) or 0.0 for e in needed if e not in missing)
        guessed = {e for e in missing if (layer, e) in self.spare}
        costs = {e: cast(float, self.left(layer, e)) if e in guessed else self.copy for e in missing}
        order = sorted(missing, key=lambda e: (costs[e], e not in guessed, e))
        ways = []
        for k in range(len(missing) + 1):
            if self.demand or set(order[:k]) <= guessed:
                link = waits + sum(costs[e] for e in order[:k])
                taken = max(link, (len(missing) - k) * self.host)
                ways.append((taken + len(set(order[:k]) - guessed) * self.copy / 2, k, link, taken))
        _, k, link, taken = min(ways)
        for e in needed:
            if e not in missing or e in order[:k]:
                self.drop(layer, e)
        self.spare = [g for g in self.spare if g[0] != layer or g[1] not in order[:k]]
        by_host = order[k:]
        busy = [e for e in needed if e not in missing]
        for e in busy:
            table.touch(e)
        for e in sorted(order[:k]):
            self.give(layer, e, busy)
        free = taken - link
        self.pace += (taken - self.pace) / 16
        self.guess(layer, needed, ahead, free)
        for e in sorted(by_host):
            if (layer, e) in self.spare:
                self.spare.remove((layer, e))
            elif any(left for _, left in self.queue):
                continue
            else:
                self.queue.append([(layer, e), self.copy])
            self.give(layer, e, busy)
        for entry in self.queue:
            carried = min(free, entry[1])
            entry[1] -= carried
            free -= carried
            if entry[1]:
                break
        return set(by_host)

    def guess(self, layer: int, needed: list[int], ahead: list[list[int]], free: float) -> None:
        for distance, ranking in enumerate(ahead, start=1):
            there = self.tables[layer + distance].here
            absent = [
                e
                for e in ranking[: max(len(needed), self.prefetch)]
                if e not in there and (layer + distance, e) not in self.spare
            ]
            for e in absent[: self.prefetch]:
                room = free + (distance - 1) * self.pace + self.host / 2
                if len(self.spare) == self.spares or sum(left for _, left in self.queue) + self.copy > room:
                    break
                self.spare.append((layer + distance, e))
                self.queue.append([(layer + distance, e), self.copy])

    def give(self, layer: int, e: int, busy: list[int]) -> None:
        """A slot for an expert, which nothing else takes in this layer."""
        table = self.tables[layer]
        if len(table.here) == table.slots:
            gone = table.victim([c for c in table.here if c not in busy])
            table.here.remove(gone)
            self.drop(layer, gone)
        table.here.append(e)
        table.touch(e)
        busy.append(e)


def splits() -> st.SearchStrategy[tuple[float, bool]]:
    """The seconds of a copy, where the host takes 1, and whether missed experts may be copied."""
    return st.tuples(st.sampled_from((0.1, 0.5, 1.0, 1.5, 2.0, 3.0, 8.0)), st.booleans())


def cases(layers: int) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "slots": st.integers(2, 8) | st.lists(st.integers(2, 8), min_size=layers, max_size=layers),
            "policy": st.sampled_from(("lru", "lfu", "random", "static")),
            "lookahead": st.integers(0, 2),
            "prefetch": st.integers(0, 3),
        }
    )


def make_split(pair: tuple[float, bool]) -> Split:
    return Split(copy=pair[0], compute=1.0, demand=pair[1])


@pytest.mark.parametrize(
    ("bits", "dtype"), [(16, "float32"), (4, "bfloat16"), (3, "float32"), (2, "bfloat16")]
)
def test_as_a_reference_divides_and_sums(rigs: Any, jitter: Any, sample: Any, bits: int, dtype: str) -> None:
    rig = rigs(bits, dtype)
    computed = [0]

    @settings(max_examples=10)
    @given(
        case=cases(rig.layers), pair=splits(), prompt=st.sampled_from((1, 7, 60)), seed=st.integers(0, 99),
    )  # fmt: skip
    def all_cases(case: dict[str, Any], pair: tuple[float, bool], prompt: int, seed: int) -> None:
        ids = rig.ids(prompt)
        reference = Reference(rig, **case, split=make_split(pair))
        with reference.installed():
            expected = [sample(rig.resident, ids, count) for count in (COUNT, 3)]
        with rig.cached(**case, link=jitter(seed, rig.form.blob_bytes), split=make_split(pair)) as cache:
            assert [sample(rig.engine, ids, count) for count in (COUNT, 3)] == expected
            assert cache.count().computed == reference.by_host
        computed[0] += reference.by_host

    all_cases()
    assert computed[0] > 50


class Slow(HostExperts):
    """Sleeps at random before it computes."""

    def __init__(self, form: Any, seed: int) -> None:
        super().__init__(form)
        self.random = random.Random(seed)

    def compute(self, job: Job) -> Tensor:
        time.sleep(self.random.random() * 2e-3)
        return super().compute(job)


@pytest.mark.parametrize("berths", [None, 2, 12])
@pytest.mark.parametrize("pair", [(2.0, True), (3.0, False)])
def test_delays_change_nothing(
    rigs: Any, jitter: Any, sample: Any, events: Any, monkeypatch: pytest.MonkeyPatch,
    berths: int | None, pair: tuple[float, bool],
) -> None:  # fmt: skip
    rig = rigs(4, "bfloat16")
    texts: list[Any] = []
    accesses: list[Any] = []
    for seed in range(3):
        monkeypatch.setattr("tests.runtime.experts.conftest.HostExperts", lambda form, s=seed: Slow(form, s))
        links = {"link": jitter(seed, rig.form.blob_bytes), "back": jitter(seed, rig.form.blob_bytes)}
        options = {"slots": 3, "lookahead": 2, "prefetch": 2, "berths": berths, "split": make_split(pair)}
        with rig.cached(**options, **links) as cache:
            cache.record(events)
            texts.append([sample(rig.engine, rig.ids(5, n), 12) for n in range(2)])
            accesses.append(events.of(Miss))
            assert cache.count().computed > 10
        events.clear()
    assert texts[0] == texts[1] == texts[2] and accesses[0] == accesses[1] == accesses[2]
    # Of two experts a token, and with one device's kernels, the two sums give the bits of one.
    assert texts[0] == [rig.tokens(rig.ids(5, n), 12) for n in range(2)]


def test_an_error_of_the_host_is_one_of_its_request(
    rig: Any, sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, compute, left = rig.ids(5), HostExperts.compute, [0]

    def failing(self: HostExperts, job: Job) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no memory\nfor activations")
        return compute(self, job)

    monkeypatch.setattr(HostExperts, "compute", failing)
    with rig.cached(3, split=make_split((2.0, False))) as cache:
        expected = sample(rig.engine, ids, COUNT)
        for left[0] in range(1, 20, 4):
            with pytest.raises(RequestError, match=r"could not compute an expert \(no memory for act.*again"):
                sample(rig.engine, ids, COUNT)
            cache.residency.forget()
            assert sample(rig.engine, ids, COUNT) == expected


def test_interrupts(rig: Any, sample: Any) -> None:
    """What an interrupted request left with the host is not taken for the result of a later one."""
    thrown, ids = Thrown(3, longest=2e-2), rig.ids(4)
    with rig.cached(3, lookahead=2, prefetch=2, split=make_split((1.5, True))) as cache:
        expected = [sample(rig.engine, ids, COUNT)]
        asked = [0]

        def ask() -> None:
            asked[0] += 1
            got = sample(rig.engine, ids, COUNT)
            if asked[0] == 1:  # the others begin with what the first left in slots
                assert got == expected[0]

        for _ in range(40):
            asked[0] = 0
            cache.residency.forget()
            thrown.until(ask)
        assert thrown.count == 40


def test_the_thread_ends_with_the_cache(rig: Any) -> None:
    with rig.cached(3, split=make_split((2.0, True))) as cache:
        host = cache.exchange.host
        assert host.thread.is_alive()
    assert not host.thread.is_alive()
    with pytest.raises(RequestError, match="closed"):
        host.wait(host.begin([], torch.ones(1, 8), [], torch.ones(1, 0)))


def test_nobody_waits_for_a_thread_that_has_ended(
    rig: Any, sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: torch.device | None) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr("runtime.experts.host.current", lost)
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    with (
        rig.cached(2, split=make_split((2.0, False))),
        pytest.raises(RequestError, match="the engine is closed"),
    ):
        sample(rig.engine, rig.ids(5), COUNT)
