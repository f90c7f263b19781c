"""Runs a case in a fork of this process, which may run out of memory or be killed."""

import json
import os
import select
import signal
from collections.abc import Callable
from dataclasses import asdict

import torch

from dev.harness.judge import judge, shown
from dev.harness.outcome import Leaked, Outcome, Verdict, Wrong

LOST = 99


class Crashed(Exception):
    """The fork died, or ended without a report."""


class Stuck(Exception):
    """The fork did not end."""


def settle_in() -> None:
    """Call this first in a fork. PyTorch replaces its pool of threads there at the first use, and two threads
    that use it at once find none ("Invalid thread pool!")."""
    torch.set_num_threads(1)


def isolated(function: Callable[[], Verdict], patience: float = 60.0) -> Verdict:
    """The verdict of the function in a fork. Raises its errors outside of the family again, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        settle_in()
        tell(function, writer)
    os.close(writer)
    try:
        ready = select.select([reader], [], [], patience)[0]
        told = b""
        while ready and (more := os.read(reader, 1 << 16)):
            told += more
    finally:
        os.close(reader)
        if not ready:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if not ready:
        raise Stuck(f"no end within {patience:.0f} s")
    if os.WIFSIGNALED(status) or not told:
        raise Crashed(f"the process died (status {status})")
    outcome = Outcome(**json.loads(told))
    verdict = Verdict(outcome.verdict)
    if verdict is Verdict.WRONG:
        raise Wrong(outcome.said)
    if verdict is Verdict.LEAK:
        raise Leaked(outcome.said)
    if verdict.failure:
        raise Crashed(f"{outcome.said}\n{outcome.trace}")
    return verdict


def tell(function: Callable[[], Verdict], writer: int) -> None:
    try:
        try:
            outcome = Outcome(-1, function())
        except BaseException as error:
            outcome = judge(-1, error)
        os.write(writer, json.dumps(asdict(outcome) | {"said": shown(outcome.said)}).encode())
    finally:
        os._exit(0)
