"""Clients of all kinds: they wait, read streams, leave in the middle, read slowly, and send nonsense."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dev.soak.known import Known

BROKEN = (b"", b"{", b'{"prompt": 5}', b'{"prompt": "x", "top_a": 1}', b"\xff", b'{"prompt": "x", "n": 99}')
EVENTS = (0, 1, 2, 5, 20)  # after which a client leaves
PAUSE = 0.02  # seconds between two events of a slow reader
PATIENCE = 120.0  # seconds
BACK = 0.2  # seconds after which a client comes back that found no place
FULL = "full"


@dataclass
class Report:
    """What came of the requests.

    outcomes  how many of each kind ended as they should
    full      how often a client found no place, and came back
    faults    what did not
    first     seconds to the first event of each stream
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    full: int = 0
    faults: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Client:
    """One of many. Each has a thread of its own."""

    port: int
    secret: str
    known: Sequence[Known]
    report: Report
    draw: random.Random

    def run(self, numbers: Iterator[int]) -> None:
        """Send a request for each of the numbers, of which other clients take some."""
        kinds: dict[Callable[[], str], int] = {  # how often, in percent
            self.wait: 25, self.read: 25, self.leave: 33, self.read_slowly: 5, self.knock: 6, self.mumble: 6,
        }  # fmt: skip
        for number in numbers:
            kind = self.draw.choices(list(kinds), list(kinds.values()))[0]
            try:
                while (outcome := kind()) == FULL:
                    self.report.full += 1
                    time.sleep(BACK * self.draw.random())
                self.report.outcomes[outcome] += 1
            except Exception as error:  # whatever a server can do to a client
                self.report.faults.append(f"request {number}, {kind.__name__}: {error!r}")

    def wait(self) -> str:
        known = self.draw.choice(self.known)
        status, body = self.ask(json.dumps(known.body).encode(), self.secret)
        if status == 429:
            return FULL
        text = json.loads(body)["choices"][0]["text"]
        assert text == known.text, f"{text!r} instead of {known.text!r}"
        return "whole"

    def read(self) -> str:
        return self.stream("stream")

    def leave(self) -> str:
        return self.stream("cut off", most=self.draw.choice(EVENTS))

    def read_slowly(self) -> str:
        return self.stream("slow", pause=PAUSE)

    def knock(self) -> str:
        status, _ = self.ask(b'{"prompt": "x"}', "wrong")
        assert status == 401, status
        return "wrong key"

    def mumble(self) -> str:
        status, body = self.ask(self.draw.choice(BROKEN), self.secret)
        assert status == 400 and json.loads(body)["error"]["message"], (status, body)
        return "broken body"

    def stream(self, kind: str, most: int | None = None, pause: float = 0.0) -> str:
        """Read a text's events, with a pause after each, and leave after `most`."""
        known, began, text = self.draw.choice(self.known), time.perf_counter(), ""
        connection = self.send(json.dumps({**known.body, "stream": True}).encode(), self.secret)
        try:
            response = connection.getresponse()
            if response.status == 429:
                return FULL
            for count, event in enumerate(events(response)):
                if not count:
                    self.report.first.append(time.perf_counter() - began)
                if event == "[DONE]":
                    assert text == known.text, f"{text!r} instead of {known.text!r}"
                    return kind
                text += json.loads(event)["choices"][0]["text"]
                assert known.text.startswith(text), f"{text!r} does not begin {known.text!r}"
                if count == most:
                    return kind
                time.sleep(pause)
            raise AssertionError(f"the stream broke off after {text!r}")
        finally:
            connection.close()

    def ask(self, body: bytes, secret: str) -> tuple[int, bytes]:
        connection = self.send(body, secret)
        try:
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def send(self, body: bytes, secret: str) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"content-type": "application/json", "authorization": f"Bearer {secret}"}
        connection.request("POST", "/v1/completions", body, headers)
        return connection


def events(response: http.client.HTTPResponse) -> Iterator[str]:
    for line in response:
        if line.startswith(b"data: "):
            yield line.decode().removeprefix("data: ").rstrip("\n")


def soak(port: int, secret: str, known: Sequence[Known], requests: int, clients: int, seed: int) -> Report:
    """Send requests from several threads at once, and report."""
    report, lock, numbers = Report(), threading.Lock(), iter(range(requests))

    def shared() -> Iterator[int]:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            yield number

    callers = [Client(port, secret, known, report, random.Random(seed + i)) for i in range(clients)]
    threads = [threading.Thread(target=caller.run, args=[shared()]) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report
