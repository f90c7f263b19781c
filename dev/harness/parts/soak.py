"""Long use: several threads with sessions of their own, requests that are dropped midway, also in reference
cycles, a link that fails, and a signal handler that asks for statistics."""

import gc
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from random import Random
from typing import Any

from torch import Tensor

from dev.harness.answers import PROMPTS
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import OFFLOADED, RESIDENT, Subject
from runtime import Engine, RequestError, SamplingParams
from runtime.experts.link import HostLink

COUNT = 8
EVERY = 0.003  # seconds between signals
Request = tuple[tuple[int, ...], SamplingParams]
REQUESTS: tuple[Request, ...] = tuple(
    (prompt, SamplingParams(max_new_tokens=COUNT, temperature=temperature, seed=seed, ignore_eos=True))
    for prompt in PROMPTS
    for seed, temperature in enumerate((0.0, 1.0, 1.5))
)


class FlakyLink(HostLink):
    """A link that fails for a `share` of pieces."""

    def __init__(self, chance: Random) -> None:
        super().__init__()
        self.chance, self.share = chance, 0.0

    def move(self, source: Tensor, target: Tensor, demand: bool) -> None:
        if self.share and self.chance.random() < self.share:
            raise OSError("the bus is on strike")
        super().move(source, target, demand)


@contextmanager
def open_soak(subject: Subject) -> Iterator[Case]:
    with Engine.load(subject.hf, RESIDENT) as resident, Engine.load(subject.hf, OFFLOADED) as offloaded:
        known = [texts(resident, request) for request in REQUESTS]
        assert offloaded.runner.cache is not None
        offloaded.runner.cache.copies.link = link = FlakyLink(Random(0))

        def case(chance: Random) -> Verdict:
            link.share = chance.choice((0, 0, 0, 0.01, 0.2))
            engine = offloaded if chance.random() < 0.8 else resident
            users = [
                User(engine, known, Random(chance.random()), link) for _ in range(chance.choice((1, 2, 3)))
            ]
            with asking_for_statistics(engine, chance.random() < 0.5):
                together([user.use for user in users])
            link.share = 0
            number = chance.randrange(len(REQUESTS))
            if texts(offloaded, REQUESTS[number]) != known[number]:
                raise Wrong("the last request has another answer than a resident engine's")
            return Verdict.REFUSED if any(user.failed for user in users) else Verdict.ACCEPTED

        yield case


def texts(engine: Engine, request: Request) -> list[tuple[int, str]]:
    prompt, params = request
    return [(token.id, token.text) for token in engine.generate(list(prompt), params)]


class User:
    """A user with a session, who sends a few requests in a row."""

    def __init__(self, engine: Engine, known: list[Any], chance: Random, link: FlakyLink) -> None:
        self.engine, self.known, self.chance, self.link = engine, known, chance, link
        self.failed = 0

    def use(self) -> None:
        with self.engine.session() as session:
            for _ in range(self.chance.randint(1, 5)):
                number = self.chance.randrange(len(REQUESTS))
                prompt, params = REQUESTS[number]
                start = session.complete if self.chance.random() < 0.5 else self.engine.generate
                try:
                    self.take(start(list(prompt), params), self.known[number])
                except RequestError as error:
                    self.failed += 1
                    if "on strike" not in str(error):
                        raise Wrong(f"refused without reason: {error}") from error

    def take(self, tokens: Iterator[Any], known: list[tuple[int, str]]) -> None:
        """Take all of an answer or its beginning, and then drop it, perhaps in a reference cycle."""
        count = self.chance.choice((COUNT, COUNT, 0, 1, 3))
        if [(token.id, token.text) for token in islice(tokens, count)] != known[:count]:
            raise Wrong("an answer differs from a resident engine's")
        match self.chance.randrange(3):
            case 0:
                cycle: dict[str, Any] = {"tokens": tokens}
                cycle["me"] = cycle
            case 1:
                del tokens
                gc.collect()


def together(actions: list[Callable[[], None]]) -> None:
    """Do all actions at once, the first in this thread, which gets the signals. Raises the first error."""
    errors: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions[1:]]
    for thread in threads:
        thread.start()
    guarded(actions[0])
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def asking_for_statistics(engine: Engine, asks: bool) -> Iterator[None]:
    """While entered, a signal comes every few milliseconds, and its handler asks the engine for
    statistics."""
    signal.signal(signal.SIGALRM, lambda number, frame: engine.stats())
    signal.setitimer(signal.ITIMER_REAL, EVERY if asks else 0, EVERY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
