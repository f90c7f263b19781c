"""Texts on their way from the service's thread to a response, which lives in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from runtime.answer import Finish, Token
from runtime.batching.batch import Work
from runtime.batching.service import Handle, Service
from runtime.errors import RequestError
from runtime.serve.errors import refusal
from runtime.serve.metrics import Metrics


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

    Take tokens with `next` until `over`, in the event loop, and call `cancel` at the end in any case.
    """

    def __init__(
        self,
        service: Service,
        works: Sequence[Work],
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics,
        began: float,
    ) -> None:
        """May be called in any thread. The request came at the time `began`, of `time.perf_counter`.

        Raises what `service.submit` does.
        """
        self.works, self.loop, self.metrics, self.began = works, loop, metrics, began
        self.items: asyncio.Queue[tuple[int, Token | RequestError]] = asyncio.Queue()
        self.texts = [Text() for _ in works]
        self.times = [0.0 for _ in works]  # of each text's last token, in the service's thread
        self.handles: list[Handle] = []
        try:
            for index, work in enumerate(works):
                self.handles.append(service.submit(work, partial(self.deliver, index)))
        except BaseException:
            self.cancel()
            raise

    def deliver(self, index: int, item: Token | RequestError) -> None:
        """Called in the service's thread."""
        if isinstance(item, Token):
            now, before = time.perf_counter(), self.times[index]
            self.metrics.count_token(now - (before or self.began), first=not before)
            self.times[index] = now
            if item.finish:
                self.metrics.count_text(now - self.began)
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

    def cancel(self) -> None:
        """Give up what is not complete. Its place is free before the next step."""
        for handle in self.handles:
            handle.cancel()
        if self.handles and not self.over:
            self.metrics.cut_off.inc(sum(text.finish is None for text in self.texts))

    def usage(self) -> dict[str, object]:
        """What the request took, in OpenAI's form. A prompt counts once, however many texts continue it."""
        prompts, found = dict[int, int](), dict[int, int]()  # tokens, and those that a KV cache held
        for work, handle in zip(self.works, self.handles, strict=True):
            prompts[id(work.ids)] = len(work.ids)
            found[id(work.ids)] = min(handle.reused, found.get(id(work.ids), len(work.ids)))
        prompt, made = sum(prompts.values()), sum(len(text.tokens) for text in self.texts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(found.values())},
        }
