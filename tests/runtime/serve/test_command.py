"""The command: how it starts, what it refuses, and how it stops."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from runtime.serve.command import main

ROOT = Path(__file__).resolve().parents[3]
BODY = {"prompt": "def read_bytes(obj):", "max_tokens": 100, "ignore_eos": True, "stream": True}


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The running command, its address, and what it has said so far."""
    words = ("-m", "runtime.serve", "--port", "0", "--device", "cpu", "--context", "256", *words)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = (sys.executable, *words)
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            said, found = [], None
            assert process.stderr is not None
            while found is None:
                said.append(process.stderr.readline())
                assert said[-1], "".join(said)
                found = re.search(r"serving demo at (http://\S+) ", said[-1])
            yield process, found[1], said
        finally:
            process.kill()


def events(lines: Iterator[str]) -> Iterator[dict[str, object]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_sigterm_lets_an_answer_end() -> None:
    with command() as (process, url, said):
        assert "on cpu" in said[0]
        assert sum(line.startswith("note: a text may differ") for line in said) == 1  # in float32
        with httpx.stream("POST", url + "/v1/completions", json=BODY, timeout=60) as stream:
            lines = stream.iter_lines()
            found = events(lines)
            next(found)
            process.send_signal(signal.SIGTERM)
            *_, last = found
        assert last["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
        assert process.wait(60) == 0
        assert process.stderr is not None and process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")


@pytest.mark.slow
def test_ctrl_c() -> None:
    with command("--grace", "0") as (process, url, _):
        with httpx.stream("POST", url + "/v1/completions", json=BODY, timeout=60) as stream:
            found = events(stream.iter_lines())
            next(found)
            process.send_signal(signal.SIGINT)
            *_, last = found
        assert last["error"]["code"] == "stopping"  # type: ignore[index]
        assert process.wait(60) == 130
        assert process.stderr is not None and process.stderr.read() == "interrupted\n"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    return main(["--port", "0", *words]), capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, line = refused(capsys, "--port", str(port))
    assert (status, line) == (1, f"error: 127.0.0.1:{port}: Address already in use\n")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 64])
def test_an_address_of_another_machine(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = refused(capsys, "--host", host)
    assert (status, line) == (2, f"error: --host {host!r}: this machine has no such address\n")


def test_files_of_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    assert refused(capsys, "--api-key-file", str(file)) == (1, f"error: {file}: No such file or directory\n")
    file.write_text("# a comment\n\n")
    status, line = refused(capsys, "--api-key-file", str(file))
    assert status == 2 and line == f"error: {file}: holds no key; write one in each line\n"
    file.write_bytes(b"\xff\n")
    assert "is not UTF-8" in refused(capsys, "--api-key-file", str(file))[1]


def test_beyond_the_loopback_without_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is missing, so nothing is served."""
    absent = str(tmp_path / "absent")
    status, lines = refused(capsys, "--host", "0.0.0.0", "--model", absent)
    assert status == 1 and lines.startswith("warning: everybody who reaches http://localhost:")
    assert "--api-key-file" in lines
    (tmp_path / "keys").write_text("secret\n")
    for words in (["--host", "0.0.0.0", "--api-key-file", str(tmp_path / "keys")], ["--host", "127.0.0.1"]):
        assert "warning" not in refused(capsys, *words, "--model", absent)[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--port", "70000"], "--port: '70000', and must be a number from 0 to 65535"),
        (["--grace", "-1"], "--grace: '-1', and must be a number of seconds"),
        (["--queue", "x"], "--queue: 'x', and must be a number of at least 0"),
        (["--parallel", "0"], "parallel is 0"),
    ],
)
def test_flags_that_make_no_sense(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and line in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = sys.modules["runtime.serve.command"].find_spec  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "runtime.serve.command.find_spec", lambda name: None if name == "starlette" else find(name)
    )
    status, line = refused(capsys)
    assert status == 2 and line == "error: serving needs starlette; pip install 'mixtral-runtime[serve]'\n"
