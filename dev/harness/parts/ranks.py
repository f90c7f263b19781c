"""Ranks that are killed, stopped, cut off and interrupted at random moments, and ranks that disagree. Every
other one ends within seconds, with one line, and what has been written is a beginning of the right text."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dev.harness.part import Case
from dev.harness.ranks.asked import Asked
from dev.harness.ranks.cuts import Cuts, Limits
from dev.harness.ranks.disagreeing import Checkpoints
from dev.harness.ranks.impatient import PATIENCE
from dev.harness.ranks.launching import WAYS
from dev.harness.ranks.namespaces import why_not
from dev.harness.ranks.one_process import written_by_one
from dev.harness.subject import Subject
from runtime.engine import DEMO

TIMEOUT = 4.0  # seconds, as ranks are told
LIMITS = Limits(met=TIMEOUT + 6, meeting=PATIENCE + 20)
SAME = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--slots", "4"]
MESSAGES = ("def f(x):", "def g(y):")


@contextmanager
def open_ranks(subject: Subject) -> Iterator[Case]:
    work = subject.work("ranks")
    reason = why_not()
    ways = [way for way in WAYS if not (way.apart and reason)]
    cuts = Cuts(*asked(work), checkpoints(subject, work), LIMITS, work / "case", ways)
    if reason:
        cuts.record.count(**{"not tried": f"network cuts, since {reason}"})
    cuts.learn()
    yield cuts


def asked(work: Path) -> tuple[Asked, Asked]:
    """A text and a conversation, as one process writes them."""
    prompt = work / "prompt"
    prompt.write_text(
        "".join(f"def function_{number}(x):\n    return x + {number}\n\n" for number in range(36))
    )
    greedy = ["--model", str(DEMO), *SAME, "--temperature", "0", "--ignore-eos"]
    text = [*greedy, "--prompt-file", str(prompt), "--max-new-tokens", "120"]
    chat = [*greedy, "--chat", "--max-new-tokens", "60"]
    return one(text, (), work), one(chat, MESSAGES, work)


def one(argv: Sequence[str], messages: tuple[str, ...], work: Path) -> Asked:
    alone = [sys.executable, "-m", "runtime.generate", *argv]
    text = written_by_one(alone, messages, work / f"alone-{len(messages)}")
    ranks = [sys.executable, "-m", "dev.harness.ranks.impatient", *argv]
    return Asked((*ranks, "--distributed", "--rank-timeout", f"{TIMEOUT:g}"), text, messages)


def checkpoints(subject: Subject, work: Path) -> Checkpoints:
    """The demo, and the same with other weights in the middle of its file."""
    other = work / "other"
    shutil.copytree(DEMO, other)
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + (1 << 20)] = bytes(1 << 20)
    file.write_bytes(data)
    return Checkpoints(str(other), str(subject.hf), str(work / "nothing"))
