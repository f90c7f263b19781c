"""A thread that serves requests from any number of others: what a server needs of an engine.

with Service(engine) as service:
    handle = service.submit(Work(ids, params, engine.tokenizer.stream(ids)), print)
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.answer import Token
from runtime.batching.batch import Batch, Request, Result, Work
from runtime.batching.scheduler import full
from runtime.engine import Engine
from runtime.errors import RequestError

Deliver = Callable[[Token | RequestError], None]

STOPPING = "the server is stopping; try again later, or elsewhere"
MISTAKE = "the server made a mistake; its log says which"


@dataclass(frozen=True)
class Counts:
    """How many requests there are."""

    running: int
    queued: int


class Handle:
    """A request, as the thread that submitted it sees it."""

    def __init__(self, service: "Service", request: Request, deliver: Deliver) -> None:
        self.service, self.request, self.deliver = service, request, deliver
        self.ended = self.cancelled = False

    @property
    def reused(self) -> int:
        """How many tokens of the prompt a KV cache held. Known from the first token on."""
        return self.request.reused

    def cancel(self) -> None:
        """Give the request up. `deliver` is not called again, except that a call may be under way. Its place
        is free after the step under way."""
        self.service.cancel(self)


class Service:
    """Serves requests in a thread of its own. Close it before the engine."""

    def __init__(self, engine: Engine, queue: int = 64) -> None:
        """As many requests are served at once as the engine has KV caches (`EngineOptions.parallel`), and
        `queue` more may wait."""
        self.batch, self.queue = Batch(engine.runner, queue), queue
        self.places = engine.plan.parallel
        self.changed = threading.Condition()
        self.arrived: deque[Handle] = deque()
        self.given_up: deque[Handle] = deque()
        self.handles: dict[Request, Handle] = {}  # all that have not ended; guarded by `changed`
        self.stopping = self.stopped = False
        self.thread = threading.Thread(target=self.run, name="batch", daemon=True)
        self.thread.start()

    def submit(self, work: Work, deliver: Deliver) -> Handle:
        """Serve a request. `deliver` is called in the service's thread with each token, the last of which has
        a `finish`, or with the error that ends the request. It must not wait.

        Raises `RequestError` if the request cannot be served, and `QueueFull` if too many wait already.
        """
        request = self.batch.prepare(work)
        with self.changed:
            if self.stopping:
                raise RequestError(STOPPING)
            if len(self.handles) >= self.places + self.queue:
                raise full(self.places, len(self.handles) - self.places)
            handle = self.handles[request] = Handle(self, request, deliver)
            self.arrived.append(handle)
            self.changed.notify_all()
        return handle

    def cancel(self, handle: Handle) -> None:
        """Give a request up (see `Handle.cancel`)."""
        if self.batch.runner.turns.forked:
            return
        with self.changed:
            handle.cancelled = True
            if not handle.ended:
                self.given_up.append(handle)
                self.changed.notify_all()

    def counts(self) -> Counts:
        """How many requests are being served, and how many wait."""
        with self.changed:
            running = min(self.batch.scheduler.served, len(self.handles))
            return Counts(running, len(self.handles) - running)

    def close(self, seconds: float = 0.0) -> None:
        """Take no more requests, and wait up to so many seconds for those there are. The others end with an
        error. Returns after the step under way."""
        if self.batch.runner.turns.forked:  # the thread is another process's, which may hold the lock
            return
        deadline = time.monotonic() + seconds
        with self.changed:
            self.stopping = True
            self.changed.wait_for(lambda: not self.handles, max(deadline - time.monotonic(), 0))
            self.stopped = True
            self.changed.notify_all()
        self.thread.join()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self) -> None:
        """What the thread does."""
        try:
            while self.await_work():
                for request, result in self.step():
                    self.hand_over(request, result)
        finally:
            self.batch.close()
            with self.changed:
                self.stopping = self.stopped = True
                left = list(self.handles)
            for request in left:
                self.hand_over(request, RequestError(STOPPING))

    def step(self) -> list[Result]:
        """A step of the batch. If it fails as nothing should, those that are being served end with an error,
        and the service goes on."""
        try:
            return self.batch.step()
        except BaseException:  # some of libraries in Rust are no `Exception`
            if not (served := self.batch.give_up()):
                raise  # it would fail forever
            logging.getLogger(__name__).exception("a step failed")
            return [(request, RequestError(MISTAKE)) for request in served]

    def await_work(self) -> bool:
        """Take what has arrived, and drop what was given up. Returns False when the service ends."""
        with self.changed:
            self.changed.wait_for(lambda: self.arrived or self.given_up or self.batch.busy or self.stopped)
            while self.given_up:
                self.end(self.given_up.popleft())
            while self.arrived:
                handle = self.arrived.popleft()
                if not handle.ended:
                    self.batch.scheduler.waiting.append(handle.request)  # counted by `submit`
            return not self.stopped

    def hand_over(self, request: Request, result: Token | RequestError) -> None:
        """Give a result to whoever asked for it."""
        with self.changed:
            handle = self.handles.get(request)
            if handle is None or handle.cancelled:
                return
            if isinstance(result, RequestError) or result.finish:
                self.end(handle)
        try:
            handle.deliver(result)
        except Exception:  # a mistake of the program's, which must not end the others' requests
            self.cancel(handle)
            logging.getLogger(__name__).exception("a result could not be delivered")

    def end(self, handle: Handle) -> None:
        """Forget a request, which has ended or was given up. Call it with `changed` held."""
        if not handle.ended:
            handle.ended = True
            self.batch.cancel(handle.request)
            del self.handles[handle.request]
            self.changed.notify_all()
