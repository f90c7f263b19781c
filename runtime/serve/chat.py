"""`/v1/chat/completions`: an answer to a conversation."""

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
from runtime.serve.asked import check_stream_options
from runtime.serve.calling import Calling, Reader, calls_form
from runtime.serve.conversations import converse, prepare
from runtime.serve.errors import Refusal
from runtime.serve.logprobs import chat_form
from runtime.serve.replying import reply
from runtime.serve.schemas import ChatRequest
from runtime.serve.served import Served, finish_reason
from runtime.serve.writing import Text, Writing


async def chat(request: Request) -> ASGIApp:
    """Answer, at once or as a stream."""
    served: Served = request.app.state.served
    asked = ChatRequest.model_validate_json(await request.body())
    served.check_model(asked.model)
    check_stream_options(asked)
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal(400, "top_logprobs without logprobs; set logprobs to true", param="top_logprobs")
    calling = await served.aside(partial(converse, served.engine, asked))
    writing = await served.write(partial(prepare, served.engine, asked, calling))
    return await reply(request, Form(served, asked, calling), writing, bool(asked.stream))


@dataclass(frozen=True)
class Form:
    """An answer's JSON."""

    served: Served
    asked: ChatRequest
    calling: Calling

    def whole(self, texts: list[Text], writing: Writing) -> dict[str, Any]:
        choices = [self.choice(index, text) for index, text in enumerate(texts)]
        return self.head("chat.completion") | {"choices": choices, "usage": writing.usage()}

    def choice(self, index: int, text: Text) -> dict[str, Any]:
        words, calls = self.calling.read(text.tokens)
        message: dict[str, Any] = {"role": "assistant", "content": words or None, "refusal": None}
        if calls:
            message["tool_calls"] = calls_form(calls)
        else:
            message["content"] = words
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(text.tokens),
            "finish_reason": "tool_calls" if calls else finish_reason(text.finish),
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

        readers = [self.calling.reader() for _ in writing.texts]
        for index in range(len(readers)):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        while not writing.over:
            found = await writing.next(self.served.limits.beat)
            if found is None:
                yield None
                continue
            index, token = found
            words = readers[index].take(token)
            if words or self.asked.logprobs:
                yield chunk(index, {"content": words}, tokens=[token])
            if token.finish:
                for delta, finish in self.last(readers[index], token.finish):
                    yield chunk(index, delta, finish)
        if with_usage:
            yield head | {"choices": [], "usage": writing.usage()}

    def last(self, reader: Reader, finish: Finish) -> list[tuple[dict[str, Any], str | None]]:
        """The last chunks of a choice, each with its reason to finish: calls come whole, in one chunk."""
        calls, rest = reader.end()
        if calls:
            made = [{"index": index, **call} for index, call in enumerate(calls_form(calls))]
            return [({"tool_calls": made}, None), ({}, "tool_calls")]
        return [({"content": rest}, None)] * bool(rest) + [({}, finish_reason(finish))]

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_form(self.served.engine.tokenizer, tokens) if self.asked.logprobs else None

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.served.names[0],
        }
