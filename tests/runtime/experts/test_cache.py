"""What the cache promises beyond equal results: when it sends for experts, and which ones it holds."""

import threading
from functools import partial
from typing import Any

import pytest
import torch

from model.moe import gated
from model.router import Choice
from runtime.experts.link import HostLink
from runtime.experts.tickets import Ticket
from runtime.experts.trace import Guess, Hit, Miss, Routing


def test_one_transfer_per_layer(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoded token takes one `cpu` in each layer, and no `item`."""
    ids = rig.ids(4)
    with rig.cached(2, lookahead=2, prefetch=2) as cache:
        rig.engine.logits(ids)
        counted: list[str] = []
        for name in ("cpu", "tolist", "item", "nonzero"):
            method = getattr(torch.Tensor, name)

            def spy(tensor: Any, *args: Any, name: str = name, method: Any = method) -> Any:
                if threading.current_thread() is threading.main_thread():
                    counted.append(name)
                return method(tensor, *args)

            monkeypatch.setattr(torch.Tensor, name, spy)
        session = rig.engine.session()
        rig.engine.runner.forward(ids[:1], session.kv)
        session.close()
        assert counted == ["cpu"] * rig.layers
        assert cache.ledger.counters.misses


def test_experts_that_are_there_are_computed_while_others_travel(rig: Any) -> None:
    """A hit is computed before a miss has arrived, and w13 of a miss before its w2 has."""
    with rig.cached(3, lookahead=0) as cache:
        log: list[tuple[Any, ...]] = []
        wait = cache.copies.wait

        def noted(ticket: Ticket, count: int | None = None) -> float:
            log.append(("wait", count))
            return wait(ticket, count)

        cache.copies.wait = noted
        for slot, expert in enumerate(cache.bound):
            noted_w13 = lambda x, f=expert.w13: (log.append(("w13",)), f(x))[1]  # noqa: E731
            noted_w2 = lambda x, f=expert.w2: (log.append(("w2",)), f(x))[1]  # noqa: E731
            noted_gated = partial(gated, w13=noted_w13)
            cache.bound[slot] = type(expert)(noted_w13, noted_w2, noted_gated, expert.independent)
        x = torch.randn(1, rig.engine.config.hidden)
        weights = torch.tensor([[0.5, 0.5]])

        def apply(*experts: int) -> list[tuple[Any, ...]]:
            log.clear()
            cache.residency.complete = True
            cache.apply(0, x, Choice(torch.tensor([experts]), weights))
            return list(log)

        first, all_of_it = cache.first_bytes, None
        missed = [("wait", first), ("w13",), ("wait", all_of_it), ("w2",)]
        assert apply(5, 2) == missed * 2
        assert apply(5, 2) == [("w13",), ("w2",)] * 2
        assert apply(1, 5) == [("w13",), ("w2",), *missed]  # 5 first: it is there
        assert 0 < first < rig.form.blob_bytes


def test_guesses_are_the_likeliest_that_are_absent(rig: Any, events: Any) -> None:
    with rig.cached(2, lookahead=2, prefetch=2) as cache:
        rig.engine.logits(rig.ids(3))
        cache.record(events)
        session = rig.engine.session()
        for i in rig.ids(6, seed=3):
            rig.engine.runner.forward([i], session.kv)
        session.close()
        assert len(events.of(Guess)) > 5
        for guess in events.of(Guess):
            assert guess.rank < 2 and guess.distance in (1, 2) and guess.layer >= guess.distance
        # a guess evicts nothing: what layers hold changes by misses alone
        held: dict[int, set[int]] = {}
        for event in events.of(Routing, Hit, Miss):
            if isinstance(event, Miss):
                held.setdefault(event.layer, set()).add(event.expert)
                held[event.layer].discard(-1 if event.evicted is None else event.evicted)
        for layer, experts in held.items():
            assert experts <= set(cache.residency.tables[layer].where)


@pytest.mark.parametrize(("lookahead", "prefetch"), [(0, 3), (1, 0)])
def test_no_guesses_when_off(rig: Any, lookahead: int, prefetch: int) -> None:
    with rig.cached(2, lookahead=lookahead, prefetch=prefetch) as cache:
        rig.engine.logits(rig.ids(9))
        counters = cache.count()
        assert (counters.guesses, counters.recallable) == (0, 0)
        assert counters.copied_bytes == counters.misses * cache.store.size and not counters.wasted_bytes


def test_with_all_experts_in_slots_each_is_copied_once(rig: Any) -> None:
    with rig.cached(8, lookahead=0) as cache:
        for _ in range(3):
            rig.engine.logits(rig.ids(200))
        assert cache.ledger.counters.misses <= rig.layers * rig.experts
        assert cache.count().copied_bytes == cache.ledger.counters.misses * cache.store.size


def test_a_slot_is_overwritten_after_its_last_use(rig: Any) -> None:
    """Every copy gets the mark that was made after the last use of its slot."""

    class Marking(HostLink):
        made = 0

        def used(self) -> Any:
            self.made += 1
            return self.made

    with rig.cached(2, prefetch=2, link=Marking()) as cache:
        marks: list[bool] = []
        submit = cache.copies.submit

        def noted(source: Any, target: Any, demand: bool, free: Any, *rest: Any, **others: Any) -> Ticket:
            slot = (target.data_ptr() - cache.pool.data_ptr()) // rig.form.blob_bytes
            marks.append(free == cache.residency.last_use[slot] and free is not None)
            return submit(source, target, demand, free, *rest, **others)

        cache.copies.submit = noted
        rig.engine.logits(rig.ids(50))
        rig.engine.logits(rig.ids(1))
        assert len(marks) > 20 and all(marks)
        assert len(set(cache.residency.last_use)) > 6


@pytest.mark.parametrize("released", [0, 1])
def test_an_interrupt_while_a_layer_is_released_is_no_end_of_the_forward(
    rig: Any, released: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots that stay pinned are forgotten when the next forward begins."""
    with rig.cached(2, lookahead=0) as cache:
        residency, release, left = cache.residency, cache.residency.release, [released]

        def interrupted(*args: Any) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            release(*args)

        for layer in range(rig.layers):
            (done,) = cache.provide(layer, [0, 1], torch.tensor([0.5, 0.5]), [])
            if layer < rig.layers - 1:
                done()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(residency, "release", interrupted)
            done()
        assert not residency.complete
        cache.provide(0, [2, 3], torch.tensor([0.5, 0.5]), [])
        assert all(slot.pins == 0 for table in residency.tables[1:] for slot in table.slots.values())
