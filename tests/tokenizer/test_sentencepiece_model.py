"""Writing sentencepiece models: sentencepiece takes them for those that they were made from."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from tests.tokenizer.hard_texts import hard_text
from tokenizer.errors import TokenizerError
from tokenizer.sentencepiece_model import Piece, serialize
from tokenizer.vocabulary import Kind, parse_model

BASE = [
    Piece("<unk>", 0, Kind.UNKNOWN), Piece("<s>", 0, Kind.CONTROL), Piece("</s>", 0, Kind.CONTROL),
    *(Piece(f"<0x{byte:02X}>", 0, Kind.BYTE) for byte in range(256)),
    Piece("a", -1, Kind.NORMAL),
]  # fmt: skip
IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2}


def pieces_of(model: SentencePieceProcessor) -> list[Piece]:
    kinds = ((model.is_unknown, Kind.UNKNOWN), (model.is_control, Kind.CONTROL), (model.is_byte, Kind.BYTE))
    return [
        Piece(
            model.id_to_piece(i),
            model.get_score(i),
            next((kind for test, kind in kinds if test(i)), Kind.NORMAL),
        )
        for i in range(model.get_piece_size())
    ]


@pytest.mark.parametrize("name", ["v1", "v3", "small"])
def test_the_same_pieces_give_the_same_ids(files: dict[str, Path], name: str) -> None:
    theirs = SentencePieceProcessor(model_file=str(files[name]))
    data = serialize(
        pieces_of(theirs), unk_id=theirs.unk_id(), bos_id=theirs.bos_id(), eos_id=theirs.eos_id()
    )
    ours = SentencePieceProcessor(model_proto=data)
    assert (ours.unk_id(), ours.bos_id(), ours.eos_id(), ours.pad_id()) == (0, 1, 2, -1)
    assert pieces_of(ours) == pieces_of(theirs)
    chance = random.Random(3)
    for _ in range(1000):
        text = hard_text(chance)
        assert ours.encode(text) == theirs.encode(text)


def test_what_it_says_of_itself() -> None:
    vocabulary, _ = parse_model(serialize(BASE, **IDS))
    assert vocabulary.control == {"<s>": 1, "</s>": 2} and vocabulary.decoded[-1] == "a"
    assert vocabulary.strip_first and not vocabulary.strip_all
    assert not parse_model(serialize(BASE, **IDS, dummy_prefix=False))[0].strip_first
    padded = [*BASE, Piece("<pad>", 0, Kind.CONTROL)]
    model = SentencePieceProcessor(model_proto=serialize(padded, **IDS, pad_id=len(BASE)))
    assert model.pad_id() == len(BASE)


@pytest.mark.parametrize(
    ("pieces", "ids", "line"),
    [
        (BASE[:3] + BASE[4:], IDS, "1 of 256 byte pieces are missing (such as <0x00>)"),
        ([*BASE, BASE[-1]], IDS, "piece 260 is 'a', as an earlier one is"),
        ([*BASE, Piece("", 0, Kind.NORMAL)], IDS, "piece 260 is '', which is empty"),
        ([*BASE, Piece("x" * 1024, 0, Kind.NORMAL)], IDS, "which is empty, too long or has a NUL"),
        ([*BASE, Piece("b", float("nan"), Kind.NORMAL)], IDS, "piece 260 has the score nan"),
        (BASE, IDS | {"eos_id": 260}, "the end piece has the id 260, and there are 260 pieces"),
        (BASE, IDS | {"unk_id": 5}, "1 pieces are unknown ones"),
        ([*BASE, replace(BASE[0], text="?")], IDS, "2 pieces are unknown ones, and one has to be"),
        (BASE * 600, IDS, "the vocabulary has 156000 pieces, and 131072 are the most"),
    ],
)
def test_refused(pieces: list[Piece], ids: dict[str, int], line: str) -> None:
    with pytest.raises(TokenizerError) as error:
        serialize(pieces, **ids)
    assert line in str(error.value)
