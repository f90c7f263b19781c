"""The examples of docs/server.md, each run against a server on the demo model."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runtime import SamplingParams
from runtime.serve.command import make_parser
from runtime.serve.metrics import PATHS
from runtime.serve.schemas import ChatRequest, CompletionRequest
from tests.runtime.serve.served import Running

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "server.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CURLS = [
    (code, BLOCKS[i + 1 : i + 2])
    for i, (kind, code) in enumerate(BLOCKS)
    if kind == "sh" and code.startswith("curl")
]


def test_there_are_examples() -> None:
    assert len(CURLS) >= 9
    others = [code for kind, code in BLOCKS if kind == "sh" and not code.startswith("curl")]
    assert others and all(code.startswith("python -m runtime.serve") for code in others)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("number", range(len(CURLS)))
def test_curl(number: int, server: Running) -> None:
    """Each runs as it stands, and gives what is shown below it, but for the id and the time."""
    command, following = CURLS[number]
    local = command.replace("http://localhost:8080", server.url)
    done = subprocess.run(["bash", "-ec", local], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr
    if "/metrics" in command:
        assert "mixtral_new_tokens_total" in done.stdout
    elif '"stream"' in command:
        *events, last, _ = done.stdout.split("\n\n")
        assert last == "data: [DONE]" and len(events) == 4
        shown = following[0][1].splitlines()[0]
        assert same(json.loads(events[0].removeprefix("data: ")), json.loads(shown.removeprefix("data: ")))
    elif following and following[0][0] == "json":
        assert same(json.loads(done.stdout), json.loads(following[0][1]))
    else:
        for line in done.stdout.replace("}{", "}\n{").splitlines():
            assert "error" not in json.loads(line)


def same(given: Any, shown: Any) -> bool:
    if isinstance(given, dict) and isinstance(shown, dict):
        own = given.keys() & {"id", "created"} if "object" in given else set()
        own |= {"cached_tokens"} & given.keys()  # the server has served other tests
        return given.keys() == shown.keys() and all(same(given[k], shown[k]) for k in given.keys() - own)
    if isinstance(given, list) and isinstance(shown, list):
        return len(given) == len(shown) and all(map(same, given, shown))
    return bool(given == shown)


def test_the_clients_program(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = [code for kind, code in BLOCKS if kind == "py"]
    exec(program.replace("http://localhost:8080", server.url), {})
    assert capsys.readouterr().out.strip()


def test_every_field_flag_path_and_metric_is_there(server: Running) -> None:
    words = set(re.findall(r"`([\w-]+)`", PAGE))
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert fields - words <= {"messages", "prompt"}
    flags = {flag for action in make_parser()._actions for flag in action.option_strings}
    shown = set(re.findall(r"`(--[\w-]+)`", PAGE))
    assert shown - {"--json"} <= flags
    table = {line for line in PAGE.splitlines() if line.startswith("| `--")}
    for flag in ("--name", "--host", "--port", "--api-key-file", "--origin", "--queue", "--grace"):
        assert any(flag in line for line in table)
    assert all(f"{path}`" in PAGE for path in PATHS)
    names = re.findall(r"^# TYPE (mixtral_\w+)", server.get("/metrics").text, re.MULTILINE)
    assert {name for name in names if not name.endswith("_created")} - words == set()


def test_the_servers_own_fields_are_those_of_sampling() -> None:
    own = {"top_k", "min_p", "repetition_penalty", "ignore_eos", "grammar", "json_schema"}
    assert own <= SamplingParams.__dataclass_fields__.keys() and own <= ChatRequest.model_fields.keys()
