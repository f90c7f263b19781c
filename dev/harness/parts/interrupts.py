"""Ctrl-C at any moment of an offloaded engine's life: in a request, at its end, while closing or loading."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

from dev.harness.answers import GREEDY, PROMPTS, answer, answers
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.subject import OFFLOADED, Subject
from runtime import Engine

LEAST = 1e-6  # seconds: a timer of 0 would be off


@contextmanager
def open_interrupts(subject: Subject) -> Iterator[Case]:
    signal.signal(signal.SIGALRM, interrupt)
    victim = Victim(subject)
    try:
        yield victim.case
    finally:
        victim.engine.close()


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def interrupted(action: Callable[[], object], seconds: float) -> bool:
    """Interrupt an action after `seconds`. Returns whether the interrupt ended it."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, LEAST))
            action()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


class Victim:
    """An engine, loaded again after an interrupt has ended it, and how long its actions take."""

    def __init__(self, subject: Subject) -> None:
        self.folder = subject.hf
        self.known = dict(zip(PROMPTS, answers(self.folder), strict=True))
        self.seconds: dict[str, float] = {}
        self.engine = self.load()
        for prompt in PROMPTS:
            self.timed("request", lambda prompt=prompt: answer(self.engine, prompt))  # type: ignore[misc]
        self.timed("close", self.engine.close)
        self.timed("load", self.renew)

    def load(self) -> Engine:
        return Engine.load(self.folder, OFFLOADED)

    def renew(self) -> None:
        self.engine = self.load()

    def timed(self, what: str, action: Callable[[], object]) -> None:
        began = time.perf_counter()
        action()
        self.seconds[what] = max(time.perf_counter() - began, self.seconds.get(what, 0.0))

    def case(self, chance: Random) -> Verdict:
        kind = chance.choices(("request", "dropped", "close", "load"), (70, 20, 5, 5))[0]
        prompt = chance.choice(PROMPTS)
        if kind == "request":
            ended = self.interrupt(chance, "request", lambda: answer(self.engine, prompt))
        elif kind == "dropped":
            ended = self.interrupt(chance, "request", lambda: self.drop(prompt, chance.randrange(4)))
        elif kind == "close":
            ended = self.interrupt(chance, "close", self.engine.close)
            self.engine.close()
            self.renew()
        else:
            self.engine.close()
            ended = self.interrupt(chance, "load", self.renew)
            self.engine.close()
            self.renew()
        prompt = chance.choice(PROMPTS)
        if answer(self.engine, prompt) != self.known[prompt]:
            raise Wrong(f"the request after an interrupted {kind} has a wrong answer")
        self.engine.stats()
        return Verdict.REFUSED if ended else Verdict.ACCEPTED

    def interrupt(self, chance: Random, what: str, action: Callable[[], object]) -> bool:
        return interrupted(action, chance.random() * self.seconds[what] * 0.9)

    def drop(self, prompt: tuple[int, ...], count: int) -> None:
        tokens = self.engine.generate(list(prompt), GREEDY)
        for _ in range(count):
            next(tokens)
