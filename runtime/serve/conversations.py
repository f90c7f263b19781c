"""A chat's request in the model's terms: messages, tools, and the form that its answer must have."""

from __future__ import annotations

from functools import partial
from typing import Any

from runtime.batching.batch import Work
from runtime.engine import Engine
from runtime.serve.asked import Prompt, make_works
from runtime.serve.calling import Calling, plan_calls
from runtime.serve.errors import Refusal
from runtime.serve.schemas import ChatRequest, ToolChoice


def prepare(engine: Engine, asked: ChatRequest, calling: Calling) -> list[Work]:
    """The texts that a request asks for. Raises `RequestError` and `Refusal` if they cannot be written."""
    more: dict[str, Any] = {"top_logprobs": asked.top_logprobs or 0, **form(asked, calling), **calling.params}
    decoder = partial(engine.tokenizer.answer_stream, calling.prompt)
    return make_works(engine, [Prompt(calling.prompt, decoder)], asked, limit(asked), **more)


def converse(engine: Engine, asked: ChatRequest) -> Calling:
    """The conversation's ids, and how its answer may call tools.

    Raises `TokenizerError` and `Refusal`.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    chosen, required = asked.tool_choice, list[str]()
    if isinstance(chosen, ToolChoice):
        required = [chosen.function.name]
    elif chosen == "required":
        required = names
    if chosen not in (None, "none", "auto") and not set(required) & set(names):
        raise Refusal(400, "tool_choice names no tool of tools; add it there", param="tool_choice")
    if len(set(names)) < len(names):
        raise Refusal(400, "two tools have the same name; give each its own", param="tools")
    most = 1 if asked.parallel_tool_calls is False else None
    messages = [message(each) for each in asked.messages]
    return plan_calls(engine.tokenizer, messages, [] if chosen == "none" else tools, required, most)


def form(asked: ChatRequest, calling: Calling) -> dict[str, Any]:
    """What `response_format` makes of the sampling options."""
    given = asked.response_format
    if given is None or given.type == "text":
        return {}
    if asked.tools and asked.tool_choice != "none":
        raise Refusal(400, "response_format and tools exclude each other; give one of them", param="tools")
    if given.type == "json_object":
        return {"json_schema": {"type": "object"}}
    if given.json_schema is None:
        raise Refusal(400, "response_format has no json_schema; give one", param="response_format")
    return {"json_schema": given.json_schema.shape}


def message(given: Any) -> dict[str, object]:
    """A message as tokenizers take it."""
    role = "system" if given.role == "developer" else given.role
    content = given.content
    told: dict[str, object] = {"role": role}
    if isinstance(content, list):
        told["content"] = [part.model_dump() for part in content]
    else:
        told["content"] = content or ""
    if role == "assistant" and given.tool_calls:
        told["tool_calls"] = [call.model_dump(exclude={"index"}) for call in given.tool_calls]
    if role == "tool":
        told["tool_call_id"] = given.tool_call_id
    return told


def limit(asked: ChatRequest) -> int | None:
    """The most tokens of an answer, which has an old and a new name."""
    old, new = asked.max_tokens, asked.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise Refusal(
            400, f"max_tokens is {old} and max_completion_tokens {new}; give one of them", param="max_tokens"
        )
    return old if new is None else new
