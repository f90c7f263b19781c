"""Texts on their way from the service's thread to a response, which lives in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from runtime.answer import Finish, Token
from runtime.errors import RequestError
from runtime.options import SamplingParams
from runtime.serve.errors import refusal
from tokenizer import StreamDecoder


@dataclass(frozen=True)
class Work:
    """A text to be written. `reuse` lets the prompt begin with what a KV cache holds already."""

    ids: list[int]
    params: SamplingParams
    decoder: StreamDecoder
    reuse: bool = True


class Handle(Protocol):
    reused: int

    def cancel(self) -> None: ...


class Service(Protocol):
    def submit(self, work: Work, deliver: Callable[[Token | RequestError], None]) -> Handle: ...


@dataclass
class Text:
    """One text, as far as it has come."""

    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, token: Token) -> None:
        self.tokens.append(token)
        self.finish = token.finish

    def __str__(self) -> str:
        return "".join(token.text for token in self.tokens)


class Writing:
    """The texts of one request. All are taken on, or none.

    Make it in the event loop, take tokens with `next` until `over`, and call `cancel` at the end in any case.
    """

    def __init__(self, service: Service, works: Sequence[Work]) -> None:
        """Raises what `service.submit` does."""
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[tuple[int, Token | RequestError]] = asyncio.Queue()
        self.texts = [Text() for _ in works]
        self.handles: list[Handle] = []
        try:
            for index, work in enumerate(works):
                self.handles.append(service.submit(work, partial(self.deliver, index)))
        except BaseException:
            self.cancel()
            raise

    def deliver(self, index: int, item: Token | RequestError) -> None:
        """Called in the service's thread."""
        with suppress(RuntimeError):  # the event loop has ended
            self.loop.call_soon_threadsafe(self.items.put_nowait, (index, item))

    async def next(self, patience: float | None = None) -> tuple[int, Token] | None:
        """The next token, and the number of its text. None if none comes within `patience` seconds.

        Raises `Refusal` if a text fails. The others are of no use to the client then.
        """
        try:
            index, item = await asyncio.wait_for(self.items.get(), patience)
        except asyncio.TimeoutError:
            return None
        if isinstance(item, RequestError):
            raise refusal(item, late=True)
        self.texts[index].add(item)
        return index, item

    async def all(self) -> list[Text]:
        """The texts, when they are complete."""
        while not self.over:
            await self.next()
        return self.texts

    @property
    def over(self) -> bool:
        return all(text.finish for text in self.texts)

    @property
    def new_tokens(self) -> int:
        return sum(len(text.tokens) for text in self.texts)

    @property
    def reused(self) -> int:
        """Prompt tokens of all texts that were found in a KV cache."""
        return sum(handle.reused for handle in self.handles)

    def cancel(self) -> None:
        """Give up what is not complete. Its place is free before the next step."""
        for handle in self.handles:
            handle.cancel()
