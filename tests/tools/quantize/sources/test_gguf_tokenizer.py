"""The tokenizer of a GGUF header gives the ids of the folder from which it was made."""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from model.errors import ModelError
from runtime.engine import DEMO
from tests.tokenizer.conftest import train
from tests.tokenizer.hard_texts import PAGE, hard_text
from tests.tokenizer.templates import STYLES, make_folder, token
from tests.tokenizer.test_tokenizer_json import convert
from tests.tools.quantize.sources.gguf_vocabulary import CONVERTERS, keys_of, pieces_of, without_scores
from tests.tools.quantize.sources.gguf_writer import tokens_of
from tokenizer import Tokenizer
from tokenizer.vocabulary import SPACE, Kind
from tools.quantize.sources.gguf_tokenizer import tokenizer_files

FILE = Path("x.gguf")
TEXTS = 2000
CHAT = [
    {"role": "system", "content": "Be brief, <|im_end|>.\n"},
    {"role": "user", "content": " Wer ist\n\nda? </s>"},
    {"role": "assistant", "content": "Nobody  here 🦊."},
    {"role": "user", "content": "[INST] Really?  "},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "original").mkdir()
    return tmp_path / "original"


@pytest.fixture
def load(tmp_path: Path) -> Callable[[dict[str, Any], int], Tokenizer]:
    """Load what a header with these keys gives."""

    def load(keys: dict[str, Any], vocab: int) -> Tokenizer:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        for name, contents in tokenizer_files(FILE, keys, vocab).items():
            assert isinstance(contents, bytes)
            (out / name).write_bytes(contents)
        return Tokenizer.load(out, vocab=vocab)

    return load


def texts(count: int) -> list[str]:
    chance = random.Random(3)
    return [hard_text(chance) for _ in range(count)]


def same(made: Tokenizer, original: Tokenizer, count: int = 500) -> None:
    markers = [*original.specials.control.tokens, *original.specials.words.tokens]
    chance = random.Random(4)
    for text in texts(count):
        if markers and chance.random() < 0.5:
            text += chance.choice(markers) + chance.choice(["", " ", "x"]) + text[:9]
        ids = original.encode(text)
        assert made.encode(text) == ids
        assert made.decode(ids) == original.decode(ids)
        assert [*map(made.stream().push, ids)] == [*map(original.stream().push, ids)]
    assert made.ends == original.ends and (made.bos_id, made.eos_id) == (original.bos_id, original.eos_id)
    assert made.encode_chat(CHAT) == original.encode_chat(CHAT)
    assert (made.template is None) == (original.template is None)


@pytest.mark.parametrize("converter", CONVERTERS)
@pytest.mark.parametrize("name", ["demo", "v1", "v3"])
def test_the_ids_of_sentencepiece(
    files: dict[str, Path], folder: Path, load: Any, converter: str, name: str
) -> None:
    shutil.copy((files | {"demo": DEMO / "tokenizer.model"})[name], folder / "tokenizer.model")
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    made = load(keys_of(folder, original.vocab_size(), converter), original.vocab_size())
    for text in texts(TEXTS if converter == "today" else 500):
        assert made.encode(text, bos=False) == original.encode(text)
    same(made, Tokenizer.load(folder, vocab=original.vocab_size()), 50)


@pytest.mark.parametrize(("style", "converter"), [*zip(STYLES, itertools.cycle(CONVERTERS))])
def test_fine_tunes(tmp_path: Path, load: Any, style: str, converter: str) -> None:
    """With a padded vocabulary, too."""
    folder = make_folder(tmp_path / "original", STYLES[style])
    same(load(keys_of(folder, 32016, converter), 32016), Tokenizer.load(folder, vocab=32016), 100)


def larger(vocab: int) -> bytes:
    """A model with more pieces than the small one, of English."""
    model, lines = io.BytesIO(), PAGE.splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        minloglevel=5,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("converter", CONVERTERS)
def test_a_larger_model_with_added_words(tmp_path: Path, load: Any, converter: str) -> None:
    """Words that are not special, one of them with a space, and pieces of the model that are special."""
    settings = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "900": token("foxglove", special=False),
            "901": token("<|im_end|>"),
            "902": token("two words", special=False),
            "903": token("[/quote]", special=False),
        },
    }
    folder = make_folder(tmp_path / "original", settings)
    (folder / "tokenizer.model").write_bytes(larger(900))
    made, original = load(keys_of(folder, 910, converter), 910), Tokenizer.load(folder, vocab=910)
    same(made, original, TEXTS if converter == "today" else 500)
    assert 900 in made.encode("a foxglove") and 902 in made.encode("two words")
    assert made.decode([902]) == "two words"


@pytest.mark.parametrize("name", ["v1", "v3", "demo"])
def test_without_scores(files: dict[str, Path], tmp_path: Path, load: Any, name: str) -> None:
    """Merges tell which piece is better, and give the ids of the tokenizer.json that they come from. These
    are sentencepiece's but for runs of spaces. Where a text begins with a space, a header does not tell
    whether there is another before it."""
    file = (files | {"demo": DEMO / "tokenizer.model"})[name]
    folder = convert(file, tmp_path / "json")
    original = Tokenizer.load(folder)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    shutil.copy(file, folder / "tokenizer.model")
    tokens = without_scores(folder)
    made = load(tokens_of(tokens, merges=[" ".join(pair) for pair in merges]), len(tokens))
    for text in texts(1000):
        if not text.startswith((" ", SPACE)):
            assert made.encode(text) == original.encode(text)
    line = r"all \d+ pieces have one score, and no merges tell which is better"
    with pytest.raises(ModelError, match=line):
        tokenizer_files(FILE, tokens_of(tokens), len(tokens))


def test_without_a_space_at_the_beginning(folder: Path, load: Any) -> None:
    (folder / "tokenizer.model").write_bytes(train(add_dummy_prefix=False))
    keys = keys_of(folder, 400, "today") | {"tokenizer.ggml.add_space_prefix": False}
    made, original = load(keys, 400), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts(500):
        ids = original.encode(text)
        assert made.encode(text, bos=False) == ids and made.decode(ids) == original.decode(ids)


def test_a_user_defined_piece_with_spaces(folder: Path, load: Any) -> None:
    """Converters write it with spaces, and sentencepiece wants its own sign for them."""
    (folder / "tokenizer.model").write_bytes(train(user_defined_symbols=["big  gap"]))
    tokens = pieces_of(folder)
    [i] = [i for i, (text, _, _) in enumerate(tokens) if text in ("big  gap", f"big{SPACE * 2}gap")]
    tokens[i] = "big  gap", 0.0, Kind.USER_DEFINED
    made = load(tokens_of(tokens), 400)
    assert i in made.encode("a big  gap here") and i not in made.encode("a big gap here")
    assert made.decode([i]) == "big  gap"


# --- refusals

BYTE_TOKENS = [(f"<0x{byte:02X}>", 0.0, Kind.BYTE) for byte in range(256)]
PLAIN = [
    ("<unk>", 0.0, Kind.UNKNOWN), ("<s>", 0.0, Kind.CONTROL), ("</s>", 0.0, Kind.CONTROL), *BYTE_TOKENS,
    ("a", -1.0, Kind.NORMAL), ("b", -2.0, Kind.NORMAL), (SPACE, -3.0, Kind.NORMAL),
]  # fmt: skip
LOST = "; give another tokenizer by --tokenizer PATH"
CANNOT = "its tokenizer cannot be used ("
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt2"}, f"its tokenizer is 'gpt2', and only sentencepiece's ('llama') can be read{LOST}"),
    ({"model": None}, f"its tokenizer is None, and only sentencepiece's ('llama') can be read{LOST}"),
    ({"tokens": None}, f"tokenizer.ggml.tokens is no list of str{LOST}"),
    ({"tokens": [1, 2]}, f"tokenizer.ggml.tokens is no list of str{LOST}"),
    ({"scores": "x"}, f"tokenizer.ggml.scores is no list of float{LOST}"),
    ({"token_type": [1.0]}, f"tokenizer.ggml.token_type is no list of int{LOST}"),
    ({"scores": [0.0]},
     "262 tokens, 1 scores and 262 kinds of tokens, for a model of 300 ids; the file is damaged"),
    ({"token_type": [9] * 262}, "a token is of the unknown kind 9; the file is damaged"),
    ({"eos_token_id": 262}, "tokenizer.ggml.eos_token_id is 262, and there are 262 tokens"),
    ({"eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is 'x', and there are 262 tokens"),
    ({"tokens": ["a"] * 262}, f"{CANNOT}piece 1 is 'a', as an earlier one is){LOST}"),
    ({"scores": [float("nan"), *[-float(i) for i in range(261)]]},
     f"{CANNOT}piece 0 has the score nan, and needs a finite one){LOST}"),
    ({"token_type": [1] * 262}, f"{CANNOT}256 of 256 byte pieces are missing (such as <0x00>)){LOST}"),
    ({"token_type": [2, 2, *[int(kind) for _, _, kind in PLAIN[2:]]]},
     f"{CANNOT}2 pieces are unknown ones, and one has to be){LOST}"),
    ({"scores": [-1000.0] * 262},
     f"{CANNOT}all 3 pieces have one score, and no merges tell which is better){LOST}"),
    ({"scores": [-1000.0] * 262, "merges": ["a c"]},
     f"{CANNOT}merge 0 of 'a' and 'c' has parts that are no pieces){LOST}"),
    ({"tokens": [*[text for text, _, _ in PLAIN[1:]], "a" * 20_000], "scores": [-1000.0] * 262, "merges": []},
     f"{CANNOT}pieces have up to 20000 characters, far more than Mixtral's){LOST}"),
    ({"scores": [-1000.0] * 262, "merges": 3}, f"{CANNOT}merges is no list of up to 2097152 pairs){LOST}"),
    ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is 3, and must be a text"),
    ({"tokenizer.chat_template": "x" * (1 << 19)},
     f"{CANNOT}tokenizer_config.json: the chat template has 524288 characters, and must be 262144 at most)"
     f"{LOST}"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), REFUSED, ids=[line[:40] for _, line in REFUSED])
def test_refused(changes: dict[str, Any], line: str) -> None:
    keys = tokens_of(PLAIN) | {
        name if name.startswith("tokenizer.") else f"tokenizer.ggml.{name}": value
        for name, value in changes.items()
    }
    assert tokenizer_files(FILE, tokens_of(PLAIN), 300)
    with pytest.raises(ModelError) as error:
        tokenizer_files(FILE, keys, 300)
    assert str(error.value) == f"x.gguf: {line}"


def test_more_tokens_than_ids() -> None:
    with pytest.raises(ModelError, match=r"262 tokens, 262 scores and 262 kinds of tokens, for .* 261"):
        tokenizer_files(FILE, tokens_of(PLAIN), 261)
