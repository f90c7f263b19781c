"""Starts ranks as processes of their own, and looks how they end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
HOST = socket.gethostname()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Process:
    """One rank."""

    starter: "Starter"
    id: int
    output: Path

    def text(self) -> str:
        return self.output.read_text()

    def await_text(self, text: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < deadline, f"no {text!r} in {self.text()!r}"
            time.sleep(0.005)

    def kill(self, number: int) -> float:
        """Send a signal. Returns the moment."""
        os.kill(self.id, number)
        return time.monotonic()

    def end(self, seconds: float = 20) -> int:
        """Exit status; negative: the signal."""
        answer = self.starter.ask({"wait": self.id, "seconds": seconds})
        assert answer is not None, f"still there; it said {self.text()!r}"
        self.starter.started.discard(self.id)
        return int(answer)


class Starter:
    """A process that has imported everything, and forks ranks. Close it in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: set[int] = set()
        self.count = 0
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-W", "error", str(Path(__file__).with_name("program.py"))]
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )

    def ask(self, command: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, need: dict[str, Any]) -> Process:
        self.count += 1
        output = self.folder / f"{self.count}.txt"
        output.touch()
        process = self.ask({"start": need | {"output": str(output)}})
        self.started.add(process)
        return Process(self, process, output)

    def ranks(
        self, *parts: str, timeout: float = 5.0, agent: int | None = None, **need: Any
    ) -> list[Process]:
        """A rank for each part. Rank 0 hosts the store, unless an `agent` does at that port."""
        environ = {"WORLD_SIZE": str(len(parts)), "MASTER_ADDR": "127.0.0.1"}
        environ["MASTER_PORT"] = str(agent or free_port())
        if agent:
            environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        need = {"timeout": timeout, "patience": 20.0} | need
        return [
            self.start(need | {"part": part, "environ": environ | {"RANK": str(rank)}})
            for rank, part in enumerate(parts)
        ]

    def ready(self, *parts: str, **need: Any) -> list[Process]:
        """The same, when all have passed a few frames on."""
        ranks = self.ranks(*parts, **need)
        for rank in ranks:
            rank.await_text("ready")
        return ranks

    def tidy(self) -> None:
        """End whatever a test has left."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            self.ask({"wait": process, "seconds": 5})
        self.started.clear()

    def close(self) -> None:
        self.tidy()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)
