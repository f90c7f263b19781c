"""Tokens that a checkpoint's files add to its sentencepiece model, and where they stand in a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Unicode's white space. Python's \s has four more control characters (U+001C to U+001F).
WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*")


@dataclass(frozen=True)
class AddedToken:
    """A text that is one id.

    special      the token steers the model: no user's text may become it, and it decodes to nothing
    lstrip       the token takes the white space before it along
    rstrip       the token takes the white space after it along
    single_word  the token does not count inside a word
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class Splitter:
    """Finds tokens in a text from left to right, and the longest where several begin."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.content: token for token in tokens}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the text in order: an id for each token, and the texts between them unchanged.

        >>> splitter = Splitter([AddedToken("<end>", 7, rstrip=True), AddedToken("<", 8)])
        >>> list(splitter.split("one<end> two < three"))
        ['one', 7, 'two ', 8, ' three']
        """
        begun = 0
        for match in self._pattern.finditer(text):
            token = self.tokens[match.group()]
            start, stop = match.span()
            if token.single_word and inside_a_word(text, start, stop):
                continue
            if token.lstrip:
                start = space_before(text, begun, start)
            if token.rstrip:
                stop = WHITE_SPACE.match(text, stop).end()  # type: ignore[union-attr]
            if start > begun:
                yield text[begun:start]
            yield token.id
            begun = stop
        if begun < len(text):
            yield text[begun:]

    def found(self, text: str) -> list[str]:
        """Return the tokens that `text` spells, each once."""
        return list(dict.fromkeys(self._pattern.findall(text)))


def inside_a_word(text: str, start: int, stop: int) -> bool:
    return bool(re.match(r"\w", text[stop : stop + 1]) or re.match(r"\w", text[max(start - 1, 0) : start]))


def space_before(text: str, least: int, at: int) -> int:
    """Return where the white space that ends at `at` begins, looking no further back than `least`."""
    while at > least and WHITE_SPACE.fullmatch(text[at - 1]):
        at -= 1
    return at
