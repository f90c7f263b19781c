"""What a conversation is, in any format.

user -> assistant -> user                    and so on, after an optional first system message
user -> assistant with calls -> tool, tool   one result for each call, then assistant or user
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from tokenizer.errors import TokenizerError, quoted
from tokenizer.json_values import changed, read_json
from tokenizer.tool_messages import check_calls, is_list
from tokenizer.tools import Call

ROLES = ("system", "user", "assistant", "tool")
BETWEEN_PARTS = "\n\n"  # as Mistral's reference encoder joins the parts of a content


class Message(TypedDict):
    """One message of a conversation without tools."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Turn:
    """One message that has been checked.

    calls      an assistant's calls of tools
    answers    the id of the call of which a tool's message is the result
    tool_name  the name of that tool
    """

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    answers: str = ""
    tool_name: str = ""


def check_conversation(messages: Sequence[Mapping[str, object]]) -> list[Turn]:
    """Return the messages of a conversation that waits for an answer.

    Raises `TokenizerError` if roles do not follow each other as the module says, if the last message is an
    assistant's, if calls and results do not belong together, or if a message is not plain text.
    """
    if not is_list(messages):
        raise TokenizerError(f"messages is a {type(messages).__name__}; give a list of messages")
    turns: list[Turn] = []
    waiting: list[Call] = []  # calls whose results are due
    for i, message in enumerate(messages):
        where = f"message {i + 1} of {len(messages)}"
        turn = _check(message, where)
        _check_order(turns[-1].role if turns else None, turn.role, waiting, where)
        if turn.role == "tool":
            call = next((call for call in waiting if call.id == turn.answers), None)
            if call is None:
                ids = ", ".join(quoted(call.id) for call in waiting[:4])
                raise TokenizerError(f"{where} has the tool_call_id {quoted(turn.answers)}; use one of {ids}")
            waiting.remove(call)
            turn = Turn("tool", turn.content, (), turn.answers, turn.tool_name or call.name)
        waiting += turn.calls
        turns.append(turn)
    if not any(turn.role != "system" for turn in turns):
        raise TokenizerError(f"the conversation of {len(turns)} messages has no user message; add one")
    if waiting:
        ids = ", ".join(quoted(call.id) for call in waiting[:4])
        raise TokenizerError(
            f"message {len(turns)} of {len(turns)} is the last, and the result of call {ids} is missing; "
            "add a tool message for each call"
        )
    if turns[-1].role == "assistant":
        raise TokenizerError(
            f"message {len(turns)} of {len(turns)} is from 'assistant'; "
            "end with the user message to be answered"
        )
    return turns


def split_system(turns: Sequence[Turn]) -> tuple[str, list[Turn]]:
    """Return a conversation's system text ("" if there is none) and its other turns.

    >>> split_system([Turn("system", "Be brief."), Turn("user", "Hi")])
    ('Be brief.', [Turn(role='user', content='Hi', calls=(), answers='', tool_name='')])
    """
    if turns and turns[0].role == "system":
        return turns[0].content, list(turns[1:])
    return "", list(turns)


def for_template(turns: Sequence[Turn], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the messages as chat templates see them, with `change` made to every text that is not ours.

    Arguments are JSON values there, not texts, as in Transformers.
    """
    return [_message(turn, change) for turn in turns]


def _message(turn: Turn, change: Callable[[str], str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": change(turn.content)}
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": change(str(call.id)),
                "type": "function",
                "function": {
                    "name": change(call.name),
                    "arguments": changed(read_json(call.arguments, "arguments"), change),
                },
            }
            for call in turn.calls
        ]
    if turn.role == "tool":
        message |= {"tool_call_id": change(turn.answers), "name": change(turn.tool_name)}
    return message


def _check_order(before: str | None, role: str, waiting: Sequence[Call], where: str) -> None:
    """Check that a message of this role may follow one of the role `before`, None for the first one."""
    if waiting:
        due = ["tool"]
    elif before is None:
        due = ["user", "system"]
    elif before == "tool":
        due = ["assistant", "user"]
    else:
        due = ["assistant" if before == "user" else "user"]
    if role in due:
        return
    if waiting:
        rule = f"the result of call {quoted(waiting[0].id)} is missing"
    elif role == "tool":
        rule = "a tool message answers a call of the assistant's, and each call once"
    else:
        rule = "after an optional first system message, user and assistant take turns"
    raise TokenizerError(f"{where} is from {role!r} where {due[0]!r} is due; {rule}")


def _check(message: Mapping[str, object], where: str) -> Turn:
    """Return the message. Raises `TokenizerError`, with its place, if it is none."""
    if not isinstance(message, Mapping):
        raise TokenizerError(f"{where} is a {type(message).__name__}; give a dict with 'role' and 'content'")
    role = message.get("role")
    calls: tuple[Call, ...] = ()
    if role == "assistant" and message.get("tool_calls") is not None:
        calls = check_calls(message["tool_calls"], where)
    due = {"role", "content"} | ({"tool_call_id"} if role == "tool" else set())
    extra = {"tool_calls"} if role == "assistant" else {"name"} if role == "tool" else set()
    if message.keys() - due - extra or due - message.keys() - ({"content"} if calls else set()):
        keys = ", ".join(quoted(key) for key in sorted(map(str, message))[:4]) or "none"
        names = "'role', 'content' and 'tool_call_id'" if role == "tool" else "'role' and 'content'"
        raise TokenizerError(f"{where} has the keys {keys}; give {names} and nothing else")
    if role not in ROLES:
        raise TokenizerError(f"{where} has the role {quoted(role)}; use one of {', '.join(ROLES)}")
    content = "" if calls and message.get("content") is None else text_of(message["content"], where)
    answers, tool_name = message.get("tool_call_id", ""), message.get("name") or ""
    for key, value in (("tool_call_id", answers), ("name", tool_name)):
        if not isinstance(value, str):
            raise TokenizerError(f"{where} has a {key} of type {type(value).__name__}; give it as one str")
    return Turn(str(role), content, calls, str(answers), str(tool_name))


def text_of(content: object, where: str) -> str:
    """Return the text of a message's content, which may come as parts: [{"type": "text", "text": ...}, ...].

    Raises `TokenizerError` if a part is anything but text.
    """
    if isinstance(content, str):
        return content
    if not is_list(content):
        raise TokenizerError(f"{where} has content of type {type(content).__name__}; give it as one str")
    texts = []
    for i, part in enumerate(content):
        what = f"part {i + 1} of {where}"
        if not isinstance(part, Mapping):
            raise TokenizerError(f"{what} is a {type(part).__name__}; give a dict with 'type' and 'text'")
        if part.get("type") != "text":
            raise TokenizerError(
                f"{what} has the type {quoted(part.get('type'))}; this model reads 'text' only"
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            keys = ", ".join(quoted(key) for key in sorted(map(str, part))[:4])
            raise TokenizerError(f"{what} has the keys {keys}; give 'type', and 'text' as one str")
        texts.append(part["text"])
    return BETWEEN_PARTS.join(filter(None, texts))
