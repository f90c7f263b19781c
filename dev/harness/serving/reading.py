"""What came back of a request that was served: its texts, as far as they came."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dev.harness.outcome import Wrong
from dev.harness.serving.wire import Reply, value

DONE = b"data: [DONE]"


@dataclass
class Got:
    """Texts by their numbers, with log-probabilities of their tokens and why they ended."""

    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    finishes: dict[int, str] = field(default_factory=dict)
    usage: Mapping[str, Any] | None = None
    done: bool = False  # all has come

    def add(self, choice: Mapping[str, Any]) -> None:
        """Take a text or a part of one, in any of the API's four forms."""
        index = choice["index"]
        message = choice.get("message", choice.get("delta", {"content": choice.get("text")}))
        self.texts[index] += message.get("content") or ""
        if found := choice.get("logprobs"):
            tokens = found.get("content")
            more = found["token_logprobs"] if tokens is None else [token["logprob"] for token in tokens]
            self.logprobs[index] += more
        if choice["finish_reason"]:
            self.finishes[index] = choice["finish_reason"]


def read_texts(reply: Reply) -> Got:
    """The texts of a reply with status 200, whose last event may be cut. Raises `Wrong` for an error that
    comes in the middle."""
    got = Got()
    if not reply.headers["content-type"].startswith("text/event-stream"):
        if reply.whole:
            take(got, value(reply))
            got.done = True
        return got
    for event in reply.body.split(b"\n\n")[:-1]:
        if event == DONE:
            got.done = True
        elif not event.startswith(b":"):
            take(got, json.loads(event.removeprefix(b"data: ")))
    if reply.whole and not got.done:
        raise Wrong("a stream ended without [DONE]")
    return got


def take(got: Got, said: Mapping[str, Any]) -> None:
    if "error" in said:
        raise Wrong(f"an answer was broken off: {said['error']['message']}")
    for choice in said["choices"]:
        got.add(choice)
    got.usage = said.get("usage") or got.usage


def check_watched(reply: Reply) -> None:
    """Raises `Wrong` unless all events, as far as they came, tell where experts are."""
    if reply.status not in (0, 200):
        raise Wrong(f"status {reply.status}, {reply.body[:300]!r}: to one who watches the experts")
    for event in reply.body.split(b"\n\n")[:-1]:
        if not event.startswith(b":") and "places" not in json.loads(event.removeprefix(b"data: ")):
            raise Wrong(f"an event of the experts is {event[:300]!r}")


def first_text(reply: Reply) -> float:
    """Seconds until a stream's first token came."""
    return next(seconds for seconds, size in reply.times if b"logprobs" in reply.body[:size])
