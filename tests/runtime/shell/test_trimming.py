"""What a full context makes a conversation forget, against going through all turns one by one."""

import itertools
import random

from runtime.shell.trimming import Messages, turns_to_drop


def conversation(lengths: list[tuple[int, int]], question: int, system: int = 0) -> list[dict[str, str]]:
    """Turns of so many letters in message and answer, and a last message."""
    messages = [{"role": "system", "content": "s" * system}] if system else []
    for asked, answered in lengths:
        messages.append({"role": "user", "content": "u" * asked})
        messages.append({"role": "assistant", "content": "a" * answered})
    return [*messages, {"role": "user", "content": "u" * question}]


def tokens(messages: Messages) -> int:
    """A letter is a token, and each message has two more."""
    return sum(len(message["content"]) + 2 for message in messages)


def slowly(messages: Messages, context: int, new: int) -> list[dict[str, str]]:
    """What stays: with no room, as many turns as leave half of the context free, and at least the last."""
    kept = list(messages)
    system = [kept.pop(0)] if kept[0]["role"] == "system" else []
    if context - tokens([*system, *kept]) < min(new, context // 4):
        while len(kept) > 2:
            del kept[:2]
            if context - tokens([*system, *kept]) >= context // 2:
                break
    return system + kept


def test_as_one_by_one() -> None:
    draw = random.Random(1)
    changed = 0
    for _ in range(2000):
        lengths = [(draw.randrange(30), draw.randrange(60)) for _ in range(draw.randrange(12))]
        messages = conversation(lengths, draw.randrange(80), draw.choice((0, 9)))
        context, new = draw.randrange(2, 400), draw.choice((1, 20, 400))
        dropped, start = turns_to_drop(messages, tokens, context, new)
        first = int(messages[0]["role"] == "system")
        kept = messages[:first] + messages[start:]
        assert kept == slowly(messages, context, new)
        assert start == first + 2 * dropped and messages[start]["role"] == "user"
        changed += dropped > 0
    assert 500 < changed < 1900


def test_a_long_conversation_is_counted_a_few_times() -> None:
    messages = conversation([(10, 30)] * 4000, 10)
    counted = []

    def count(messages: Messages) -> int:
        counted.append(len(messages))
        return tokens(messages)

    assert turns_to_drop(messages, count, 4096, 256)[0] > 3000
    assert len(counted) < 16


def test_turns_are_dropped_seldom() -> None:
    """After turns were dropped, half of the context fills up before it happens again."""
    messages: list[dict[str, str]] = []
    drops = []
    for turn in range(400):
        messages.append({"role": "user", "content": "u" * 18})
        dropped, start = turns_to_drop(messages, tokens, 1000, 18)
        if dropped:
            del messages[:start]
            drops.append(turn)
        messages.append({"role": "assistant", "content": "a" * 18})
    assert len(drops) > 20
    assert min(after - before for before, after in itertools.pairwise(drops)) >= 500 // 40
