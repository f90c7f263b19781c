"""The texts that a request gets alone, from an engine in one process, and whether it got them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dev.harness.outcome import Wrong
from dev.harness.serving.asking import Asked, Want
from dev.harness.serving.reading import Got
from runtime import Engine
from runtime.answer import Token
from runtime.serve.served import finish_reason


@dataclass(frozen=True)
class Alone:
    """A text as it is when nobody else is served."""

    tokens: Sequence[Token]
    prompt: int  # tokens

    def __str__(self) -> str:
        return "".join(token.text for token in self.tokens)


def write_alone(engine: Engine, want: Want) -> Alone:
    with engine.session() as session:
        tokens: Iterator[Token]
        if isinstance(want.prompt, str):
            tokens = session.complete(want.prompt, want.params)
        else:
            session.messages = [dict(message) for message in want.prompt]
            tokens = session.generate(want.params)
        written = list(tokens)
        return Alone(written, len(session.ids) - len(written) + 1)  # the last token is not in `ids`


def check_texts(engine: Engine, asked: Asked, got: Got) -> None:
    """Raises `Wrong` unless everything that came is what comes alone, to the bit. What came to its end
    must be all."""
    alones = {index: write_alone(engine, asked.wants[index]) for index in got.texts}
    for index, text in got.texts.items():
        alone, finish = alones[index], got.finishes.get(index)
        expected = str(alone)
        if not expected.startswith(text):
            raise Wrong(f"text {index} is {text!r}, and alone {expected!r}: {asked}")
        if finish and (text, finish) != (expected, finish_reason(alone.tokens[-1].finish)):
            raise Wrong(f"text {index} ends with {finish} as {text!r}, and alone as {expected!r}: {asked}")
        found = got.logprobs[index]
        if found != [max(token.logprob, -9999.0) for token in alone.tokens[: len(found)]]:
            raise Wrong(f"text {index} has other log-probabilities than alone: {asked}")
    if got.done:
        check_complete(asked, got, list(alones.values()))


def check_complete(asked: Asked, got: Got, alones: Sequence[Alone]) -> None:
    if sorted(got.finishes) != list(range(len(asked.wants))):
        raise Wrong(f"of {len(asked.wants)} texts {sorted(got.finishes)} have an end: {asked}")
    if asked.body.get("logprobs", False) is not False and len(got.logprobs) != len(asked.wants):
        raise Wrong(f"log-probabilities are missing: {asked}")
    if (got.usage is not None) != (not asked.body.get("stream") or "stream_options" in asked.body):
        raise Wrong(f"usage is {got.usage}: {asked}")
    if got.usage is not None:
        found = got.usage["prompt_tokens"], got.usage["completion_tokens"]
        prompts = sum(alone.prompt for alone in alones) // asked.body.get("n", 1)  # each counts once
        if found != (prompts, sum(len(alone.tokens) for alone in alones)):
            raise Wrong(f"usage is {got.usage}, and the prompts have {prompts} tokens: {asked}")
