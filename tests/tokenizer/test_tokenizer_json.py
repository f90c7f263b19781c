"""`tokenizer.json` alone gives the ids that the `tokenizers` library gives, or is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaTokenizerFast

from tests.tokenizer.conftest import CORPUS
from tests.tokenizer.hard_texts import hard_text
from tokenizer import Tokenizer, TokenizerError

SPACE = "\u2581"
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
Found = dict[str, Any]


def metaspace(scheme: str, split: bool = False) -> Found:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def convert(model: Path, folder: Path) -> Path:
    """Have Transformers write `tokenizer.json` for a sentencepiece model."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    LlamaTokenizerFast.from_pretrained(str(folder)).backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").unlink()
    return folder


def assert_equal(folder: Path, count: int) -> None:
    """Compare ids of texts that spell no control token. To us these are text, whoever writes them."""
    ours, theirs = Tokenizer.load(folder), Library.from_file(str(folder / "tokenizer.json"))
    chance, compared = random.Random(count), 0
    while compared < count:
        text = hard_text(chance)
        if not ours.control_in(text):
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, bos=False) == expected, text
            compared += 1


@pytest.mark.parametrize("name", ["v1", "v3", "small"])
def test_ids_are_the_librarys(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert_equal(convert(files[name], tmp_path / "folder"), 1500)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1", "v3", "small"])
def test_ids_of_many_texts(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    assert_equal(convert(files[name], tmp_path / "folder"), 20_000)


def written(folder: Path, found: Found) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(found))
    return folder


def parts(normalizer: list[Found] | None, pre_tokenizer: Found | None) -> Found:
    sequence = {"type": "Sequence", "normalizers": normalizer} if normalizer else None
    return {"normalizer": sequence, "pre_tokenizer": pre_tokenizer}


@pytest.mark.parametrize(
    "how",
    [
        parts([PREPEND, REPLACE], None), parts([REPLACE], None), parts(None, metaspace("always")),
        parts(None, metaspace("first")), parts(None, metaspace("never")),
        parts([REPLACE], metaspace("first")),
        {"normalizer": REPLACE, "pre_tokenizer": None},
    ],
    ids=["prepend", "replace", "always", "first", "never", "replace first", "one"],
)  # fmt: skip
@pytest.mark.parametrize("merges", ["texts", "pairs"])
def test_every_way_to_begin_a_text(files: dict[str, Path], tmp_path: Path, how: Found, merges: str) -> None:
    folder = convert(files["small"], tmp_path / "folder")
    found = json.loads((folder / "tokenizer.json").read_text()) | how
    pairs = found["model"]["merges"]
    found["model"]["merges"] = pairs if merges == "pairs" else [" ".join(pair) for pair in pairs]
    assert_equal(written(folder, found), 400)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("how", [parts([PREPEND, REPLACE], None), parts(None, metaspace("first"))])
def test_added_tokens(files: dict[str, Path], tmp_path: Path, how: Found, special: bool) -> None:
    """Words beyond the vocabulary split a text. Special ones are never found in it."""
    folder = convert(files["small"], tmp_path / "folder")
    found = json.loads((folder / "tokenizer.json").read_text()) | how
    size = len(found["model"]["vocab"])
    for place, content in enumerate(("<|im_end|>", "gnu")):
        token = {"id": size + place, "content": content, "special": special and place == 0}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        found["added_tokens"].append(token | flags)
    written(folder, found)
    ours, theirs = Tokenizer.load(folder), Library.from_file(str(folder / "tokenizer.json"))
    for text in ("a gnu", "gnu", "gnu and gnu  gnu", " gnugnu ", "the gnu's", "no such animal"):
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids
    assert size not in ours.encode("a <|im_end|> b") and ours.control_in("<|im_end|>") == ["<|im_end|>"]
    assert ours.decode([size + 1]) == "gnu"


def test_tokens_of_both_files_count(tmp_path: Path) -> None:
    """Where they name the same token or the same id, that of tokenizer_config.json counts."""
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    found = small("abc", [("a", "b")])
    size = len(found["model"]["vocab"])
    found["added_tokens"] = [
        flags | {"id": size + i, "content": each} for i, each in enumerate(["gnu", "yak"])
    ]
    folder = written(tmp_path / "folder", found)
    declared = {str(size): flags | {"content": "emu"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    ours = Tokenizer.load(folder)
    assert ours.encode("emuyak", bos=False) == [size, size + 1]
    assert size not in ours.encode("gnu", bos=False)


def trained(size: int) -> Found:
    """A tokenizer that the library's own trainer makes. It parts words before it counts pairs, and knows no
    scores."""
    library = Library(BPE(unk_token="<unk>", byte_fallback=True))
    trainer = BpeTrainer(vocab_size=size, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    words = (word for line in CORPUS for word in line.replace(" ", f" {SPACE}").split(" "))
    library.train_from_iterator(words, trainer)
    found: Found = json.loads(library.to_str())
    found["added_tokens"] = found["added_tokens"][:3]
    return found | parts([PREPEND, REPLACE], None)


def test_a_tokenizer_that_never_was_sentencepieces(tmp_path: Path) -> None:
    found = trained(600)
    assert len(found["model"]["merges"]) > 100
    assert_equal(written(tmp_path / "folder", found), 1000)


def small(alphabet: str, merges: list[tuple[str, str]]) -> Found:
    """A tokenizer of these merges."""
    names = dict.fromkeys([*SPECIAL, *BYTES, *alphabet, SPACE, *(left + right for left, right in merges)])
    vocab = {name: i for i, name in enumerate(names)}
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, "vocab": vocab}
    model["merges"] = [f"{left} {right}" for left, right in merges]
    return {"added_tokens": [], "model": model, "post_processor": None, "decoder": None} | parts(
        [REPLACE], None
    )


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges over two or three letters in any order, so that pieces come from several pairs and overlap."""
    known = list(draw(st.sampled_from(["ab", "abc"])))
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(1, 12))):
        pair = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if pair not in merges and len("".join(pair)) <= 8:
            merges.append(pair)
            known.append("".join(pair))
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


def check_merges(folder: Path, merges: list[tuple[str, str]], seed: int, count: int) -> bool:
    """Whether the tokenizer of these merges is taken. Then its ids are the library's."""
    folder = written(folder, small("abc", merges))
    try:
        ours = Tokenizer.load(folder)
    except TokenizerError as error:
        assert "no merge joins" in str(error) and "\n" not in str(error)
        return False
    theirs = Library.from_file(str(folder / "tokenizer.json"))
    chance = random.Random(seed)
    for _ in range(count):
        text = "".join(chance.choice("aaabbbc d") for _ in range(chance.randrange(1, 30)))
        assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids, text
    return True


@given(merges=merge_lists(), seed=st.integers(0, 1 << 20))
@settings(max_examples=150, deadline=None)
def test_the_theory(
    tmp_path_factory: pytest.TempPathFactory, merges: list[tuple[str, str]], seed: int
) -> None:
    check_merges(tmp_path_factory.getbasetemp() / "merges", merges, seed, 60)


@pytest.mark.slow
@given(merges=merge_lists(), seed=st.integers(0, 1 << 20))
@settings(max_examples=3000, deadline=None)
def test_the_theory_at_length(
    tmp_path_factory: pytest.TempPathFactory, merges: list[tuple[str, str]], seed: int
) -> None:
    check_merges(tmp_path_factory.getbasetemp() / "merges", merges, seed, 200)


def test_what_is_refused_would_have_been_wrong(tmp_path: Path) -> None:
    """Here scores join b and c, which merges do not."""
    assert check_merges(tmp_path / "a", [("a", "b"), ("ab", "c")], 1, 50)
    assert not check_merges(tmp_path / "b", [("a", "b"), ("b", "c"), ("a", "bc")], 1, 50)


def bpe(**changes: object) -> Callable[[Found], object]:
    return lambda found: found["model"].update(changes)


def vocab(**changes: int) -> Callable[[Found], object]:
    return lambda found: found["model"]["vocab"].update(changes)


REFUSED: list[tuple[Callable[[Found], object], str]] = [
    (lambda f: f.update(model=3), "model is 3, and must be an object"),
    (bpe(type="Unigram"), "the model is 'Unigram', and only BPE can be read"),
    (bpe(type="WordPiece", merges=[]), "the model is 'WordPiece'"),
    (bpe(byte_fallback=False), "the model does not fall back to bytes"),
    (bpe(dropout=0.1), "dropout is 0.1, which sentencepiece has not"),
    (bpe(end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
    (bpe(ignore_merges=True), "ignore_merges is True"),
    (bpe(vocab=[]), "vocab is no object of up to"),
    (bpe(merges={}), "merges is no list"),
    (bpe(merges=["a b c"]), "merge 0 is 'a b c', and no pair"),
    (bpe(merges=[["a", 3]]), "merge 0 is ['a', 3], and no pair"),
    (bpe(merges=["a zz"]), "merge 0 of 'a' and 'zz' has parts that are no pieces"),
    (bpe(merges=["<s> a"]), "merge 0 of '<s>' and 'a' has parts that are no pieces"),
    (bpe(unk_token=3), "the vocabulary has no piece 3"),
    (vocab(a=7000), "piece 'a' has the id 7000, and 264 pieces have one each, from 0"),
    (vocab(a=True), "piece 'a' has the id True"),
    (vocab(a=3), "has the id 3"),
    (lambda f: f["model"]["vocab"].pop("<0x0A>"), "have one each, from 0"),
    (lambda f: f.update(added_tokens=3), "added_tokens is no list"),
    (lambda f: f.update(added_tokens=[3]), "added token 3, and must be an object with 'id' and 'content'"),
    (lambda f: f.update(parts([{"type": "NFKC"}], None)), "changes text by {'type': 'NFKC'}, which"),
    (lambda f: f.update(parts([], {"type": "ByteLevel"})), "a byte-level tokenizer, as Llama 3's"),
    (lambda f: f.update(parts([], None)), "does not replace spaces"),
    (lambda f: f.update(parts([], metaspace("sometimes"))), "prepend_scheme is 'sometimes'"),
    (lambda f: f.update(parts([], metaspace("first") | {"replacement": "_"})), "writes spaces as '_'"),
    (lambda f: f.update(normalizer=3), "normalizer is 3, and must be an object"),
    (lambda f: f.update(normalizer={"type": "Sequence", "normalizers": 3}), "and no sequence of objects"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), REFUSED, ids=[line[:30] for _, line in REFUSED])
def test_refused(tmp_path: Path, change: Callable[[Found], object], line: str) -> None:
    found = small("abc", [("a", "b")])
    assert Tokenizer.load(written(tmp_path / "whole", found)).encode("ab", bos=False)
    change(found)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(written(tmp_path / "folder", found))
    assert line in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'folder' / 'tokenizer.json'}: ")


def test_words_that_are_parted_at_spaces(tmp_path: Path) -> None:
    """This changes nothing if no piece has a space inside, and is refused otherwise."""
    found = small("abc", [("a", "b"), (SPACE, "a")]) | parts(None, metaspace("first", split=True))
    assert_equal(written(tmp_path / "a", found), 300)
    found = small("abc", [("a", SPACE)]) | parts(None, metaspace("first", split=True))
    with pytest.raises(TokenizerError, match="parts words at spaces, which some pieces hold"):
        Tokenizer.load(written(tmp_path / "b", found))
