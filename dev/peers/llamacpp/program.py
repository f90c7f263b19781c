"""A server as a process of its own, which is asked over HTTP by a thread for each request."""

import http.client
import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
FIRST_ID = 3  # those before are not text
PATIENCE = 120.0  # seconds for the server to load a model, and for an answer
LAST_WORDS = 300  # characters of the server's log in an error

Complete = Callable[[list[int], int, int], float]  # of ids, tokens, seed: tokens per second after the first


class Program:
    """A server that runs."""

    def __init__(self, words: Sequence[object], most: int) -> None:
        """Start it with a free --port, and wait until it is ready for `most` requests at once.

        Raises `OSError` with its last words if it ends, or takes too long.
        """
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        command = [str(word) for word in (*words, "--host", HOST, "--port", self.port)]
        self.pool = ThreadPoolExecutor(most)
        with tempfile.TemporaryFile() as log:  # without a name, so a process that is killed leaves nothing
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
            end = time.monotonic() + PATIENCE
            while not self.healthy():
                if self.process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise OSError(f"{words[0]} serves nothing: {log.read().decode()[-LAST_WORDS:]}")
                time.sleep(0.05)

    def healthy(self) -> bool:
        try:
            with self.answer("GET", "/health"):
                return True
        except OSError:
            return False

    @contextmanager
    def answer(self, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request. Raises `OSError` with what it says if it is an error."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                said = response.read().decode()[:LAST_WORDS]
                raise OSError(f"the server answered {response.status}: {said}")
            yield response
        finally:
            connection.close()

    def together(
        self, complete: Complete, requests: int, prompt: int, tokens: int, seed: int, vocab: int
    ) -> dict[str, Any]:
        """What it takes to answer that many requests at once, of `prompt` random ids below `vocab` and
        `tokens` new tokens each. `each` are the tokens per second of every request after its first token."""
        ids = random.Random(seed)
        prompts = [[ids.randrange(FIRST_ID, vocab) for _ in range(prompt)] for _ in range(requests)]
        cpu, start = self.cpu_seconds(), time.perf_counter()
        futures = [self.pool.submit(complete, prompts[i], tokens, seed + i) for i in range(requests)]
        each = [future.result() for future in futures]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "cpu_seconds": self.cpu_seconds() - cpu, "each": each}

    def cpu_seconds(self) -> float:
        """Processor time of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
