"""Encoding texts with sentencepiece, in one piece or with tokens between them."""

from __future__ import annotations

from collections.abc import Iterable

from sentencepiece import SentencePieceProcessor

from tokenizer.vocabulary import WITHOUT_PREFIX


class Encoder:
    """A sentencepiece model, as it is and without its space in front of every text."""

    def __init__(self, model: bytes, legacy: bool = True) -> None:
        """`model` is a serialised model; `legacy` as in `tokenizer.settings.Settings`.

        Raises `RuntimeError` or another of sentencepiece's errors if it does not take the model.
        """
        self.legacy = legacy
        self.processor = SentencePieceProcessor(model_proto=model)
        self.inner = self.processor if legacy else SentencePieceProcessor(model_proto=model + WITHOUT_PREFIX)
        self.bos_id: int = self.processor.bos_id()
        self.eos_id: int = self.processor.eos_id()

    def encode(self, parts: Iterable[str | int]) -> list[int]:
        """The ids of texts, with the ids of tokens between them.

        A text after a token begins with the encoder's space in legacy folders, and without in others. Those
        also leave it away where a text begins with a space of its own (as Transformers does).
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
        """The id of the piece that is spelt exactly so; None if there is none."""
        token_id: int = self.processor.piece_to_id(piece)
        return token_id if self.processor.id_to_piece(token_id) == piece else None
