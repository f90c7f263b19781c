"""Ids to text: whole, and one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from sentencepiece import SentencePieceProcessor

from tokenizer import StreamDecoder, Tokenizer, TokenizerError

BROKEN = "\ufffd"


def bytes_to_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return [tokenizer.vocabulary.decoded.index(byte) for byte in data]


def push_all(stream: StreamDecoder, ids: list[int]) -> str:
    return "".join(stream.push(i) for i in ids)


def test_every_piece_decodes_as_in_sentencepiece(ours: Tokenizer, theirs: SentencePieceProcessor) -> None:
    everything = list(range(ours.vocab_size))
    anchor = ours.encode("a", bos=False)[-1]
    assert [ours.decode([i]) for i in everything] == [theirs.decode([i]) for i in everything]
    assert [ours.decode([anchor, i]) for i in everything] == [theirs.decode([anchor, i]) for i in everything]


def test_any_ids_decode_as_in_sentencepiece(
    ours: Tokenizer, theirs: SentencePieceProcessor, id_lists: SearchStrategy[list[int]]
) -> None:
    @given(id_lists)
    def compare(ids: list[int]) -> None:
        assert ours.decode(ids) == theirs.decode(ids)

    compare()


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
        {"unk_surface": "?", "byte_fallback": False, "vocab_size": 150},
    ],
    ids=str,
)
def test_other_normalisers_decode_as_in_sentencepiece(
    trained: Callable[..., Path], options: dict[str, Any]
) -> None:
    file = trained(**options)
    ours, theirs = Tokenizer.load(file), SentencePieceProcessor(model_file=str(file))
    pool = [theirs.piece_to_id("\u2581"), theirs.piece_to_id("\u2581fox"), 0, 1, 2]

    @given(st.lists(st.sampled_from(pool) | st.integers(0, ours.vocab_size - 1), max_size=6))
    def compare(ids: list[int]) -> None:
        assert ours.decode(ids) == theirs.decode(ids)

    compare()


def test_pushes_and_flush_add_up_to_decode(
    ours: Tokenizer, theirs: SentencePieceProcessor, id_lists: SearchStrategy[list[int]]
) -> None:
    @given(id_lists)
    def compare(ids: list[int]) -> None:
        stream = ours.stream()
        shown = ""
        for n, token_id in enumerate(ids, 1):
            shown += stream.push(token_id)
            whole = theirs.decode(ids[:n])
            held_back = whole[len(shown) :]
            assert whole.startswith(shown)  # nothing shown is ever taken back
            assert held_back in (
                "",
                BROKEN,
                BROKEN * 2,
                BROKEN * 3,
            )  # and only an unfinished character is held
        assert shown + stream.flush() == theirs.decode(ids)

    compare()


def test_no_part_of_a_character_is_shown(ours: Tokenizer, texts: SearchStrategy[str]) -> None:
    @given(texts.filter(lambda text: BROKEN not in text))
    def watch(text: str) -> None:
        stream = ours.stream()
        shown = ""
        for token_id in ours.encode(text):
            shown += stream.push(token_id)
            assert text.startswith(shown)
        assert shown == text
        assert stream.flush() == ""

    watch()


def test_a_continuation_keeps_its_space(ours: Tokenizer, texts: SearchStrategy[str]) -> None:
    @given(texts.filter(lambda text: BROKEN not in text), st.data())
    def split(text: str, data: st.DataObject) -> None:
        ids = ours.encode(text)
        cut = data.draw(st.integers(0, len(ids)))
        before = ours.decode(ids[:cut]).rstrip(BROKEN)
        stream = ours.stream(prefix=ids[:cut])
        assert before + push_all(stream, ids[cut:]) + stream.flush() == text

    split()


def test_any_ids_split_anywhere(
    ours: Tokenizer, theirs: SentencePieceProcessor, id_lists: SearchStrategy[list[int]]
) -> None:
    @given(id_lists, id_lists)
    def split(prefix: list[int], ids: list[int]) -> None:
        first = ours.stream()
        settled = push_all(first, prefix)
        stream = ours.stream(prefix)
        assert settled + push_all(stream, ids) + stream.flush() == theirs.decode(prefix + ids)
        if not first.flush():  # the prefix ends with a whole character: the plain rule holds
            stream = ours.stream(prefix)
            rest = theirs.decode(prefix + ids)[len(theirs.decode(prefix)) :]
            assert push_all(stream, ids) + stream.flush() == rest

    split()


def test_leading_space_by_example(ours: Tokenizer) -> None:
    prompt, word = ours.encode("The"), ours.encode("fox", bos=False)
    assert push_all(ours.stream(), word) == "fox"
    assert push_all(ours.stream(prefix=[ours.bos_id]), word) == "fox"
    assert push_all(ours.stream(prefix=prompt), word) == " fox"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\xe2\x82\xac", ["", "", "€"]),
        (b"\xe2A", ["", BROKEN + "A"]),  # released at once: nothing can complete it
        (b"\xe2\x82\xe2\x82\xac", ["", "", BROKEN * 2, "", "€"]),
        (b"\x80", [BROKEN]),
        (b"\xc0\x80", [BROKEN, BROKEN]),  # overlong
        (b"\xed\xa0\x80", ["", BROKEN * 2, BROKEN]),  # a surrogate
        (b"\xf4\x90\x80\x80", ["", BROKEN * 2, BROKEN, BROKEN]),  # beyond U+10FFFF
        (b"\xf0\x9f\xa6\x8a", ["", "", "", "🦊"]),
        (b"\xf0\x9f\xa6\xf0\x9f\xa6\x8a", ["", "", "", BROKEN * 3, "", "", "🦊"]),
    ],
)
def test_bytes_are_released_when_certain(ours: Tokenizer, data: bytes, shown: list[str]) -> None:
    stream = ours.stream()
    assert [stream.push(i) for i in bytes_to_ids(ours, data)] == shown
    assert stream.flush() == ""


def test_an_unfinished_character_is_broken_by_what_follows(ours: Tokenizer) -> None:
    start = bytes_to_ids(ours, b"\xf0\x9f")
    word = ours.encode("fox", bos=False)
    stream = ours.stream()
    assert push_all(stream, start) == ""
    assert push_all(stream, word) == BROKEN * 2 + " fox"
    assert push_all(stream, start) == ""
    assert stream.push(ours.eos_id) == BROKEN * 2
    assert push_all(stream, start) == ""
    assert stream.flush() == BROKEN * 2
    assert stream.flush() == ""


def test_a_prefix_may_end_inside_a_character(ours: Tokenizer) -> None:
    fox = bytes_to_ids(ours, "🦊".encode())
    completed = ours.stream(prefix=fox[:2])
    assert push_all(completed, fox[2:]) == "🦊"
    assert ours.stream(prefix=fox[:2]).flush() == BROKEN * 2


def test_control_pieces_vanish(ours: Tokenizer) -> None:
    control = list(ours.vocabulary.control.values())
    ids = ours.encode("The fox", bos=False)
    assert ours.decode(control) == ""
    assert ours.decode([*control, *ids, ours.eos_id]) == "The fox"


@pytest.mark.parametrize("bad", [-1, 400, 32768, 10**12])
def test_ids_out_of_range(small: Tokenizer, bad: int) -> None:
    with pytest.raises(TokenizerError, match=rf"token id {bad} is outside .* of 400 pieces"):
        small.decode([bad])
    stream = small.stream()
    word = small.encode("fox", bos=False)
    with pytest.raises(TokenizerError):
        stream.push(bad)
    assert push_all(stream, word) == "fox"  # the stream is none the worse
    with pytest.raises(TokenizerError):
        small.stream(prefix=[bad])


@pytest.mark.parametrize("bad", [1.0, "1", None])
def test_ids_must_be_integers(small: Tokenizer, bad: Any) -> None:
    with pytest.raises(TokenizerError, match="must be an integer, got"):
        small.decode([bad])
