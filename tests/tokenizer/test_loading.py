"""Finding the file, and refusing what is no sentencepiece model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import Tokenizer, TokenizerError
from tokenizer.model_file import find_model


def refusal(path: Path) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}")
    assert "\n" not in message
    return message


def test_from_a_file_a_folder_and_a_string(small: Tokenizer, small_file: Path) -> None:
    text = "The quick fox"
    for path in (small_file, small_file.parent, str(small_file), str(small_file.parent)):
        assert Tokenizer.load(path).encode(text) == small.encode(text)


def test_plain_name_comes_first(tmp_path: Path) -> None:
    for name in ("tokenizer.model.v3", "tokenizer.model", "tokenizer.json"):
        (tmp_path / name).touch()
    assert find_model(tmp_path).name == "tokenizer.model"


def test_a_single_versioned_name_will_do(tmp_path: Path) -> None:
    for name in ("tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).touch()
    assert find_model(tmp_path).name == "tokenizer.model.v3"


def test_several_versions_are_ambiguous(tmp_path: Path) -> None:
    for name in ("tokenizer.model.v1", "tokenizer.model.v3"):
        (tmp_path / name).touch()
    assert "holds 2 tokenizers ('tokenizer.model.v1', 'tokenizer.model.v3')" in refusal(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert "holds no tokenizer.model and no tokenizer.json; copy one" in refusal(tmp_path)
    assert "no such file or folder" in refusal(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "does not replace spaces, as sentencepiece does; take tokenizer.model" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 493443\n", "Git LFS pointer"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "not a sentencepiece model"),
        (b"<!DOCTYPE html><html></html>", "not a sentencepiece model"),
        (b"\0" * 1000, "not a sentencepiece model"),
        (b"\xff" * 1000, "number of more than 64 bits"),
        (b"\x12\x00", "holds no pieces"),
        (b"\x0a\x03\x0a\x01\xff", "spells piece 0 in broken UTF-8"),
        (b"\x0a\x00", "leaves piece 0 without a name"),
        (b"\x0a\x05\x0a\x01a\x18\x09", "gives piece 0 the unknown kind 9"),
        (b"\x0a\x05\x0a\x01a\x18\x06", "calls piece 0 a byte, but its name is 'a'"),
        (b"\x0a\x03\x0a\x01a", "sentencepiece refuses this model of 1 pieces"),  # no unknown piece
    ],
)
def test_broken_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], data: bytes, complaint: str) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    assert complaint in refusal(file)
    assert capfd.readouterr() == ("", "")


def test_cut_short_anywhere(small_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = small_file.read_bytes()
    file = tmp_path / "tokenizer.model"
    for size in [*range(1, len(data), 97), len(data) - 1]:
        file.write_bytes(data[:size])
        refusal(file)
    assert capfd.readouterr() == ("", "")


def test_damaged_files_are_refused_or_work(
    small_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = small_file.read_bytes()
    file = tmp_path / "tokenizer.model"
    spots = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255))

    @given(st.lists(spots, min_size=1, max_size=4))
    def damage(changes: list[tuple[int, int]]) -> None:
        damaged = bytearray(data)
        for at, value in changes:
            damaged[at] = value
        file.write_bytes(damaged)
        try:
            tokenizer = Tokenizer.load(file)
        except TokenizerError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(tokenizer.decode(tokenizer.encode("The fox")), str)

    damage()
    assert capfd.readouterr() == ("", "")


def test_too_large(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 30)
    assert "1073741824 bytes is too large" in refusal(file)


def varint(number: int) -> bytes:
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def section(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


MIB = 1 << 20
HOSTILE = {
    "zeros": (b"\0" * (15 * MIB), "field with the number 0"),
    "fields that mean nothing": (b"\x20\0" * (7 * MIB), "more than 16 sections"),
    "pieces": (b"\x0a\x03\x0a\x01a" * (3 * MIB), "more than 131072 pieces"),
    "settings": (section(2, b"\x10\0" * (7 * MIB)), "more than 16384 settings"),
    "sections": (section(2, b"\x10\0" * 200) * (30 << 10), "more than 16 sections"),
    "fields of pieces": (section(1, b"\x10\0" * 500) * (15 << 10), "more than 8 fields in piece 0"),
    "a name": (section(1, section(1, b"a" * 15 * MIB)), "bytes on piece 0 (limit 1024)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_file_costs_is_bounded(tmp_path: Path, name: str) -> None:
    data, complaint = HOSTILE[name]
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    began = time.thread_time()
    assert complaint in refusal(file)
    assert time.thread_time() - began < 3  # 0.2 s; without bounds 5 to 17


@pytest.mark.parametrize(
    "error", [OSError(36, "File name too long"), PermissionError(13, "Permission denied")]
)
def test_a_folder_that_cannot_be_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(self: Path) -> bool:
        raise error

    monkeypatch.setattr(Path, "is_file", fail)
    with pytest.raises(TokenizerError, match=rf"cannot be searched \({error.strerror}\)"):
        find_model(tmp_path)


def test_a_path_that_is_none() -> None:
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(TokenizerError, match=r"cannot be searched|no such file"):
            Tokenizer.load(path)


def test_unreadable(small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "cannot be read (Permission denied)" in refusal(small_file)


@pytest.mark.parametrize("options", [{"bos_id": -1}, {"eos_id": -1}], ids=str)
def test_begin_and_end_pieces_are_needed(trained: Callable[..., Path], options: dict[str, int]) -> None:
    assert "names no begin or end piece" in refusal(trained(**options))


def test_a_denormalizer_is_refused(trained: Callable[..., Path], tmp_path: Path) -> None:
    rules = tmp_path / "f_to_g.tsv"
    rules.write_text("66\t67\n")
    assert "knows no denormalizer" in refusal(trained(denormalization_rule_tsv=str(rules)))


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": "<|\ud800|>"}}}),
        ("added_tokens.json", {"<|\udfff|>": 400}),
    ],
)
def test_added_tokens_that_utf_8_cannot_spell(
    small_file: Path, tmp_path: Path, file: str, contents: dict[str, object]
) -> None:
    """JSON can: its escapes are halves of characters."""
    (tmp_path / "tokenizer.model").write_bytes(small_file.read_bytes())
    (tmp_path / file).write_text(json.dumps(contents))
    assert "and must be text of 1 to" in refusal(tmp_path)
