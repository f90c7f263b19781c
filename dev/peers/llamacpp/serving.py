"""What a side does: answer questions on stdin, a line of JSON each, by lines of JSON on stdout.

    {"do": "decode", "tokens": 16}
    {"seconds": 0.41, "cpu_seconds": 0.81}

`do` names a method of the side, and the rest is its arguments. An answer is what the method returns, with the
wall time and the processor time of all threads that it took. A failure answers `{"error": "..."}`.

This file imports the standard library alone, because a peer's environment has nothing else of ours.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MEMORY = ("Rss", "Pss", "Anonymous", "Private_Clean", "Private_Dirty")


def serve(side: object) -> None:
    """Answer until stdin ends. Whatever libraries print to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(side, json.loads(line))) + "\n")
        answers.flush()


def answer(side: object, question: dict[str, Any]) -> dict[str, Any]:
    name = question.pop("do")
    if name == "memory":
        return memory()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        found = getattr(side, name)(**question) or {}
    except Exception as error:  # the question was at fault, and the process that asked says so
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu} | found


def memory() -> dict[str, int]:
    """Bytes of this process's memory, as Linux tells them.

    `rss` is all that is resident: `anonymous` memory and the resident part of `mapped` files. `private` is
    what no other process shares at the moment. `pss` counts shared memory in equal parts to all that share
    it. `peak` is the most that was resident, and `read` what came from the disk, since the process began.
    """
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size, _ = line.split()
        sizes[name.rstrip(":")] = int(size) * 1024
    rss, pss, anonymous, clean, dirty = (sizes[name] for name in MEMORY)
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    status = Path("/proc/self/status").read_text().splitlines()
    [peak] = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    return {
        "rss": rss,
        "peak": peak,
        "anonymous": anonymous,
        "mapped": rss - anonymous,
        "pss": pss,
        "private": clean + dirty,
        "read": int(counts["read_bytes"]),
    }
