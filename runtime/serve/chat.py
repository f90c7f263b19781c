"""`/v1/chat/completions`: an answer to a conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from runtime.answer import Token
from runtime.batching.batch import Work
from runtime.serve.asked import Prompt, check_stream_options, make_works
from runtime.serve.errors import Refusal
from runtime.serve.logprobs import chat_form
from runtime.serve.schemas import ChatRequest, TextPart
from runtime.serve.served import Served, finish_reason
from runtime.serve.stream import EventStream, Gone, unless_gone
from runtime.serve.writing import Text, Writing


async def chat(request: Request) -> ASGIApp:
    """Answer, at once or as a stream."""
    served: Served = request.app.state.served
    asked = ChatRequest.model_validate_json(await request.body())
    served.check_model(asked.model)
    check_stream_options(asked)
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal(400, "top_logprobs without logprobs; set logprobs to true", param="top_logprobs")
    writing = await served.write(partial(prepare, served, asked))
    form = Form(served, asked)
    if asked.stream:
        return EventStream(form.stream(writing), writing.cancel)
    try:
        return JSONResponse(form.whole(await unless_gone(request.receive, writing.all()), writing))
    except Gone:
        return Response(status_code=499)
    finally:
        writing.cancel()


def prepare(served: Served, asked: ChatRequest) -> list[Work]:
    """Everything that takes longer than a moment, and may be refused."""
    tokenizer = served.engine.tokenizer
    ids = tokenizer.encode_chat([message(m) for m in asked.messages])
    prompt = Prompt(ids, partial(tokenizer.answer_stream, ids))
    return make_works(served.engine, [prompt], asked, limit(asked), top_logprobs=asked.top_logprobs or 0)


def message(given: Any) -> dict[str, object]:
    """A message as tokenizers take it."""
    role = "system" if given.role == "developer" else given.role
    return {"role": role, "content": joined(given.content)}


def joined(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def limit(asked: ChatRequest) -> int | None:
    """The most tokens of an answer, which has an old and a new name."""
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise Refusal(
            400, f"max_tokens is {old} and max_completion_tokens {new}; give one of them", param="max_tokens"
        )
    return old if new is None else new


@dataclass(frozen=True)
class Form:
    """An answer's JSON."""

    served: Served
    asked: ChatRequest

    def whole(self, texts: list[Text], writing: Writing) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": str(text), "refusal": None},
                "logprobs": self.logprobs(text.tokens),
                "finish_reason": finish_reason(text.finish),
            }
            for index, text in enumerate(texts)
        ]
        return self.head("chat.completion") | {
            "choices": choices,
            "usage": writing.usage(),
        }

    async def stream(self, writing: Writing) -> AsyncIterator[Mapping[str, Any] | None]:
        """Chunks: one that opens each choice, the text, and one that ends each choice."""
        head = self.head("chat.completion.chunk")
        with_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        if with_usage:
            head |= {"usage": None}

        def chunk(
            index: int, delta: dict[str, Any], finish: str | None = None, tokens: Sequence[Token] = ()
        ) -> dict[str, Any]:
            logprobs = self.logprobs(tokens) if tokens else None
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return head | {"choices": [choice]}

        for index in range(len(writing.texts)):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        while not writing.over:
            found = await writing.next(self.served.limits.beat)
            if found is None:
                yield None
                continue
            index, token = found
            if token.text or self.asked.logprobs:
                yield chunk(index, {"content": token.text}, tokens=[token])
            if token.finish:
                yield chunk(index, {}, finish_reason(token.finish))
        if with_usage:
            yield head | {"choices": [], "usage": writing.usage()}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_form(self.served.engine.tokenizer, tokens) if self.asked.logprobs else None

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.served.names[0],
        }
