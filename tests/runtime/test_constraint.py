"""Constrained text: valid whatever the logits, and the masks against a list of all texts that are allowed."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from runtime import Engine, EngineOptions, OptionError, RequestError, SamplingParams
from runtime.answer import Answer, Token
from runtime.batching.batch import Work
from runtime.constraint import Constraint, Constraints
from runtime.engine import DEMO
from runtime.generate import main
from runtime.guidance import with_limit
from runtime.sampler import sample
from tests.runtime.constrained import valid, written
from tests.runtime.schemas import random_schema
from tokenizer import StreamDecoder, Tokenizer
from tokenizer.vocabulary import SPACE

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TEXTS = ("", "on", "only", " x", "  x", "é", "🦊", "x🦊y", "def", "de\tf", "def read", "\u2581")


class Subject:
    """The demo's tokenizer, and what constrains its texts."""

    def __init__(self, **vocabulary: bool) -> None:
        self.tokenizer = Tokenizer.load(DEMO)
        self.tokenizer.vocabulary = replace(self.tokenizer.vocabulary, **vocabulary)
        self.pieces, self.ends = self.tokenizer.vocabulary.decoded, self.tokenizer.ends
        self.constraints = Constraints(len(self.pieces))

    def constraint(self, decoder: StreamDecoder | None = None, **fields: Any) -> Constraint:
        decoder = decoder or self.tokenizer.stream()
        made = self.constraints.make(SamplingParams(**fields), decoder, self.ends)
        assert made is not None
        return made


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject()


def test_500_of_500_random_schemas_and_temperatures(subject: Subject) -> None:
    right = 0
    for seed in range(500):
        chance = Random(seed)
        params = SamplingParams(
            json_schema=random_schema(chance),
            seed=seed,
            temperature=chance.choice((0, 0.3, 1, 3, 1e6)),
            max_new_tokens=4000,
            top_p=chance.choice((1, 0.9)),
            top_k=chance.choice((0, 5)),
            repetition_penalty=chance.choice((1, 1.3)),
        )
        prompt = chance.choice(([1], subject.tokenizer.encode("x")))
        decoder = subject.tokenizer.stream(prompt)
        constraint = subject.constraints.make(params, decoder, subject.ends)
        answer = Answer(prompt, params, decoder, 4000, subject.ends, constraint)
        valid(written(answer, subject.pieces, seed), json.loads(str(params.json_schema)))
        right += 1
    assert right == 500


class Reader:
    """What a reader sees of tokens, in bytes: the slow way, by the decoder itself."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self.decoder = decoder

    def seen(self, ids: Sequence[int]) -> bytes:
        decoder, text = StreamDecoder(self.decoder.vocabulary), b""
        decoder.at_start = self.decoder.at_start
        for i in ids:
            piece = decoder.vocabulary.decoded[i]
            shown = decoder.push(i)
            text += bytes([piece]) if isinstance(piece, int) else shown.encode()
        return text


def alternatives(texts: Sequence[str]) -> str:
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


@pytest.mark.parametrize("start", ["alone", "after text", "squeezed", "without a space"])
def test_the_mask_is_what_a_list_of_all_texts_allows(start: str) -> None:
    subject = Subject(
        **{"squeezed": {"strip_all": True}, "without a space": {"strip_first": False}}.get(start, {})
    )
    decoder = subject.tokenizer.stream(subject.tokenizer.encode("x") if start == "after text" else ())
    reader, texts = Reader(decoder), [text.encode() for text in TEXTS]
    chance, whole, grammar = Random(1), set(), alternatives(TEXTS)
    for _ in range(12):
        constraint, ids = subject.constraint(decoder, grammar=grammar), list[int]()
        while not ids or ids[-1] not in subject.ends:
            mask, before = constraint.mask(), reader.seen(ids)
            for i, piece in enumerate(decoder.vocabulary.decoded):
                if i in subject.ends:
                    expected = before in texts
                elif piece == "" or (start == "squeezed" and piece == SPACE and not ids):
                    expected = False  # a control token, and one that could be repeated forever
                else:
                    after = reader.seen([*ids, i])
                    expected = any(text.startswith(after) for text in texts)
                assert bool(mask[i]) == expected, (ids, before, piece)
            assert constraint.finished == (not any(t.startswith(before) and t != before for t in texts))
            ids.append(chance.choice(mask.nonzero().flatten().tolist()))
            constraint.accept(ids[-1])
        whole.add(before)
    assert len(whole) > 4


def test_masks_and_sampling_agree() -> None:
    """A masked token is not drawn, nor counted among the K likeliest. Log-probabilities are the model's."""
    logits, mask = torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.tensor([False, True, False, True])
    params, generator = SamplingParams(temperature=50.0, top_k=2, top_p=1), torch.Generator().manual_seed(1)
    drawn = {t.id: t for t in (sample(logits, params, None, generator, allowed=mask) for _ in range(200))}
    assert drawn.keys() == {1, 3}
    assert drawn[3].logprob == pytest.approx(logits.log_softmax(-1)[3].item())
    assert sample(logits, SamplingParams(temperature=0), None, None, allowed=mask).id == 1
    with pytest.raises(RequestError, match="no token can be sampled"):
        biased = SamplingParams(logit_bias={1: -torch.inf, 3: -torch.inf})
        sample(logits, biased, None, generator, allowed=mask)


@pytest.mark.parametrize(
    "fields", [{"json_schema": PERSON}, {"grammar": f"start: %json {json.dumps(with_limit(PERSON))}"}]
)
def test_spaces_between_parts_have_a_limit(subject: Subject, fields: dict[str, Any]) -> None:
    """A model that writes a space wherever it may comes to an end all the same."""
    constraint, text, token = subject.constraint(**fields), "", -1
    decoder, space = subject.tokenizer.stream(), subject.pieces.index(0x20)
    while token not in subject.ends:
        mask = constraint.mask()
        token = space if mask[space] else int(mask.nonzero()[-1])
        constraint.accept(token)
        text += "" if token in subject.ends else decoder.push(token)
        assert len(text) < 500
    valid(text, PERSON)
    assert max(map(len, re.findall(" *", re.sub('"[^"]*"', '"', text)))) == 33


def test_a_grammar_can_name_control_tokens(subject: Subject) -> None:
    """They are not shown. What follows one at the start is at the start still."""
    begin = subject.tokenizer.vocabulary.control["<s>"]
    for named in ("<s>", f"<[{begin}]>"):
        constraint, decoder = subject.constraint(grammar=f'start: {named} "on"'), subject.tokenizer.stream()
        assert constraint.mask().nonzero().flatten().tolist() == [begin]
        constraint.accept(begin)
        assert decoder.push(begin) == ""
        pieces = {decoder.vocabulary.decoded[i] for i in constraint.mask().nonzero().flatten().tolist()}
        assert pieces == {SPACE, SPACE + "o", SPACE + "on", "o", "on", ord("o")} & {
            *decoder.vocabulary.decoded
        }


REFUSED = [
    ({"json_schema": {"type": "strin"}}, "json_schema: Invalid type: strin"),
    ({"json_schema": {"not": {}}}, "json_schema: .*not"),
    ({"json_schema": {"$ref": "http://x/y"}}, "json_schema: .*http://x/y"),
    ({"json_schema": {"type": "string", "minLength": 2, "maxLength": 1}}, "json_schema: Unsatisfiable"),
    ({"json_schema": {"type": "string", "pattern": "(("}}, "json_schema: .*unclosed group"),
    ({"json_schema": {"type": "string", "pattern": "a?" * 9999}}, "json_schema: .* has 19998 characters"),
    ({"grammar": "start: %json {}\nx: /" + "a?" * 9999 + "/"}, "grammar: a regular .* has 19998 characters"),
    ({"json_schema": {"const": "x" * 600_000}}, "json_schema: it has 600013 characters"),
    (
        {"json_schema": {"type": "integer", "multipleOf": 1000003}},
        "json_schema: multipleOf is 1000003, .* 4 ",
    ),
    ({"json_schema": '{"items":' * 200 + "{}" + "}" * 200}, "json_schema: recursion limit"),
    ({"json_schema": {"$ref": "#"}}, "json_schema: no token .* dead end"),
    ({"grammar": "start: foo"}, 'grammar: .*unknown name: "foo"$'),
    ({"grammar": "start: /((/"}, "grammar: .*unclosed group"),
    ({"grammar": "begin: start"}, "grammar: "),
    ({"grammar": "start: start"}, "grammar: no token .* dead end"),
    ({"grammar": "start: <[99999]>"}, "grammar: .*99999"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_grammar_that_is_none_is_refused_at_once_in_one_line(
    subject: Subject, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        subject.constraint(**fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 330


def test_a_grammar_that_grows_too_complex_ends_the_text_with_an_error(subject: Subject) -> None:
    """Otherwise llguidance would allow nothing but the end."""
    schema = {
        "type": "object",
        "properties": {f"v{i}": {} for i in range(600)},
        "additionalProperties": False,
    }
    constraint, byte = subject.constraint(json_schema=schema), subject.pieces.index
    with pytest.raises(RequestError, match=r"^json_schema: .*max is 2000"):
        constraint.accept(byte(ord("{")))
    with pytest.raises(RequestError, match=r"^json_schema: .*max is 2000"):
        constraint.mask()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": "3"}, "json_schema is '3', and must be a JSON object"),
        ({"json_schema": 3}, "json_schema is 3"),
        ({"json_schema": {"enum": [object()]}}, "json_schema is no JSON"),
        ({"json_schema": "[" * 100_000}, "json_schema is nested too deeply"),
        ({"grammar": " "}, "grammar is ' '"),
        ({"grammar": b"start:"}, "grammar is b'start:'"),
        ({"grammar": 'start: "a"', "json_schema": {}}, "json_schema and grammar contradict"),
        ({"json_schema": {}, "ignore_eos": True}, "json_schema and ignore_eos contradict"),
    ],
)
def test_options_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SamplingParams(**fields)


def test_without_llguidance_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=re.escape("pip install 'mixtral-runtime[grammar]'")):
        Subject().constraint(json_schema={})


def test_a_prompt_that_ends_within_a_character_cannot_be_gone_on_with(subject: Subject) -> None:
    byte = subject.pieces.index(0xE2)
    with pytest.raises(RequestError, match="within a character"):
        subject.constraint(subject.tokenizer.stream([byte]), json_schema={})


@pytest.fixture(scope="module")
def demo() -> Iterator[Engine]:
    with Engine.load(options=EngineOptions(device="cpu", dtype="float32", context=512, parallel=3)) as engine:
        yield engine


def text_of(tokens: Any) -> str:
    return "".join(token.text for token in tokens)


def test_what_an_engine_writes(demo: Engine) -> None:
    guides = set()
    for seed, prompt in enumerate(["", "def f(x):", [1], [1, 300, 301]]):
        params = SamplingParams(json_schema=PERSON, seed=seed, temperature=seed, max_new_tokens=400)
        tokens = list(demo.generate(prompt, params))
        assert tokens[-1].finish == "eos"
        valid(text_of(tokens), PERSON)
        assert [token.id for token in demo.generate(prompt, params)] == [token.id for token in tokens]
        guides.add(demo.runner.constraints.guide)
    assert len(guides) == 1  # llguidance learns the vocabulary once


def test_requests_that_are_served_together(demo: Engine) -> None:
    """Each is kept to its own schema, and writes what it writes alone."""
    schemas = [PERSON, None, {"enum": ["red", "blue"]}, {"type": "array", "items": {}, "maxItems": 0}, PERSON]
    params = [SamplingParams(json_schema=s, seed=n, max_new_tokens=300) for n, s in enumerate(schemas)]
    ids = demo.tokenizer.encode("def f(x):")
    with demo.batch() as batch:
        requests = [batch.add(Work(ids, each, demo.tokenizer.stream(ids))) for each in params]
        with pytest.raises(RequestError, match="grammar: "):
            batch.add(Work(ids, SamplingParams(grammar="start: x"), demo.tokenizer.stream(ids)))
        texts = dict.fromkeys(requests, "")
        while batch.busy:
            for request, token in batch.step():
                assert isinstance(token, Token)
                texts[request] += token.text
    for request, each, schema in zip(requests, params, schemas, strict=True):
        assert texts[request] == text_of(demo.generate(ids, each))
        if schema:
            valid(texts[request], schema)


def test_turns_of_a_conversation(demo: Engine) -> None:
    session = demo.session()
    for turn in range(3):
        session.send("Say yes or no.")
        answer = text_of(session.generate(SamplingParams(grammar='start: "yes" | "no" | " no"', seed=turn)))
        assert answer in ("yes", "no", " no")
    session.send("?")
    with pytest.raises(RequestError, match="grammar"):
        session.generate(SamplingParams(grammar="start: foo"))
    session.send("This can be sent, since the refused message is forgotten.")


def test_flags(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    schema, grammar, words = (
        tmp_path / "s.json",
        tmp_path / "g.lark",
        ["--prompt", "x", "--quiet", "--context", "512"],
    )
    schema.write_text(json.dumps(PERSON))
    grammar.write_text('start: "yes"\n')
    assert main([*words, "--json-schema", str(schema), "--max-new-tokens", "400"]) == 0
    valid(capfd.readouterr().out, PERSON)
    assert main([*words, "--grammar", str(grammar)]) == 0
    assert capfd.readouterr().out == "yes"
    grammar.write_text("start: foo")
    assert main([*words, "--grammar", str(grammar)]) == 1
    assert capfd.readouterr().err == 'error: grammar: at 1(8): unknown name: "foo"\n'
    assert main([*words, "--grammar", str(tmp_path / "none")]) == 1
    assert capfd.readouterr().err == f"error: {tmp_path / 'none'}: No such file or directory\n"
    schema.write_text("{")
    with pytest.raises(SystemExit):
        main([*words, "--json-schema", str(schema)])
    assert "json_schema is no JSON" in capfd.readouterr().err
