"""Tools in chats: how a model learns of them, and how its calls are told from its words.

Where a model's chat format has tools, the tokenizer writes them, and a control token begins the calls.
Elsewhere a system message explains the tools, and a grammar leaves a choice: words, or a list of calls in
JSON, which begins with a bracket. Where calls are required, a schema keeps the text to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.answer import Token
from tokenizer import Tokenizer, TokenizerError, new_call_id, parse_calls
from tokenizer.conversation import Turn, check_conversation
from tokenizer.tools import Call

LIST = "[TOOL_CALLS]"  # what begins a list of calls. Other tokens begin one call
BEGINNINGS = ("[", "{")  # of calls that no control token begins
CLOSE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
EXPLAINED = (
    "You can call these tools:\n{tools}\n"
    'To call some, answer with nothing but a JSON list: [{{"name": "...", "arguments": {{...}}}}, ...]'
)


@dataclass(frozen=True)
class Calling:
    """How the answers to a request may call tools.

    prompt  the conversation's ids, up to where the answer begins
    params  fields of `SamplingParams` that calls need
    begins  the control token that begins calls, if the format has one
    forced  the whole text is calls
    listens there are tools that it may call
    most    calls of one answer that are passed on; None is all
    """

    prompt: list[int]
    params: Mapping[str, str]
    begins: int | None
    forced: bool
    listens: bool
    most: int | None

    def reader(self) -> Reader:
        return Reader(self, calls=self.forced)

    def read(self, tokens: Sequence[Token]) -> tuple[str, list[Call]]:
        """The words and the calls of a whole text."""
        reader = self.reader()
        words = "".join([reader.take(token) for token in tokens])
        calls, rest = reader.end()
        return words + rest, calls


@dataclass
class Reader:
    """Tells a text's words from its calls, token by token."""

    calling: Calling
    calls: bool  # what comes now are calls
    held: str = ""  # what may be, or is, the text of calls
    began: bool = False

    def take(self, token: Token) -> str:
        """The words that are certain with this token."""
        calling, text = self.calling, token.text
        if not self.calls and calling.listens:
            if token.id == calling.begins:
                self.calls = True
                return text  # which was held back before it
            if calling.begins is None and text and not self.began:
                self.began = True
                self.calls = text.startswith(BEGINNINGS)
        if self.calls:
            self.held += text
            return ""
        return text

    def end(self) -> tuple[list[Call], str]:
        """The calls, or the rest of the words if what looked like calls is none."""
        if not self.calls:
            return [], ""
        try:
            return parse_calls(self.held)[: self.calling.most], ""
        except TokenizerError:  # cut off, or only words in brackets
            return [], self.held


def plan_calls(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, Any]],
    required: Sequence[str],
    most: int | None,
) -> Calling:
    """How an answer may call `tools`. One of those in `required` has to be called, if there are any.

    Raises `TokenizerError` if the conversation is none.
    """
    forced = [tool for tool in tools if tool["function"]["name"] in required]
    if tokenizer.takes_tools:
        ids, begins = tokenizer.encode_chat(messages, tools or None), tokenizer.tool_calls_id
        several = begins is not None and begins == tokenizer.vocabulary.control.get(LIST)
        if not forced:
            return Calling(ids, {}, begins, False, bool(tools), most)
        ids += [begins] if begins is not None else []
        schema = list_schema(forced, most) if several else one_schema(forced)
        return Calling(ids, {"json_schema": json.dumps(schema)}, begins, True, True, most)
    ids = tokenizer.encode_chat(in_words(check_conversation(messages), tools))
    if not tools:
        return Calling(ids, {}, None, False, False, None)
    schema = list_schema(forced or tools, most)
    params = {"json_schema": json.dumps(schema)} if forced else {"grammar": choice(schema)}
    return Calling(ids, params, None, bool(forced), True, most)


def choice(schema: Mapping[str, Any]) -> str:
    """A grammar of words, which do not begin with a bracket, or JSON that fits the schema, which does."""
    return f"start: words | calls\nwords: /([^\\[](.|\\n)*)?/\ncalls: %json {json.dumps(schema)}\n"


def list_schema(tools: Sequence[Mapping[str, Any]], most: int | None) -> dict[str, Any]:
    """The schema of a list of calls."""
    one = one_schema(tools)
    shared = {name: one.pop(name) for name in ("$defs", "x-guidance")}
    bounds = {"minItems": 1} | ({} if most is None else {"maxItems": most})
    return {"type": "array", "items": one} | bounds | shared


def one_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of a call of one of the tools. Their own schemas become definitions of it."""
    calls, shared = [], {}
    for index, tool in enumerate(tools):
        function = tool["function"]
        own = function.get("parameters") or {"type": "object"}
        shared[f"tool{index}"] = moved(own, f"#/$defs/tool{index}")
        fields = {"name": {"const": function["name"]}, "arguments": {"$ref": f"#/$defs/tool{index}"}}
        calls.append(
            {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
        )
    return {"anyOf": calls, "$defs": shared, "x-guidance": CLOSE}


def moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold where it is now.

    >>> moved({"items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"$ref": "#"}}}, "#/$defs/t")
    {'items': {'$ref': '#/$defs/t/$defs/x'}, '$defs': {'x': {'$ref': '#/$defs/t'}}}
    """
    if isinstance(schema, list):
        return [moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:] if key == "$ref" and str(value).startswith("#") else moved(value, place)
        for key, value in schema.items()
    }


def in_words(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A conversation for a format without tools: calls as the list that a model writes, results as the user's
    words, and the tools in the system message."""
    told: list[dict[str, str]] = []
    for turn in turns:
        role, content = turn.role, turn.content
        if turn.calls:
            written = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.calls]
            content = "\n".join(filter(None, [content, json.dumps(written, ensure_ascii=False)]))
        if turn.role == "tool":
            role, content = "user", f"Result of {turn.tool_name}: {content}"
        if told and told[-1]["role"] == role:  # several results, or the user's words after them
            told[-1]["content"] += f"\n\n{content}"
        else:
            told.append({"role": role, "content": content})
    if not tools:
        return told
    functions = [tool["function"] for tool in tools]
    explained = EXPLAINED.format(tools=json.dumps(functions, ensure_ascii=False))
    if told[0]["role"] == "system":
        return [{"role": "system", "content": f"{told[0]['content']}\n\n{explained}"}, *told[1:]]
    return [{"role": "system", "content": explained}, *told]


def calls_form(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Calls in OpenAI's form. Each has an id, by which its result refers to it."""
    return [
        {
            "id": call.id or new_call_id(),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]
