"""Slot tables and spares, compared with a naive model, in any order of events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.experts.policy import LRU, POLICIES, make_policy
from runtime.experts.slots import SlotTable, Spares, State

E = 8
LAYERS = 2


class Machine(RuleBasedStateMachine):
    """Two layers' tables and their spares, driven at random. Beside them, plain dictionaries say what each
    slot of the device must hold."""

    @initialize(
        counts=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        spares=st.integers(0, 3),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def begin(self, counts: tuple[int, int], spares: int, policy: str) -> None:
        self.counts, self.total = counts, sum(counts) + spares
        numbers = iter(range(self.total))
        self.tables = [
            SlotTable([next(numbers) for _ in range(n)], make_policy(policy, 3, layer))
            for layer, n in enumerate(counts)
        ]
        self.spares = Spares(numbers)
        self.bytes: dict[
            int, tuple[int, int]
        ] = {}  # slot -> layer and expert whose blob is there, or arrives
        self.copies: set[int] = set()  # slots that a copy is writing to
        self.accesses: list[tuple[int, int, int]] = []  # layer, expert, slot: pinned until computed
        self.residents: list[set[int]] = [set() for _ in counts]

    def candidates(self, layer: int) -> set[int]:
        pinned = {slot for at, _, slot in self.accesses if at == layer}
        return {
            expert
            for slot, (at, expert) in self.bytes.items()
            if at == layer and expert in self.residents[layer] and slot not in pinned
        }

    def room(self, layer: int) -> bool:
        pinned = {slot for at, _, slot in self.accesses if at == layer}
        unused = set(self.tables[layer].slots) - {self.slot_of(layer, e) for e in self.residents[layer]}
        return bool(self.candidates(layer) or unused - pinned)

    def slot_of(self, layer: int, expert: int) -> int:
        return next(slot for slot, held in self.bytes.items() if held == (layer, expert))

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, E - 1))
    def access(self, layer: int, expert: int) -> None:
        table, guess = self.tables[layer], self.spares.find(layer, expert)
        resident = self.residents[layer]
        if expert in resident:
            slot = table.hit(expert)
            assert slot == self.slot_of(layer, expert)
        else:
            assert table.find(expert) is None
            assert table.has_room == self.room(layer)
            if not table.has_room:
                with pytest.raises(RuntimeError, match=f"no room for expert {expert}: all "):
                    table.place(expert)
                return
            candidates, full = self.candidates(layer), len(resident) == self.counts[layer]
            if guess:
                slot = guess.slot
                assert self.bytes[slot] == (layer, expert)
                given, evicted = table.adopt(expert, slot)
                self.spares.exchange(slot, given)
                self.copies.add(slot)  # even a complete copy: computing has not waited for it yet
            else:
                given, evicted = table.place(expert)
                slot = given
            assert (evicted is not None) <= (evicted in candidates) and (evicted is not None) >= full
            assert all(given != used for _, _, used in self.accesses)
            self.copies.discard(given)  # an expert that was still loading: its copy ends
            if evicted is not None:
                assert self.bytes.pop(given) == (layer, evicted)
                resident.remove(evicted)
            if not guess:
                assert given not in self.bytes
                self.bytes[slot] = (layer, expert)
                self.copies.add(slot)
            resident.add(expert)
        self.accesses.append((layer, expert, slot))

    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, E - 1))
    def guess(self, layer: int, expert: int) -> None:
        if expert in self.residents[layer] or self.spares.find(layer, expert):
            return
        free = bool(self.spares.free)
        taken = self.spares.take(layer, expert)
        assert (taken is not None) == free
        if taken:
            assert taken.slot not in self.bytes and taken.slot not in self.copies
            self.bytes[taken.slot] = (layer, expert)
            self.copies.add(taken.slot)

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def copy_ends(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.copies)))
        self.copies.remove(slot)
        layer, expert = self.bytes[slot]
        if expert in self.residents[layer]:
            self.tables[layer].ready(slot)

    @precondition(lambda self: self.spares.guesses if hasattr(self, "spares") else False)
    @rule(data=st.data())
    def guess_is_dropped(self, data: st.DataObject) -> None:
        guess = data.draw(st.sampled_from(list(self.spares.guesses.values())))
        self.copies.discard(guess.slot)
        assert self.bytes.pop(guess.slot) == (guess.layer, guess.expert)
        assert self.spares.drop(guess.slot) == guess

    @precondition(lambda self: self.accesses)
    @rule(data=st.data())
    def computed(self, data: st.DataObject) -> None:
        access = data.draw(st.sampled_from(self.accesses))
        self.accesses.remove(access)
        layer, _, slot = access
        self.tables[layer].release(slot)

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "tables"):
            return
        owned = [slot for table in self.tables for slot in table.slots]
        owned += self.spares.free + [guess.slot for guess in self.spares.guesses.values()]
        assert sorted(owned) == list(range(self.total))
        for layer, table in enumerate(self.tables):
            assert len(table.slots) == self.counts[layer]
            for slot, entry in table.slots.items():
                held = self.bytes.get(slot)
                assert held == (None if entry.expert is None else (layer, entry.expert))
                assert (entry.state is State.EMPTY) == (held is None)
                assert (entry.state is State.LOADING) == (slot in self.copies)
                assert entry.pins == sum(used == slot for _, _, used in self.accesses)
            assert {e: table.find(e) for e in range(E) if table.find(e) is not None} == {
                e: self.slot_of(layer, e) for e in self.residents[layer]
            }
        for guess in self.spares.guesses.values():
            assert self.bytes[guess.slot] == (guess.layer, guess.expert)
        assert all(slot not in self.bytes for slot in self.spares.free)


Machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


@given(
    steps=st.lists(st.lists(st.integers(0, E - 1), min_size=1, max_size=6, unique=True), max_size=30),
    slots=st.integers(1, E),
    policy=st.sampled_from(sorted(POLICIES)),
    data=st.data(),
)
def test_guesses_change_no_hit_miss_or_victim(
    steps: list[list[int]], slots: int, policy: str, data: st.DataObject
) -> None:
    def run(guessing: bool) -> list[tuple[int, str, int | None]]:
        table, spares = SlotTable(range(slots), make_policy(policy, 0, 0)), Spares([100, 101])
        events: list[tuple[int, str, int | None]] = []
        for step in steps:
            if guessing:
                for expert in data.draw(st.lists(st.integers(0, E - 1), max_size=3, unique=True)):
                    if table.find(expert) is None and not spares.find(0, expert):
                        if not spares.free and data.draw(st.booleans()):
                            spares.drop(next(iter(spares.guesses.values())).slot)
                        spares.take(0, expert)
            hits = [e for e in step if table.find(e) is not None]
            pinned = [table.hit(e) for e in hits]
            events += [(e, "hit", None) for e in hits]
            for expert in (e for e in step if e not in hits):
                if not table.has_room:
                    table.release(pinned.pop(0))
                if guess := spares.find(0, expert):
                    slot = guess.slot
                    given, evicted = table.adopt(expert, slot)
                    spares.exchange(slot, given)
                else:
                    slot, evicted = table.place(expert)
                table.ready(slot)
                pinned.append(slot)
                events.append((expert, "miss", evicted))
            for slot in pinned:
                table.release(slot)
        return events

    assert run(guessing=True) == run(guessing=False)


def test_guesses_take_free_slots_and_no_others() -> None:
    spares = Spares([0, 1, 2])
    slots = [guess.slot for e in (5, 6, 7) if (guess := spares.take(0, e))]
    assert slots == [0, 1, 2] and spares.take(1, 5) is None
    assert spares.drop(1).expert == 6 and spares.find(0, 6) is None and spares.free == [1]


def test_misuse_is_caught() -> None:
    table = SlotTable([0], LRU())
    slot, _ = table.place(4)
    with pytest.raises(AssertionError):
        table.place(4)
    table.ready(slot)
    with pytest.raises(AssertionError):
        table.ready(slot)
    table.release(slot)
    with pytest.raises(AssertionError):
        table.release(slot)
    with pytest.raises(AssertionError):
        table.adopt(5, slot)
