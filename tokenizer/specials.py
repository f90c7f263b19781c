"""Tell which of a checkpoint's tokens steer the model, and which are words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tokenizer.added_tokens import AddedToken, Splitter
from tokenizer.encoder import Encoder
from tokenizer.errors import quoted
from tokenizer.settings import Settings
from tokenizer.vocabulary import MARKER, Vocabulary

BRACKETS = frozenset("<>[]{}|")


@dataclass(frozen=True)
class Specials:
    """A checkpoint's tokens, apart from the pieces that make up text.

    added    whether there are ids beyond those of the sentencepiece model
    control  tokens that only a chat template may write: special ones, and added ones that look like markers
    words    the other added tokens, which are text like any other
    names    what templates call special tokens: {"bos_token": "<s>", ...}
    ends     the ids that end a text
    """

    added: bool
    control: Splitter
    words: Splitter
    names: Mapping[str, str | None]
    ends: frozenset[int]


def place(
    settings: Settings, piece_id: Callable[[str], int | None], pieces: int, vocab: int | None
) -> list[AddedToken]:
    """Return all tokens that the settings name, each with its id.

    The id is that of the sentencepiece piece of this name, or else the declared one, or else the next free
    one. `pieces` is the number of pieces. A warning names tokens beyond the `vocab` ids of the model, which
    are left out.
    """
    placed: dict[str, AddedToken] = {}
    for token in settings.added:
        piece = piece_id(token.content)
        placed[token.content] = token if piece is None else replace(token, id=piece)
    following = max([pieces, *(token.id + 1 for token in placed.values())])
    for token in settings.special:
        if token.content in placed:
            placed[token.content] = replace(placed[token.content], special=True)
            continue
        piece = piece_id(token.content)
        placed[token.content] = replace(token, id=following if piece is None else piece)
        following += piece is None
    beyond = [token for token in placed.values() if vocab is not None and token.id >= vocab]
    if beyond:
        more = ", ..." if len(beyond) > 4 else ""
        names = ", ".join(quoted(token.content) for token in beyond[:4]) + more
        warnings.warn(
            f"the tokenizer's files name {len(beyond)} tokens that the model of {vocab} ids does not have "
            f"({names}); they are taken as text",
            RuntimeWarning,
            stacklevel=2,
        )
    return [token for token in placed.values() if token not in beyond]


def sort_tokens(
    settings: Settings, tokens: list[AddedToken], vocabulary: Vocabulary, encoder: Encoder
) -> Specials:
    """Tell control tokens from words. The `tokens` have ids by now."""
    template = settings.template.text if settings.template else ""
    control = {name: AddedToken(name, i) for name, i in vocabulary.control.items()}
    words: dict[str, AddedToken] = {}
    for token in tokens:
        steers = token.special or is_marker(token.content, template)
        (control if steers and token.content.strip() else words)[token.content] = token
    by_content = {token.content: token.id for token in tokens} | dict(vocabulary.control)
    ends = [by_content.get(end, encoder.piece_id(end)) for end in settings.ends]
    return Specials(
        added=any(token.id >= len(vocabulary.decoded) for token in tokens),
        control=Splitter(control.values()),
        words=Splitter(words.values()),
        names=settings.names,
        ends=frozenset([encoder.eos_id, *(end for end in ends if end is not None)]),
    )


def is_marker(content: str, template: str) -> bool:
    """Tell whether an added token that no file calls special steers the model all the same.

    It does if it has brackets, or if it has punctuation and the chat template writes it.
    """
    if not BRACKETS.isdisjoint(content):
        return True
    return content in template and not all(c.isalnum() or c.isspace() for c in content)


def extend(vocabulary: Vocabulary, tokens: list[AddedToken]) -> Vocabulary:
    """Add tokens to a vocabulary. Special ones and markers decode to "", words to themselves."""
    size = max([len(vocabulary.decoded), *(token.id + 1 for token in tokens)])
    decoded = [*vocabulary.decoded, *[""] * (size - len(vocabulary.decoded))]
    control = dict(vocabulary.control)
    for token in tokens:
        if token.id >= len(vocabulary.decoded) or token.content not in control:
            silent = token.special or MARKER.fullmatch(token.content)
            if token.id >= len(vocabulary.decoded):
                decoded[token.id] = "" if silent else token.content
            if silent:
                control[token.content] = token.id
    return replace(vocabulary, decoded=tuple(decoded), control=control)
