"""Encode texts with sentencepiece, whole or with tokens between them."""

from __future__ import annotations

from collections.abc import Iterable

from sentencepiece import SentencePieceProcessor

from tokenizer.settings import Prefix
from tokenizer.vocabulary import SPACE, WITHOUT_PREFIX


class Encoder:
    """A sentencepiece model, and the same model without the space that it puts before every text."""

    def __init__(self, model: bytes, prefix: Prefix = Prefix.EVERY) -> None:
        """`model` is a serialized model. `prefix` says which texts begin with its space.

        Raises `RuntimeError` or another error of sentencepiece if sentencepiece refuses the model.
        """
        self.prefix = prefix
        self.processor = self.bare = SentencePieceProcessor(model_proto=model)
        if prefix is not Prefix.EVERY:
            self.bare = SentencePieceProcessor(model_proto=model + WITHOUT_PREFIX)
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()

    def encode(self, parts: Iterable[str | int]) -> list[int]:
        """Return the ids of texts and of the tokens between them. An int in `parts` is a token's id."""
        ids: list[int] = []
        for place, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += (self.processor if self.adds_space(part, place == 0) else self.bare).encode(part)
        return ids

    def adds_space(self, text: str, first: bool) -> bool:
        """Tell whether a text begins with the encoder's space. Transformers does the same."""
        if self.prefix is Prefix.EVERY or self.prefix is Prefix.NEVER:
            return self.prefix is Prefix.EVERY
        return (first or self.prefix is Prefix.SPACELESS) and not text.startswith((" ", SPACE))

    def decode(self, ids: list[int]) -> str:
        return str(self.processor.decode(ids))

    def piece(self, token_id: int) -> str:
        return str(self.processor.id_to_piece(token_id))

    def piece_id(self, piece: str) -> int | None:
        """Return the id of the piece with exactly this spelling. None if there is none."""
        token_id: int = self.processor.piece_to_id(piece)
        return token_id if self.processor.id_to_piece(token_id) == piece else None
