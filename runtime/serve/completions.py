"""`/v1/completions`: the continuation of a text, or of token ids."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from runtime.answer import Finish, Token
from runtime.batching.batch import Work
from runtime.engine import Engine
from runtime.serve.asked import Prompt, check_stream_options, make_works
from runtime.serve.logprobs import completion_form
from runtime.serve.replying import reply
from runtime.serve.schemas import CompletionRequest
from runtime.serve.served import Served, finish_reason
from runtime.serve.writing import Text, Writing

TOKENS = 16  # of a text whose request gives no number, as with OpenAI


async def complete(request: Request) -> ASGIApp:
    """Continue, at once or as a stream."""
    served: Served = request.app.state.served
    asked = CompletionRequest.model_validate_json(await request.body())
    served.check_model(asked.model)
    check_stream_options(asked)
    writing = await served.write(partial(prepare, served, asked))
    return await reply(request, Form(served, asked), writing, bool(asked.stream))


def prepare(served: Served, asked: CompletionRequest) -> list[Work]:
    """Everything that takes longer than a moment, and may be refused."""
    limit = TOKENS if asked.max_tokens is None else asked.max_tokens
    prompts = read_prompts(served.engine, asked.prompt)
    return make_works(served.engine, prompts, asked, limit, top_logprobs=asked.logprobs or 0)


def read_prompts(engine: Engine, given: str | list[str] | list[int] | list[list[int]]) -> list[Prompt]:
    """One prompt or several. A text gets the begin-of-sequence id in front, and ids are taken unchanged."""
    if isinstance(given, str) or not given or isinstance(given[0], int):
        several: list[Any] = [given]
    else:
        several = list(given)
    prompts = []
    for one in several:
        ids = engine.tokenizer.encode(one) if isinstance(one, str) else one
        prompts.append(Prompt(ids, partial(engine.tokenizer.stream, ids)))
    return prompts


@dataclass(frozen=True)
class Form:
    """An answer's JSON."""

    served: Served
    asked: CompletionRequest

    def whole(self, texts: list[Text], writing: Writing) -> dict[str, Any]:
        choices = [
            self.choice(index, str(text), text.finish, text.tokens, 0) for index, text in enumerate(texts)
        ]
        return self.head() | {"choices": choices, "usage": writing.usage()}

    async def stream(self, writing: Writing) -> AsyncIterator[Mapping[str, Any] | None]:
        head = self.head()
        with_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        if with_usage:
            head |= {"usage": None}
        shown = [0] * len(writing.texts)  # characters
        while not writing.over:
            found = await writing.next(self.served.limits.beat)
            if found is None:
                yield None
                continue
            index, token = found
            if token.text or token.finish or self.asked.logprobs is not None:
                choice = self.choice(index, token.text, token.finish, [token], shown[index])
                shown[index] += len(token.text)
                yield head | {"choices": [choice]}
        if with_usage:
            yield head | {"choices": [], "usage": writing.usage()}

    def choice(
        self, index: int, text: str, finish: Finish | None, tokens: Sequence[Token], offset: int
    ) -> dict[str, Any]:
        """A text or a part of one, after `offset` characters."""
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = completion_form(self.served.engine.tokenizer, tokens, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason(finish)}

    def head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.served.names[0],
        }
