"""What is served, and what all answers have in common."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from model.errors import quoted
from runtime.answer import Finish
from runtime.batching.batch import Work
from runtime.batching.scheduler import QueueFull
from runtime.batching.service import STOPPING, Service
from runtime.engine import Engine
from runtime.serve.errors import Refusal, stopping
from runtime.serve.guard import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.picture import Rates
from runtime.serve.writing import Writing

Result = TypeVar("Result")
LONGEST_WAIT = 60  # seconds that a client is told to wait


@dataclass(frozen=True)
class Served:
    """A model behind a server. The first of `names` is its own, and answers say it."""

    engine: Engine
    service: Service
    names: Sequence[str]
    metrics: Metrics
    limits: Limits
    rates: Rates = field(default_factory=Rates)
    stopping: threading.Event = field(default_factory=threading.Event)
    created: int = field(default_factory=lambda: int(time.time()))
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "prepare"))

    def check_model(self, name: str | None) -> None:
        """Raises `Refusal` if a request is for another model."""
        if name is not None and name not in self.names:
            message = f"there is no model {quoted(name)} here; the model is {quoted(self.names[0])}"
            raise Refusal(404, message, param="model", code="model_not_found")

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Do work in a thread, since other clients would wait for it in the event loop."""
        return await asyncio.wrap_future(self.pool.submit(self.working, work))

    def working(self, work: Callable[[], Result]) -> Result:
        with self.engine.runner.working():
            return work()

    async def write(self, prepare: Callable[[], Sequence[Work]]) -> Writing:
        """Have texts written, which `prepare` gives. Raises `RequestError` and `Refusal`."""
        if self.stopping.is_set():
            raise stopping(STOPPING)
        began, loop = time.perf_counter(), asyncio.get_running_loop()

        def begin() -> Writing:
            works, most = self.working(prepare), self.service.places + self.service.queue
            if len(works) > most:
                raise Refusal(400, f"{len(works)} texts at once, and {most} may be; ask for fewer", param="n")
            return Writing(self.service, works, loop, self.metrics, began)

        future = self.pool.submit(begin)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(give_up)
            raise
        except QueueFull as error:
            wait = math.ceil(self.metrics.mean_seconds / self.engine.plan.parallel)
            raise Refusal(
                429, str(error), "rate_limit_error", code="queue_full",
                headers={"retry-after": str(min(max(wait, 1), LONGEST_WAIT))},
            ) from error  # fmt: skip


def give_up(future: Future[Writing]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()


def finish_reason(finish: Finish | None) -> str | None:
    """Why a text ends, in OpenAI's words.

    >>> [finish_reason(finish) for finish in ("eos", "stop", "length", "context", None)]
    ['stop', 'stop', 'length', 'length', None]
    """
    return None if finish is None else "stop" if finish in ("eos", "stop") else "length"
