"""KV caches of a batch, kept by the texts that they hold, so that a prompt finds its beginning computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.kv_cache import KVCache


@dataclass(eq=False)
class Text:
    """A KV cache and the ids of the tokens in it."""

    kv: KVCache
    ids: list[int] = field(default_factory=list)
    busy: bool = False  # a request is computing with it
    used: int = 0  # when a request took it last, counted in requests

    def cut(self, length: int) -> None:
        """Forget every token from position `length` on."""
        del self.ids[length:]  # first, so that an interrupt never leaves ids that `kv` does not hold
        self.kv.truncate(min(length, self.kv.length))


class Texts:
    """Up to `places` texts. Each is made when it is first needed."""

    def __init__(
        self,
        places: int,
        make: Callable[[], KVCache],
        copy: Callable[[KVCache, KVCache, int], None] = lambda source, target, n: target.copy_from(source, n),
    ) -> None:
        """`copy(source, target, length)` has a KV cache hold the beginning of another."""
        self.places, self.make, self.copy = places, make, copy
        self.all: list[Text] = []
        self.clock = 0

    def take(self, ids: Sequence[int], reuse: bool = True) -> Text:
        """A text for a request, which holds the longest beginning of `ids` that any text has, but not all of
        `ids`: the last token has to be computed. Without `reuse` it is empty.

        The request goes on with the text that has this beginning, if no other request does so. But if that
        would lose more than half of the text, the beginning is copied to the one that was used longest ago.
        There has to be a text that is not busy, or room to make one.
        """
        self.clock += 1
        length, best = self.longest(ids) if reuse else (0, None)
        if best is not None and not best.busy and (2 * length >= len(best.ids) or not self.others(best)):
            text = best
        else:
            text = self.oldest(best)
            text.cut(0)
            if best is not None and best is not text:
                self.copy(best.kv, text.kv, length)
                text.ids = list(ids[:length])
        text.cut(length)
        text.busy, text.used = True, self.clock
        return text

    def longest(self, ids: Sequence[int]) -> tuple[int, Text | None]:
        """The longest common beginning with any text, and that text. Of several, one that is not busy."""
        found: tuple[int, Text | None] = (0, None)
        for text in sorted(self.all, key=lambda text: text.busy):
            length = min(common_prefix(text.ids, ids), len(ids) - 1)
            if length > found[0]:
                found = length, text
        return found

    def others(self, text: Text) -> bool:
        """Whether there is a text beside this one that a request could take."""
        return len(self.all) < self.places or any(not t.busy for t in self.all if t is not text)

    def oldest(self, spare: Text | None) -> Text:
        """A new text if there is room for one, else that of those not busy that was used longest ago. `spare`
        is taken only if there is no other."""
        if len(self.all) < self.places:
            self.all.append(Text(self.make()))
            return self.all[-1]
        return min((t for t in self.all if not t.busy), key=lambda t: (t is spare, t.used))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of ids that `a` and `b` begin with alike.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
