"""Which KV cache a prompt gets: against a slow search, with numbers in place of keys and values."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.batching.texts import Text, Texts


class Numbers:
    """In place of a `KVCache`: the ids themselves."""

    def __init__(self) -> None:
        self.held: list[int] = []

    @property
    def length(self) -> int:
        return len(self.held)

    def truncate(self, length: int) -> None:
        assert length <= len(self.held)
        del self.held[length:]

    def copy_from(self, other: "Numbers", length: int) -> None:
        assert length <= len(other.held)
        self.held = other.held[:length]


def longest(texts: Texts, ids: list[int]) -> int:
    return max(
        (sum(1 for n in range(1, len(ids)) if text.ids[:n] == ids[:n]) for text in texts.all), default=0
    )


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_beginning_is_found_and_no_other_is_spoiled(seed: int) -> None:
    r = random.Random(seed)
    places = r.randint(1, 4)
    texts = Texts(places, Numbers)  # type: ignore[arg-type]
    running: list[Text] = []
    for _ in range(200):
        if running and (len(running) == places or r.random() < 0.5):
            running.pop(r.randrange(len(running))).busy = False
        ids = [r.randint(0, 1) for _ in range(r.randint(1, 12))]
        expected = longest(texts, ids)
        before: dict[Any, list[int]] = {text: list(text.ids) for text in running}
        reuse = r.random() < 0.8
        text = texts.take(ids, reuse)
        assert text.ids == ids[: expected if reuse else 0] == text.kv.held  # type: ignore[attr-defined]
        assert all(other.ids == held for other, held in before.items()) and text not in running
        assert len(texts.all) <= places and text.busy
        for i in ids[len(text.ids) :]:  # the prompt is computed, and something is written
            text.kv.held.append(i)  # type: ignore[attr-defined]
            text.ids.append(i)
        running.append(text)


def test_the_least_recently_used_goes() -> None:
    texts = Texts(3, Numbers)  # type: ignore[arg-type]
    made = []
    for first in (1, 2, 3):
        text = texts.take([first, 0])
        text.ids = [first, 0]
        text.kv.held = [first, 0]  # type: ignore[attr-defined]
        text.busy = False
        made.append(text)
    texts.take([1, 0, 5]).busy = False
    assert texts.take([9, 9]) is made[1]


def test_a_beginning_is_copied_if_going_on_would_lose_most_of_a_text() -> None:
    texts = Texts(2, Numbers)  # type: ignore[arg-type]
    long = texts.take([1] * 9)
    long.ids, long.kv.held, long.busy = [1] * 9, [1] * 9, False  # type: ignore[attr-defined]
    other = texts.take([1, 1, 2])
    assert other is not long and other.ids == [1, 1] and long.ids == [1] * 9
    other.busy = True
    assert texts.take([1, 1, 3]) is long and long.ids == [1, 1]  # there is no other


def test_an_interrupt_between_two_lines_leaves_no_unknown_tokens() -> None:
    text = Text(SimpleNamespace(length=5, truncate=lambda n: lengths.append(n)), [1, 2, 3])  # type: ignore[arg-type]
    lengths: list[int] = []
    text.cut(3)
    assert lengths == [3]
