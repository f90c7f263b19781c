"""What is served, and what all answers have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from model.errors import quoted
from runtime.answer import Finish
from runtime.engine import Engine
from runtime.serve.errors import Refusal
from runtime.serve.guard import Limits
from runtime.serve.writing import Service, Work, Writing

Result = TypeVar("Result")


@dataclass(frozen=True)
class Served:
    """A model behind a server. The first of `names` is its own, and answers say it."""

    engine: Engine
    service: Service
    names: Sequence[str]
    limits: Limits = Limits()  # noqa: RUF009
    created: int = field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "prepare"))

    def check_model(self, name: str | None) -> None:
        """Raises `Refusal` if a request is for another model."""
        if name is not None and name not in self.names:
            message = f"there is no model {quoted(name)} here; the model is {quoted(self.names[0])}"
            raise Refusal(404, message, param="model", code="model_not_found")

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Do work in a thread, since other clients would wait for it in the event loop."""

        def working() -> Result:
            with self.engine.runner.working():
                return work()

        return await asyncio.get_running_loop().run_in_executor(self.pool, working)

    def write(self, works: Sequence[Work]) -> Writing:
        """Have texts written. Raises `RequestError` if they cannot be taken on."""
        return Writing(self.service, works)


def finish_reason(finish: Finish | None) -> str | None:
    """Why a text ends, in OpenAI's words.

    >>> [finish_reason(finish) for finish in ("eos", "stop", "length", "context", None)]
    ['stop', 'stop', 'length', 'length', None]
    """
    return None if finish is None else "stop" if finish in ("eos", "stop") else "length"


def usage(prompt_tokens: int, writing: Writing) -> dict[str, Any]:
    """What a request took. A prompt counts once, however many texts continue it."""
    made = writing.new_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": min(writing.reused, prompt_tokens)},
    }
