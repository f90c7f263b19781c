"""Commands over ranks, as processes of their own."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest

from runtime import EngineOptions
from runtime.engine import DEMO
from runtime.generate import main
from runtime.shell import ranks

ASKED = ("--prompt", "def read(", "--temperature", "0", "--max-new-tokens", "12", "--threads", "1")
DEVICE = ("--device", "cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def by_hand(commands: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """Start `python -m` with the words of each rank."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(commands))}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *words],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )
        for rank, words in enumerate(commands)
    ]  # fmt: skip


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    try:
        ended = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def test_torchrun(capfd: pytest.CaptureFixture[str]) -> None:
    """The text of one process, once; the plan of all ranks; nothing else."""
    assert main([*ASKED, *DEVICE, "--quiet"]) == 0
    text = capfd.readouterr().out
    words = [*ASKED, *DEVICE, "--distributed", "--slots", "4"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "runtime.generate",
    ]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, text) and text.strip()
    lines = [line for line in done.stderr.splitlines() if not line.startswith("W")]  # torchrun's own
    begins = [" ".join(line.split()[:2]) for line in lines]
    places = ["slots: 4", "slots: 4"]
    assert begins[:6] == ["rank 0", places[0], "rank 1", places[1], "rank 0", "rank 1"], done.stderr
    assert begins[6:] == ["first token", "experts: hit"] and "layers 4 to 7 and the head" in lines[0]


def test_perplexity(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("def read(self, size):\n    return self.file.read(size)\n" * 9)
    words = ["tools.perplexity", "--text", str(text), "--json", "--window", "64", *DEVICE, "--threads", "1"]
    over, other, alone = finish(by_hand([[*words, "--distributed"]] * 2) + by_hand([words]))
    found, expected = json.loads(over[1]), json.loads(alone[1])
    assert (found["nats"], found["tokens"]) == (expected["nats"], expected["tokens"])
    assert (over[0], other[0], other[1]) == (0, 0, "") and other[2] == "", other[2]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model", "nowhere"), "nowhere: no such folder"),
        (("--context", "100"), "rank 1 has the option context 100, and rank 0 by default"),
    ],
)
def test_a_rank_that_cannot_take_part(words: Sequence[str], line: str) -> None:
    """It ends all of them, each with one line that says which rank, and why."""
    common = ["runtime.generate", *ASKED, *DEVICE, "--distributed", "--rank-timeout", "20"]
    ended = finish(by_hand([common, [*common, *words]]))
    for rank, (status, out, err) in enumerate(ended):
        said = err.splitlines()
        assert (status, out, len(said)) == (1, "", 1), err
        assert said[0].startswith("error: " if rank == 0 else "rank 1: error: ")
        assert line in said[0] and "rank 1" in said[0] and "rank 0: rank" not in said[0]


def test_a_request_that_cannot_be_served() -> None:
    """Rank 0 finds that before weights are read, and the other rank hears of it."""
    words = ["runtime.generate", "--prompt", "x " * 2000, *DEVICE, "--distributed", "--rank-timeout", "20"]
    (status, out, err), (other, nothing, heard) = finish(by_hand([words] * 2))
    assert (status, out, other, nothing) == (1, "", 1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert heard == f"rank 1: error: rank 0: {err.removeprefix('error: ')}"


def test_serving() -> None:
    """Requests are answered as one process answers them. SIGTERM to rank 0 ends both in order."""
    httpx = pytest.importorskip("httpx")
    port = free_port()
    words = [
        "runtime.serve",
        *DEVICE,
        "--threads",
        "1",
        "--port",
        str(port),
        "--distributed",
        "--parallel",
        "2",
    ]
    processes = by_hand([words] * 2)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            try:
                url = f"http://127.0.0.1:{port}"
                asked = {"model": "demo", "prompt": "def read(", "max_tokens": 8, "temperature": 0, "n": 2}
                answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
                break
            except httpx.ConnectError:
                time.sleep(0.2)
        texts = [choice["text"] for choice in answer.json()["choices"]]
        processes[0].send_signal(signal.SIGTERM)
        ended = finish(processes)
    finally:
        for process in processes:
            process.kill()
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert texts[0] == texts[1] and ended[1][1:] == ("", "")
    from runtime import Engine, SamplingParams

    with Engine.load(DEMO, EngineOptions(device="cpu", threads=1)) as engine:
        tokens = engine.generate("def read(", SamplingParams(max_new_tokens=8, temperature=0))
        assert "".join(token.text for token in tokens) == texts[0]


def test_sigterm_takes_effect_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """In which the reason may come that made torchrun send it."""
    monkeypatch.setenv("RANK", "1")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "MOMENT", 0.2)
    stderr = StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    before = signal.getsignal(signal.SIGTERM)
    began = time.monotonic()
    with (
        pytest.raises(ranks.Stopped, match=r"^told to stop \(SIGTERM\)$"),
        ranks.ending_together(EngineOptions(distributed=True)) as rank,
    ):
        assert rank == 1
        print("two\nlines", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        assert time.monotonic() - began < 60
        threading.Event().wait(60)
    assert stderr.getvalue() == "rank 1: two\nrank 1: lines\n"
    assert signal.getsignal(signal.SIGTERM) == before
    with ranks.ending_together(EngineOptions()) as rank:
        assert rank == 0 and signal.getsignal(signal.SIGTERM) == before
