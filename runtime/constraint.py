"""What a request's text has to be: JSON that fits a schema, or a text of a grammar.

Before each token, a constraint tells which tokens the text may go on with, and `runtime.sampler` leaves only
those. So every text that ends by itself is one of the grammar's, at any temperature. A text that
`max_new_tokens` cuts off is only the beginning of one.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from runtime.errors import RequestError
from runtime.guidance import Guide, failure, field_of
from runtime.options import SamplingParams
from tokenizer import StreamDecoder
from tokenizer.vocabulary import SPACE


class Constraint:
    """The constraint of one text, which grows by the tokens that are given to `accept`.

    It speaks of the text that the reader sees. At the start of a text the decoder drops the encoder's space,
    and there a token counts without it.
    """

    def __init__(
        self, guide: Guide, params: SamplingParams, ends: Collection[int], decoder: StreamDecoder
    ) -> None:
        """`ends` are the ids that end the text. `decoder` has its text before the first token. Raises
        `RequestError` if the schema or grammar is none, or allows no text."""
        self.name = field_of(params)
        self.guide, self.words = guide, guide.words
        self.vocabulary = decoder.vocabulary
        self.ends = torch.tensor(sorted(ends), dtype=torch.long, device="cpu")
        self.at_start = decoder.at_start
        self.matcher = guide.matcher(params)
        self.allowed: Tensor | None = guide.allowed(self.matcher, self.name)  # until the next token

    def mask(self) -> Tensor:  # -> [V] bool
        """Which tokens may come next, on the CPU. The ends may come where the text may stop.

        Raises `RequestError` if none may, or if llguidance gives up.
        """
        if self.allowed is None:
            self.allowed = self.guide.allowed(self.matcher, self.name)
        words, allowed = self.words, self.allowed
        if self.at_start:
            mask = allowed[words.first]
            fits = allowed[len(words.first) : words.end].any()  # a token that begins with the space
            mask[words.blank] = fits & (not self.vocabulary.strip_all)  # else it could be repeated forever
        else:
            mask = allowed[: len(words.first)].clone()
        mask[self.ends] = allowed[words.end]
        return mask

    def accept(self, token: int) -> None:
        """Add a token to the text. Raises `RequestError` if `mask` does not allow it, or if llguidance gives
        up."""
        if token in self.ends:
            return
        index = token
        if self.at_start:
            piece = self.vocabulary.decoded[token]
            index = int(self.words.first[token])
            if piece != "":
                self.at_start = self.vocabulary.strip_all and piece == SPACE
            if token in self.words.blank:
                return
        self.allowed = None
        if not self.matcher.consume_token(index):
            raise RequestError(f"{self.name}: {failure(self.matcher)}")

    @property
    def finished(self) -> bool:
        """Whether the text is whole, and nothing but an end may come."""
        if self.allowed is None:
            self.allowed = self.guide.allowed(self.matcher, self.name)
        return not bool(self.allowed[: self.words.end].any())


class Constraints:
    """Makes the constraints of a model's requests. What llguidance has to know of the vocabulary is kept."""

    def __init__(self, vocab: int) -> None:
        """`vocab` is the number V of the model's ids."""
        self.vocab = vocab
        self.guide: Guide | None = None  # made when it is first needed

    def make(
        self, params: SamplingParams, decoder: StreamDecoder, ends: Collection[int]
    ) -> Constraint | None:
        """The constraint that `params` ask for, or None. `decoder` will read the text, which `ends` end.

        Raises `RequestError` in one line if the schema or grammar is none that llguidance takes, if it allows
        no text, if llguidance is not installed, or if the prompt ends within a character.
        """
        if params.json_schema is None and params.grammar is None:
            return None
        if decoder.in_character:
            raise RequestError(
                f"{field_of(params)}: the prompt's ids end within a character, so no text can begin; "
                "let them end before or after it"
            )
        if self.guide is None or self.guide.vocabulary is not decoder.vocabulary:
            self.guide = Guide(decoder.vocabulary, self.vocab)
        return Constraint(self.guide, params, ends, decoder)
