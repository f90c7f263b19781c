"""The server as a process, and bursts of clients: they ask for chats and completions, many of them go away
midway, some burst the queue, and some have to be refused. What comes has to be what comes alone.

A case is a burst of up to 24 requests at once, or a short request while long prompts are computed. In the end
the server is told to stop while it writes.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dev.harness.part import Case
from dev.harness.serving.asking import CONTEXT
from dev.harness.serving.crowd import PLACES, QUEUE, Crowd
from dev.harness.serving.process import Server
from dev.harness.subject import Subject
from runtime import Engine, EngineOptions
from runtime.engine import DEMO
from tools.quantize import command as quantize

KEYS = "# people\nfirst-key\nsecond-key\n"
SAME = ["--device", "cpu", "--dtype", "bfloat16", "--threads", "1", "--context", str(CONTEXT)]
SERVED = ["--slots", "4", "--parallel", str(PLACES), "--queue", str(QUEUE)]


@contextmanager
def open_server(subject: Subject) -> Iterator[Case]:
    work = subject.work("server")
    model, keys = quantized(work), work / "keys"
    keys.write_text(KEYS)
    argv = ["--model", str(model), "--api-key-file", str(keys), *SAME, *SERVED]
    server = Server(argv, work / "log", key="second-key")
    try:
        with Engine.load(model, resident()) as engine:
            crowd = Crowd(server, engine)
            yield crowd
            crowd.finish()
    finally:
        server.kill()


def resident() -> EngineOptions:
    """The same model, whose experts are all in memory, for one text at a time."""
    return EngineOptions(device="cpu", dtype="bfloat16", threads=1, context=CONTEXT)


def quantized(work: Path) -> Path:
    """The demo at 4 bits. A fork quantizes it, and its threads end with it."""
    child = os.fork()
    if not child:
        words = ["--attention", "4", "--experts", "4", "--head", "8", "--threads", "1", "--quiet"]
        with contextlib.redirect_stderr(None):
            os._exit(quantize.main([str(DEMO), str(work / "demo"), *words]))
    if status := os.waitpid(child, 0)[1]:
        raise RuntimeError(f"the demo could not be quantized: status {status}")
    return work / "demo"
