"""Values that files and callers should not give, but do."""

from random import Random
from typing import Any

TEXTS = (
    "", " ", "\0", "two\nlines", "\x1b[2J\x1b]0;title\x07", "\r", "\u202egnirts", "\u2028", "\ud800",
    "../../etc/passwd", "/etc/passwd", "C:\\windows", "a/b", "NaN", "-1", "{}", "%s%n", "\ufeff",
    "\U0001f98a",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 255, 256, 1 << 15, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1,
    (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1e-320, 1e-45,
    1e38, 3.5e38, 1e300, 1.7e308, float("nan"), float("inf"), float("-inf"), True, False,
)  # fmt: skip


def weird(chance: Random, large: int = 1 << 20) -> Any:
    """A strange value of any JSON type. Texts have up to `large` characters."""
    kind = chance.randrange(10)
    if kind < 4:
        return chance.choice(NUMBERS)
    if kind < 7:
        return weird_text(chance, large)
    return chance.choice((None, [], {}, [[]], [None], {"": None}, nested(chance.choice((5, 50, 400)))))


def weird_text(chance: Random, large: int = 1 << 20) -> str:
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice(("y", "\x1b", "\n", "\u202e")) * chance.choice((100, 5000, large))
    if kind == 1:
        return "".join(
            chr(chance.choice((chance.randrange(32), chance.randrange(0xD800)))) for _ in range(12)
        )
    return chance.choice(TEXTS)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value
