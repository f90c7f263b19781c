"""Ctrl-C again and again, wherever CPython delivers it: while a thread orders copies or waits for them, and
during requests. `python -m tests.runtime.experts.interrupts 20000` is the long version.

Each round arms one interrupt and works until it comes. Then it checks that nothing is broken: the next copies
arrive intact, and the next request makes the right tokens.
"""

import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import Engine, EngineOptions, SamplingParams
from runtime.experts.copying import CopyEngine
from runtime.experts.link import HostLink

SIZE, SLOTS = 4096, 4


class Thrown:
    """Interrupts of the main thread, one at a time, each while it is inside `until`."""

    def __init__(self, seed: int = 0, longest: float = 3e-4) -> None:
        self.random, self.longest, self.count = random.Random(seed), longest, 0
        self.armed = False

    def handler(self, number: int, frame: Any) -> None:
        if self.armed:  # otherwise `until` has ended
            self.armed = False
            self.count += 1
            raise KeyboardInterrupt

    def until(self, work: Callable[[], object]) -> None:
        """Do the work again and again until it is interrupted."""
        before = signal.signal(signal.SIGALRM, self.handler)
        try:
            self.armed = True
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(1e-5, self.longest))
            while True:
                work()
        except KeyboardInterrupt:
            pass
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class AtOnce(HostLink):
    """Stands in for a GPU's link: moving blocks no thread. This one moves the bytes at once."""

    def blocks(self, source: Tensor) -> bool:
        return False


def hammer_copies(count: int, link: HostLink, seed: int = 0) -> int:
    """Interrupt a thread `count` times while it orders copies, waits for them and cancels them. Returns how
    many later copies arrived intact. Raises AssertionError if one did not, or if closing hangs."""
    thrown = Thrown(seed)
    chance = random.Random(seed)
    link.piece = SIZE // 3
    copies = CopyEngine(link)
    copies.start()
    sources = [torch.full((SIZE,), n, dtype=torch.uint8) for n in range(1, 6)]
    slots = torch.zeros(SLOTS, SIZE, dtype=torch.uint8)
    asked: dict[int, Any] = {}
    done = 0

    def ask() -> None:
        slot, source = chance.randrange(SLOTS), chance.choice(sources)
        if slot in asked:
            copies.cancel(asked.pop(slot))
        ticket = asked[slot] = copies.submit(source, slots[slot], demand=chance.random() < 0.5)
        if chance.random() < 0.5:
            copies.promote(ticket)
        if chance.random() < 0.7:
            copies.wait(ticket, chance.randint(1, SIZE))

    while thrown.count < count:
        thrown.until(ask)
        for ticket in asked.values():
            copies.cancel(ticket)
        asked.clear()
        copies.cancel_all()
        wanted = [(chance.randrange(5), slot) for slot in range(SLOTS)]
        tickets = [copies.submit(sources[n], slots[slot], demand=slot % 2 == 0) for n, slot in wanted]
        for (n, slot), ticket in zip(wanted, tickets, strict=True):
            copies.wait(ticket)
            assert torch.equal(slots[slot], sources[n]), (thrown.count, slot)
            done += 1
            asked[slot] = ticket
    assert copies.close(), "closing does not hang"
    assert not copies.turn.locked() and not copies.thread.is_alive()
    return done


def hammer_requests(count: int, engine: Engine, prompt: list[int], seed: int = 0) -> None:
    """Interrupt `count` requests. After every tenth, another request and another thread get their turn.
    Raises AssertionError at a wrong token."""
    thrown, params = Thrown(seed, 2e-2), SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    expected = [token.id for token in engine.generate(prompt, params)]
    got: list[int] = []

    def ask() -> None:
        got.clear()
        for token in engine.generate(prompt, params):
            got.append(token.id)
            assert got == expected[: len(got)]

    for n in range(count):
        thrown.until(ask)
        if n % 10 == 0:
            ask()
            other = threading.Thread(target=engine.runner.turns.take, args=(lambda: None,))
            other.start()
            other.join(60)
            assert not other.is_alive(), "another thread gets its turn"


def main(count: int) -> None:
    for link in (HostLink(), AtOnce(), HostLink(50e6)):
        began = time.monotonic()
        done = hammer_copies(count, link)
        print(f"{type(link).__name__} {link.pace.rate}: {count} interrupts, {done} copies right, "
              f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    demo = Path(__file__).parents[3] / "runtime/demo"
    offloaded = {"offload": "always", "slots": 2, "prefetch": 2, "lookahead": 2}
    divided = {"misses": "auto", "link_gbps": 1.0, "cpu_gbps": 2.0}
    for options in ({"offload": "never"}, offloaded, offloaded | divided):
        began = time.monotonic()
        with Engine.load(demo, EngineOptions(device="cpu", context=64, **options)) as engine:  # type: ignore[arg-type]
            hammer_requests(count // 10, engine, [5, 6, 7])
        print(
            f"{options}: {count // 10} interrupts of requests, {time.monotonic() - began:.0f} s", flush=True
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20000)
