"""What all commands have in common: streams that fail, interrupts, and errors as one line."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from model.errors import ModelError
from runtime.errors import MixtralError, OptionError, RequestError
from runtime.shell.command import DONE, FAILED, INTERRUPTED, USAGE, put, run, say
from tokenizer import TokenizerError

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = (
    "runtime.generate", "tools.quantize", "tools.perplexity", "tools.plan", "tools.trace", "tools.bench",
    "runtime.serve",
)  # fmt: skip
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
HELLO = """
from runtime.shell.command import put, run, say
def work():
    say("working")
    put("text\\n")
    say("done")
raise SystemExit(run(work))
"""
FAILING = """
from runtime import MixtralError
from runtime.shell.command import run
def work():
    raise MixtralError("no room")
raise SystemExit(run(work))
"""
IGNORING = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["generate", "--help"]
try:
    runpy.run_module("runtime.generate", run_name="__main__")
finally:
    signal.raise_signal(signal.SIGINT)
"""


def python(
    *words: str, stdout: int | None = subprocess.PIPE, stderr: int | None = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
        text=True, timeout=120,
    )  # fmt: skip


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


# --- errors and exit statuses


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (MixtralError("no room"), FAILED, "error: no room"),
        (RequestError("no room"), FAILED, "error: no room"),
        (OptionError("no such"), USAGE, "error: no such"),
        (ModelError("bad file"), FAILED, "error: bad file"),
        (TokenizerError("bad file"), FAILED, "error: bad file"),
        (FileNotFoundError(2, "No such file", "a\nb\x1b[2J"), FAILED, r"error: a\nb\x1b[2J: No such file"),
        (FileNotFoundError(2, "No such file", b"\xe9"), FAILED, r"error: \udce9: No such file"),
        (BrokenPipeError(32, "Broken pipe", "pipe"), FAILED, "error: pipe: Broken pipe"),
        (OSError("odd"), FAILED, "error: odd"),
        (MixtralError("one\ntwo\r\x1b]0;title\x07\x9b2J\u202e"), FAILED,
         r"error: one\ntwo\r\x1b]0;title\x07\x9b2J\u202e"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)  # fmt: skip
def test_errors_are_one_escaped_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    assert run(raising(error)) == status
    assert capsys.readouterr() == ("", line + "\n")


def test_mistakes_in_the_program_and_exits_pass() -> None:
    for error in (ZeroDivisionError(), ValueError("ours?"), SystemExit(2)):
        with pytest.raises(type(error)):
            run(raising(error))


def test_what_work_returns_is_the_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: FAILED) == FAILED
    assert run(lambda: put("é\n")) == DONE
    assert capsys.readouterr() == ("é\n", "")


def test_a_warning_is_one_escaped_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    run(lambda: warnings.warn("slow:\n  \x1b[2J", RuntimeWarning, stacklevel=1))
    assert capsys.readouterr().err == "warning: slow: \\x1b[2J\n"
    assert warnings.showwarning is before


# --- streams


def test_streams_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def work() -> None:
        put("text")
        say("line")
        assert sys.stdin.read() == ""

    assert run(work) == DONE
    assert run(raising(MixtralError("no room"))) == FAILED
    assert (sys.stdin, sys.stdout, sys.stderr) == (None, None, None)


def test_a_reader_of_stdout_that_went_away_is_no_error() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    for words in (("-c", HELLO), ("-u", "-c", HELLO)):
        done = python(*words, stdout=theirs)
        assert (done.returncode, done.stderr) == (DONE, "working\n")
    os.close(theirs)


@FULL
def test_a_stdout_without_room_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        for words in (("-c", HELLO), ("-u", "-c", HELLO)):
            done = python(*words, stdout=full.fileno())
            assert (done.returncode, done.stderr) == (
                FAILED,
                "working\nerror: stdout: No space left on device\n",
            )


def test_a_stderr_that_takes_no_more_stops_nothing() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = python("-c", HELLO, stderr=theirs)
    assert (done.returncode, done.stdout) == (DONE, "text\n")
    assert python("-c", FAILING, stderr=theirs).returncode == FAILED
    os.close(theirs)
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = python("-c", HELLO, stderr=full.fileno())
            assert (done.returncode, done.stdout) == (DONE, "text\n")


def test_control_characters_are_escaped_on_a_terminal_alone() -> None:
    text = "a\x1b[2J\x9b\r\x7f\tb\u202e\n"
    program = f"from runtime.shell.command import put, run; run(lambda: put({text!r}))"
    assert subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60
    ).stdout == text.encode()  # fmt: skip
    ours, theirs = pty.openpty()
    python("-c", program, stdout=theirs)
    os.close(theirs)
    assert os.read(ours, 100).decode() == "a\\x1b[2J\\x9b\\x0d\\x7f\tb\u202e\r\n"
    os.close(ours)


# --- each command


# Each as `python -m` runs it, but in one process, which imports PyTorch once.
HELPING = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    try:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("status", end.code, "\\0", flush=True)
"""


def test_help_goes_to_stdout() -> None:
    done = python("-c", HELPING, *COMMANDS)
    assert (done.returncode, done.stderr) == (DONE, "")
    for command, said in zip(COMMANDS, done.stdout.split("\0\n"), strict=False):
        assert said.startswith(f"usage: python -m {command} ") and said.endswith("\nstatus 0 ")


@FULL
def test_help_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = python("-m", "runtime.generate", "--help", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (FAILED, "error: stdout: No space left on device\n")


# --- Ctrl-C

# Runs a command as `python -m` does, and says when the first import of its own begins. The interpreter's
# start comes before it, and nothing of ours can change what an interrupt does there.
STARTING = """
import os, runpy, sys
def hook(event, args):
    if event == "import" and args[0] == "argparse":
        os.write(1, b"!")
sys.addaudithook(hook)
sys.argv = ["generate", "--prompt", "x", "--ignore-eos", "--max-new-tokens", "4000"]
runpy.run_module("runtime.generate", run_name="__main__", alter_sys=True)
"""


def interrupted_after(seconds: float) -> tuple[int, bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", STARTING], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        assert process.stdout.read(1) == b"!"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        reader = threading.Thread(target=process.stdout.read)  # so that it never waits for its pipe
        reader.start()
        err = process.stderr.read()
        reader.join()
    return process.returncode, err


@pytest.mark.parametrize("seconds", [0, 0.05, 0.3, 1, 2])
def test_ctrl_c_at_any_moment(seconds: float) -> None:
    status, err = interrupted_after(seconds)
    assert status == INTERRUPTED
    assert err.splitlines()[-1] == b"interrupted" and b"Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_at_thirty_moments() -> None:
    for moment in range(30):
        test_ctrl_c_at_any_moment(moment * 0.08)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As where a shell starts a command in the background."""
    assert python("-c", IGNORING).returncode == DONE
