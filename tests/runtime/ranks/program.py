"""Ranks as processes, for tests that kill them. This program imports everything once, and forks.

It reads commands, one JSON object a line, and answers each with one: {"start": what a rank needs} gives the
process's id, and {"wait": id, "seconds": s} its exit status (negative: the signal) or null.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import torch

from runtime.errors import MixtralError
from runtime.ranks.lost import Lost
from runtime.ranks.meeting import Meeting
from runtime.ranks.ring import Ring

LARGE = 1 << 24  # rows that no system's buffers take


def go_round(ring: Ring, size: int = 16) -> None:
    """Pass a frame on to the next rank forever, as fast as it goes."""
    rows = torch.ones(1, size)
    while True:
        ring.send([1], rows)
        ring.receive()


def play(part: str, meeting: Meeting, ring: Ring) -> None:
    for _ in range(3):
        ring.send([0], torch.ones(4, 16))
        ring.receive()
    print("ready", flush=True)
    if part == "round":
        go_round(ring)
    elif part == "large":
        go_round(ring, LARGE // 4)
    elif part == "idle":
        ring.receive()
    elif part == "computing":  # never looks at the ring, as during a long prompt
        while True:
            meeting.watch.check()
            time.sleep(0.01)
    elif part == "raises":
        time.sleep(0.3)
        raise ZeroDivisionError("a mistake of the program")
    elif part == "fails":
        time.sleep(0.3)
        meeting.fail("/x: no such folder")
        raise SystemExit(4)
    elif part == "forks":
        if (child := os.fork()) == 0:
            try:
                ring.send([0])
            except MixtralError as error:
                print("fork:", error, flush=True)
            ring.close()
            meeting.close()
            raise SystemExit(0)
        print("fork ended", os.waitpid(child, 0)[1], flush=True)
        for _ in range(3):
            ring.send([0])
            ring.receive()
        os._exit(0)
    elif part == "leaves":
        ring.close()
        meeting.close()
    elif part == "exits":  # without a word
        time.sleep(0.5)
        raise SystemExit(0)
    else:
        raise AssertionError(part)


def rank(need: dict[str, Any]) -> None:
    """What a rank does: meet, say hello, play its part."""
    os.environ.update(need["environ"])
    torch.set_num_threads(1)
    try:
        for _ in range(need.get("before", 0)):  # engines that have been closed
            with Meeting.join(need["timeout"], need["patience"]) as early:
                early_ring = Ring(early, 64)
                early_ring.send([early.rank])
                assert early_ring.receive()[0] == [(early.rank - 1) % early.size]
                early_ring.close()
        meeting = Meeting.join(need["timeout"], need["patience"])
        others = [Meeting.join(need["timeout"], need["patience"]) for _ in range(need.get("beside", 0))]
        rings = [Ring(other, 64) for other in others]
        play(need["part"], meeting, Ring(meeting, 1024))
        for ring, other in zip(rings, others, strict=True):
            ring.close()
            other.close()
    except Lost as error:
        print(f"lost {time.monotonic()}: {error}", flush=True)
        if need.get("quick"):  # without Python's end, which takes a second
            os._exit(3)
        raise SystemExit(3) from None
    print("threads:", threading.active_count(), flush=True)
    if need.get("quick"):
        os._exit(0)


def host_store(port: int) -> None:
    """Hosts the store, as torchrun's agent does."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    print("ready", flush=True)
    signal.pause()
    del store


def start(need: dict[str, Any]) -> int:
    """The id of a process that does it, with its output in a file."""
    if process := os.fork():
        return process
    out = os.open(need["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.close(0)
    if "store" in need:
        host_store(need["store"])
    else:
        rank(need)
    raise SystemExit(0)


def wait(process: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def main() -> None:
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        answer = start(command["start"]) if "start" in command else wait(command["wait"], command["seconds"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
