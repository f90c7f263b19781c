"""Which tokens may follow by a grammar, from llguidance. Nothing else imports that."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import RequestError
from runtime.options import SamplingParams
from tokenizer.vocabulary import SPACE, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

MISSING = "json_schema and grammar need llguidance; install it with: pip install 'mixtral-runtime[grammar]'"

# The model chooses the tokens of a text that the grammar forces, as of any other. Else only the tokens of
# sentencepiece's encoding would be allowed, and an answer could not begin with a space that is not shown.
FREE = '\n%llguidance {"no_forcing": true}\n'

# At most so much between two parts of JSON. Without a limit, a model that has lost its way writes spaces
# until it has no tokens left. A line end and the indentation of eight levels fit.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,33}"

NO_BYTE = 0xFF  # no byte of UTF-8, and how llguidance marks special tokens
DIGITS = 4  # of a multipleOf: the automaton has as many states as the number says
LONGEST = 512 << 10  # characters of a schema or grammar: 16,000 properties, which take 4 s
LONGEST_PATTERN = 8 << 10  # of a regular expression, whose time grows as the square of its length
PATTERNS = re.compile(r'"pattern"\s*:\s*"((?:[^"\\]|\\.)*)"')  # in a schema
REGEXES = re.compile(r"/((?:[^/\\\n]|\\.)+)/")  # in a grammar, outside of its schemas
MULTIPLE = re.compile(r'"multipleOf"\s*:\s*-?([0-9.]+)')


class Words:
    """A vocabulary in llguidance's form: V tokens, then what some of them are at the start of a text, then
    one token that ends it.

    tokens  for each of llguidance's ids its bytes
    first   [V] int64, for each id the id of what it is at the start, where the decoder drops a space
    blank   [any] int64, the ids of which nothing is left there
    end     llguidance's id of the end
    """

    def __init__(self, vocabulary: Vocabulary, vocab: int) -> None:
        """`vocab` is the number V of the model's ids."""
        pieces = (*vocabulary.decoded, *[""] * vocab)[:vocab]
        control = {i: name for name, i in vocabulary.control.items() if i < vocab}
        self.tokens = [spelled(piece) for piece in pieces]
        for i, name in control.items():
            self.tokens[i] = name.encode()
        blank = []
        self.first = torch.arange(vocab, device="cpu")
        for i, piece in enumerate(pieces):
            if vocabulary.strip_first and isinstance(piece, str) and piece.startswith(SPACE):
                self.first[i] = len(self.tokens)
                self.tokens.append(spelled(piece.removeprefix(SPACE)))
                if not self.tokens[-1]:
                    blank.append(i)
        self.blank = torch.tensor(blank, dtype=torch.long, device="cpu")
        self.end = len(self.tokens)
        self.tokens.append(b"end")
        # The names that llguidance asks for.
        self.eos_token_id, self.bos_token_id = self.end, None
        self.special_token_ids = [*control, self.end]

    def __call__(self, text: bytes) -> list[int]:
        raise RequestError("llguidance asks for the tokens of a text, which no grammar forces here")


def spelled(piece: str | int) -> bytes:
    """The bytes that a piece stands for. None for a byte that no UTF-8 has."""
    if isinstance(piece, int):
        return bytes([piece]) if piece != NO_BYTE else b""
    return piece.replace(SPACE, " ").encode()


class Guide:
    """Makes matchers for one vocabulary. Making this takes some 0.1 s; it is made once and kept."""

    def __init__(self, vocabulary: Vocabulary, vocab: int) -> None:
        """Raises `RequestError` if llguidance is not installed."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise RequestError(MISSING) from None
        self.vocabulary, self.words = vocabulary, Words(vocabulary, vocab)
        self.tokenizer = LLTokenizer(TokenizerWrapper(self.words))

    def matcher(self, params: SamplingParams) -> LLMatcher:
        """What follows a text by the schema or grammar of `params`. Raises `RequestError` if it is none."""
        from llguidance import LLMatcher, LLParserLimits

        name = field_of(params)
        check_lengths(name, params.grammar or str(params.json_schema), params.grammar is not None)
        check_multiples(name, params.grammar or str(params.json_schema))
        source = json.dumps({"grammars": list(grammars(params))})
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self.tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"{name}: {one_line(matcher.get_error())}")
        return matcher

    def allowed(self, matcher: LLMatcher, name: str) -> Tensor:
        """Which of llguidance's ids may follow, [tokens] bool. Raises `RequestError` if none may."""
        bits = np.zeros((len(self.words.tokens) + 31) // 32, np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if matcher.is_error():  # otherwise unnoticed: then all bits are zero, except the end's
            raise RequestError(f"{name}: {failure(matcher)}")
        flags = np.unpackbits(bits.view(np.uint8), count=len(self.words.tokens), bitorder="little")
        return torch.from_numpy(flags.view(np.bool_))


def field_of(params: SamplingParams) -> str:
    return "json_schema" if params.json_schema is not None else "grammar"


def grammars(params: SamplingParams) -> Iterator[dict[str, Any]]:
    """The grammars of a request, in llguidance's form, the one to begin with first."""
    if params.json_schema is None:
        yield {"lark_grammar": str(params.grammar) + FREE}
        return
    yield {"lark_grammar": "start: @schema" + FREE}
    yield {"name": "schema", "json_schema": with_limit(json.loads(str(params.json_schema)))}


def with_limit(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that limits white space, unless it speaks of that itself. Grammars need it for their `%json`.

    >>> with_limit({"type": "null", "x-guidance": {"whitespace_flexible": False}})
    {'type': 'null', 'x-guidance': {'whitespace_flexible': False}}
    """
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict) or not own.keys().isdisjoint(("whitespace_pattern", "whitespace_flexible")):
        return schema
    return schema | {"x-guidance": own | {"whitespace_pattern": WHITESPACE}}


def check_lengths(name: str, text: str, is_grammar: bool) -> None:
    """Refuse what is so long that it would keep the machine from other requests."""
    if len(text) > LONGEST:
        raise RequestError(f"{name}: it has {len(text)} characters, and may have up to {LONGEST}")
    found = PATTERNS.findall(text)
    if is_grammar:
        outside = "\n".join(line.partition("%json")[0] for line in text.splitlines())
        found += REGEXES.findall(outside)
    if (longest := max(map(len, found), default=0)) > LONGEST_PATTERN:
        raise RequestError(
            f"{name}: a regular expression has {longest} characters, and may have up to {LONGEST_PATTERN}"
        )


def check_multiples(name: str, text: str) -> None:
    """Refuse what llguidance would compile for minutes, during which nothing can stop it."""
    for number in MULTIPLE.findall(text):
        if len(number.replace(".", "").strip("0")) > DIGITS:
            raise RequestError(
                f"{name}: multipleOf is {number}, and may have up to {DIGITS} digits beside zeros"
            )


def failure(matcher: LLMatcher) -> str:
    """Why nothing may follow."""
    if matcher.get_error().startswith("NoExtension"):
        return "no token of this model goes on with the text; the grammar leads to a dead end"
    return one_line(matcher.get_error())


def one_line(message: str) -> str:
    """An error of llguidance's without the lines that quote the source.

    >>> one_line('at 1(8): unknown name: "foo"\\n   1 | start: foo\\n              ^\\n')
    'at 1(8): unknown name: "foo"'
    """
    lines = [line.strip() for line in message.splitlines()]
    kept = [line for line in lines if not re.match(r"(\d+ \||\^+$|$|<)", line)]
    text = " ".join(kept)
    return text if len(text) <= 300 else text[:297] + "..."
