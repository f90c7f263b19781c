"""Ctrl-C at any moment in real processes: generating, quantizing, chatting on a terminal."""

import contextlib
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from dev.harness.command import DONE
from dev.harness.outcome import Verdict, Wrong
from dev.harness.part import Case
from dev.harness.processes import Running, forked, judged, run_and_exit, started
from dev.harness.quantizing import check_left, contents, finish
from dev.harness.subject import FORMATS, Subject
from runtime import generate
from tools.quantize import command as quantize


@contextmanager
def open_signals(subject: Subject) -> Iterator[Case]:
    processes = Processes(subject, subject.work("signals"))
    kinds = processes.generating, processes.quantizing, processes.chatting, processes.from_the_shell

    def case(chance: Random) -> Verdict:
        return chance.choices(kinds, (10, 6, 5, 1))[0](chance)

    yield case


class Processes:
    """The commands to interrupt, and how long each takes undisturbed."""

    def __init__(self, subject: Subject, work: Path) -> None:
        self.subject, self.work = subject, work
        self.log, self.stats, self.out = work / "log", work / "stats.json", work / "out"
        self.expected = contents(subject.native)
        model = ["--model", str(subject.hf), "--device", "cpu", "--dtype", "float32", "--slots", "2"]
        self.request = [*model, "--prompt", "def f(", "--max-new-tokens", "40"]
        self.request += ["--stats-file", str(self.stats)]
        self.chat = [*model, "--chat", "--max-new-tokens", "60", "--ignore-eos"]
        self.job = [str(subject.hf), str(self.out), *FORMATS, "--threads", "1"]
        self.generate_seconds = self.seconds(forked(generate.main, self.request, self.log))
        self.quantize_seconds = self.seconds(forked(quantize.main, self.job, self.log))
        self.shell_seconds = 0.0  # measured when it is first needed

    def seconds(self, running: Running) -> float:
        began = time.monotonic()
        if (ended := running.ended()).status != DONE:
            raise Wrong(f"undisturbed, it ends with {ended.status}: {ended.err[-500:]}")
        return time.monotonic() - began

    def generating(self, chance: Random) -> Verdict:
        self.stats.unlink(missing_ok=True)
        running = forked(generate.main, self.request, self.log)
        return self.interrupted(running, 0.001 + chance.random() * self.generate_seconds)

    def interrupted(self, running: Running, seconds: float) -> Verdict:
        time.sleep(seconds)
        running.interrupt()
        verdict = judged(running.ended())
        if self.stats.is_file() and not self.stats.read_bytes().endswith(b"}\n"):
            raise Wrong("half a statistics file is left")
        return verdict

    def from_the_shell(self, chance: Random) -> Verdict:
        self.stats.unlink(missing_ok=True)
        if not self.shell_seconds:
            self.shell_seconds = self.seconds(started("runtime.generate", self.request, self.log))
        running = started("runtime.generate", self.request, self.log)
        return self.interrupted(running, 0.05 + chance.random() * self.shell_seconds)

    def quantizing(self, chance: Random) -> Verdict:
        shutil.rmtree(self.out, ignore_errors=True)
        for _ in range(chance.choice((1, 1, 2))):
            running = forked(quantize.main, self.job, self.log)
            time.sleep(0.001 + chance.random() * self.quantize_seconds)
            running.interrupt()
            verdict = judged(running.ended())
            if self.out.is_dir():
                check_left(self.out, self.expected)
            if verdict is Verdict.ACCEPTED or (self.out.is_dir() and contents(self.out) == self.expected):
                break
        finish(self.subject, self.out, self.expected)
        return verdict

    def chatting(self, chance: Random) -> Verdict:
        """Type a message or two on a terminal, Ctrl-C at some moment, and then Ctrl-D until it ends."""
        child, terminal = os.forkpty()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            run_and_exit(generate.main, self.chat)
        said, screen = Running(child, self.log), Screen(terminal)
        try:
            screen.read_until(b"> ", 30)
            for _ in range(chance.choice((1, 2))):
                screen.write(b"def f(x):\n")
                screen.read_for(chance.random() * self.generate_seconds)
                screen.write(b"\x03")
            return self.left(said, screen)
        finally:
            os.close(terminal)
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def left(self, running: Running, screen: "Screen") -> Verdict:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if (found := os.waitpid(running.child, os.WNOHANG))[0]:
                screen.read_for(0.05)
                if b"Traceback" in screen.seen:
                    raise Wrong(f"a traceback: {screen.seen[-1500:]!r}")
                if (status := os.waitstatus_to_exitcode(found[1])) not in (0, 130):
                    raise Wrong(f"status {status}: {screen.seen[-500:]!r}")
                return Verdict.ACCEPTED if status == 0 else Verdict.REFUSED
            screen.write(b"\x04")
            screen.read_for(0.05)
        raise Wrong(f"Ctrl-D does not end it: {screen.seen[-500:]!r}")


class Screen:
    """A terminal, and everything it has shown."""

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self.seen = b""

    def write(self, keys: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended
            os.write(self.terminal, keys)

    def read_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self.terminal], [], [], left)[0]:
            try:
                self.seen += os.read(self.terminal, 1 << 16)
            except OSError:
                time.sleep(min(left, 0.01))
                return

    def read_until(self, text: bytes, seconds: float) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen and time.monotonic() < end:
            self.read_for(0.02)
