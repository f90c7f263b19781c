"""llama.cpp's server as a side: a process of `llama-server` that is asked over HTTP. Ids are random.

Answers are not streamed, so that no reader of streams takes time. The server itself says how long it decoded
each of them.
"""

import http.client
import json
import os
import random
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dev.peers.llamacpp.serving import serve

HOST = "127.0.0.1"
FIRST_ID = 3  # those before are not text
PATIENCE = 120.0  # seconds for the server to load a model
LAST_WORDS = 300  # characters of the server's log in an error
SAMPLING = {  # by probability alone, so that texts do not run in circles
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True, "cache_prompt": False,
}  # fmt: skip


class TheirServer:
    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def load(
        self, server: str, path: str, threads: int, parallel: int, context: int, vocab: int
    ) -> dict[str, Any]:
        """Start the program `server` with `parallel` slots, each for a text of `context` tokens."""
        self.vocab = vocab
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.log = Path(tempfile.mkstemp(prefix="llama-server-")[1])
        words = [
            server, "--model", path, "--host", HOST, "--port", self.port, "--threads", threads,
            "--parallel", parallel, "--ctx-size", parallel * context, "--no-kv-unified", "--cache-ram", 0,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)
        self.pool = ThreadPoolExecutor(parallel)
        end = time.monotonic() + PATIENCE
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                raise OSError(f"{server} does not serve {path}: {self.log.read_text()[-LAST_WORDS:]}")
            time.sleep(0.05)
        return {"version": version(server)}

    def healthy(self) -> bool:
        try:
            status, _ = self.request("GET", "/health")
        except OSError:
            return False
        return status == 200

    def together(self, requests: int, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        """Answer that many requests at once, of `prompt` random ids and `tokens` new tokens each.

        `each` are the tokens per second of every request from its first token on. No expert was copied.
        """
        assert self.process
        ids = random.Random(seed)
        prompts = [[ids.randrange(FIRST_ID, self.vocab) for _ in range(prompt)] for _ in range(requests)]
        cpu, start = cpu_seconds(self.process.pid), time.perf_counter()
        futures = [self.pool.submit(self.complete, prompts[i], tokens, seed + i) for i in range(requests)]
        each = [future.result() for future in futures]
        seconds = time.perf_counter() - start
        spent = cpu_seconds(self.process.pid) - cpu
        return {"seconds": seconds, "cpu_seconds": spent, "each": each, "copied": 0, "hit_ratio": 1.0}

    def complete(self, ids: list[int], tokens: int, seed: int) -> float:
        asked = {"prompt": ids, "n_predict": tokens, "seed": seed} | SAMPLING
        status, text = self.request("POST", "/completion", json.dumps(asked))
        if status != 200:
            raise OSError(f"llama-server answered {status}: {text[:LAST_WORDS]}")
        timings = json.loads(text)["timings"]
        if timings["predicted_n"] != tokens:
            raise ArithmeticError(f"llama-server made {timings['predicted_n']} tokens of {tokens}")
        return (tokens - 1) / timings["predicted_ms"] * 1e3

    def request(self, method: str, path: str, body: str | None = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.log.unlink()


def version(server: str) -> str:
    """The first line that the program says of itself."""
    done = subprocess.run([server, "--version"], capture_output=True, text=True)
    return next(iter((done.stdout + done.stderr).split("\n")))


def cpu_seconds(process: int) -> float:
    """Processor time of a process and all of its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    side = TheirServer()
    try:
        serve(side)
    finally:
        side.close()
