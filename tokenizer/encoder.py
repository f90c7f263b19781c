"""Encode texts with sentencepiece, whole or with tokens between them."""

from __future__ import annotations

from collections.abc import Iterable

from sentencepiece import SentencePieceProcessor

from tokenizer.vocabulary import WITHOUT_PREFIX


class Encoder:
    """A sentencepiece model, and the same model without the space that it puts before every text."""

    def __init__(self, model: bytes, legacy: bool = True) -> None:
        """`model` is a serialized model. `legacy` is described in `tokenizer.settings.Settings`.

        Raises `RuntimeError` or another error of sentencepiece if sentencepiece refuses the model.
        """
        self.legacy = legacy
        self.processor = SentencePieceProcessor(model_proto=model)
        self.inner = self.processor if legacy else SentencePieceProcessor(model_proto=model + WITHOUT_PREFIX)
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()

    def encode(self, parts: Iterable[str | int]) -> list[int]:
        """Return the ids of texts and of the tokens between them. An int in `parts` is a token's id.

        In a legacy folder every text begins with the encoder's space. In others only a text that comes first
        does, and only if it does not begin with a space of its own. Transformers does the same.
        """
        ids: list[int] = []
        first = True
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                as_is = self.legacy or (first and not part.startswith(" "))
                ids += (self.processor if as_is else self.inner).encode(part)
            first = False
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self.processor.decode(ids))

    def piece(self, token_id: int) -> str:
        return str(self.processor.id_to_piece(token_id))

    def piece_id(self, piece: str) -> int | None:
        """Return the id of the piece with exactly this spelling. None if there is none."""
        token_id: int = self.processor.piece_to_id(piece)
        return token_id if self.processor.id_to_piece(token_id) == piece else None
