"""A service that serves one text after the other, by the sessions of an engine."""

import queue
import threading
from collections.abc import Callable

from runtime import Engine, RequestError, Token
from runtime.serve.writing import Work


class StandIn:
    """Writes texts in one thread. `gate` keeps it from going on."""

    def __init__(self, engine: Engine, most: int = 8) -> None:
        self.engine, self.most = engine, most
        self.waiting: queue.Queue[StandInHandle | None] = queue.Queue()
        self.gate = threading.Event()
        self.gate.set()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def submit(self, work: Work, deliver: Callable[[Token | RequestError], None]) -> "StandInHandle":
        if self.waiting.qsize() >= self.most:
            raise RequestError("the queue is full")
        handle = StandInHandle(work, deliver)
        self.waiting.put(handle)
        return handle

    def run(self) -> None:
        while (handle := self.waiting.get()) is not None:
            try:
                with self.engine.session() as session:
                    for token in session.run(handle.work.ids, handle.work.params, handle.work.decoder):
                        self.gate.wait()
                        if handle.cancelled.is_set():
                            break
                        handle.deliver(token)
            except RequestError as error:
                handle.deliver(error)

    def close(self) -> None:
        self.waiting.put(None)
        self.thread.join()


class StandInHandle:
    def __init__(self, work: Work, deliver: Callable[[Token | RequestError], None]) -> None:
        self.work, self.deliver = work, deliver
        self.cancelled = threading.Event()
        self.reused = 0

    def cancel(self) -> None:
        self.cancelled.set()
