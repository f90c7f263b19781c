"""The command line: what goes where, exit statuses, and never a traceback.

Most cases call `main` in this process; those about pipes, signals and terminals start a real one.
"""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from runtime import Engine, SamplingParams, Token
from runtime.generate import main
from runtime.shell.command import ESCAPES
from runtime.shell.prompts import read_prompt
from tests.runtime.shell.terminal import ASKING, CTRL_C, CTRL_D, LEFT, Terminal, pasted

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def alpha_"


class Outcome(NamedTuple):
    status: int | str | None
    out: str
    err: str


@pytest.fixture
def run(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Runs `main` on the shared checkpoint with the given words and stdin."""

    def run(*words: object, stdin: bytes | None = b"", model: Path = checkpoint) -> Outcome:
        monkeypatch.setattr(sys, "stdin", stdin if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        try:
            status: int | str | None = main([*command(model), *map(str, words)])
        except SystemExit as exit:
            status = exit.code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Outcome(status, out, err)

    return run


def command(model: Path) -> list[str]:
    return ["--model", str(model), "--device", "cpu", "--dtype", "float32"]


def sampled(seed: int, count: int = 20) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, seed=seed, ignore_eos=True)


def text_of(tokens: Any) -> str:
    return "".join(token.text for token in tokens)


FLAGS = ("--max-new-tokens", 20, "--seed", 4, "--ignore-eos")


# --- where the prompt comes from and where things go


def test_prompts_by_flag_file_and_stdin_give_the_same_text(
    run: Callable[..., Outcome], engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"def alpha_\n")
    expected = text_of(engine.generate(PROMPT, sampled(4)))
    for words, stdin in (
        (("--prompt", PROMPT), b"not this"),
        (("--prompt-file", tmp_path / "prompt.txt"), b"not this"),
        ((), b"def alpha_"),
        ((), b"def alpha_\n"),
    ):
        outcome = run(*FLAGS, *words, stdin=stdin)
        assert (outcome.status, outcome.out) == (0, expected)


def test_only_one_newline_at_the_very_end_of_a_prompt_is_the_shells(
    run: Callable[..., Outcome], engine: Engine
) -> None:
    expected = text_of(engine.generate("\nx = é\n", sampled(4)))
    assert run(*FLAGS, stdin="\nx = é\n\n".encode()).out == expected
    assert run(*FLAGS, "--prompt", "\nx = é\n").out == expected


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_files_of_other_systems(tmp_path: Path, end: bytes, mark: bytes) -> None:
    (tmp_path / "prompt.txt").write_bytes(mark + b"one\r\ntwo" + end)
    assert read_prompt(None, tmp_path / "prompt.txt") == "one\r\ntwo"


def test_an_empty_prompt_by_flag_lets_the_model_begin(run: Callable[..., Outcome], engine: Engine) -> None:
    assert run(*FLAGS, "--prompt", "").out == text_of(engine.generate("", sampled(4)))


def test_text_is_shown_as_it_comes(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = []

    def generate(*args: object) -> Iterator[Token]:
        for text in ("one", " é", "", "\n"):
            yield Token(7, text, 0.0)
            shown.append((tmp_path / "out").read_bytes().decode())

    monkeypatch.setattr(Engine, "generate", generate)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert run("--prompt", "x", "--quiet").status == 0
    assert shown == ["one", "one é", "one é", "one é\n"]


def test_plan_and_statistics_go_to_stderr(run: Callable[..., Outcome]) -> None:
    lines = run(*FLAGS, "--prompt", PROMPT).err.splitlines()
    assert re.fullmatch(r"float32 on cpu: \S+ \S+: trunk .*, experts .*, kv .*; context 640 tokens", lines[0])
    assert re.fullmatch(r"first token .* s; prompt \d+ tokens, .*; decode 19 tokens, .* tokens/s", lines[1])
    assert len(lines) == 2


def test_quiet_says_nothing(run: Callable[..., Outcome]) -> None:
    loud, quiet = run(*FLAGS, "--prompt", PROMPT), run(*FLAGS, "--prompt", PROMPT, "--quiet")
    assert (quiet.status, quiet.out, quiet.err) == (0, loud.out, "")


def test_statistics_as_json_and_in_a_file(run: Callable[..., Outcome], tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    outcome = run(*FLAGS, "--prompt", PROMPT, "--quiet", "--stats", "json", "--stats-file", file)
    stats = json.loads(outcome.err)
    assert (stats["requests"], stats["new_tokens"], stats["decoded_tokens"]) == (1, 20, 19)
    assert stats["decode_tokens_per_s"] == pytest.approx(19 / stats["decode_seconds"])
    assert stats["prompt_tokens_per_s"] == pytest.approx(stats["prompt_tokens"] / stats["prompt_seconds"])
    assert stats["plan"]["context"] == 640
    assert json.loads(file.read_text()) == stats


def test_a_stats_file_is_there_whole_or_not_at_all(run: Callable[..., Outcome], tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    assert run(*FLAGS, "--prompt", PROMPT, "--stats-file", link).status == 0
    assert target.read_text() == "mine" and json.loads(link.read_text())["requests"] == 1
    link.write_text("before")
    assert run("--prompt", "x" * 3000, "--stats-file", link).status == 1
    assert link.read_text() == "before" and sorted(tmp_path.iterdir()) == [link, target]


@pytest.mark.parametrize(
    "words",
    [
        ("--stats-file", "/nowhere/s"),
        ("--stats-file", "/"),
        ("--trace", "/nowhere/s"),
        ("--session", "/nowhere/s"),
    ],
)
def test_outputs_are_judged_before_weights_are_read(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, words: tuple[str, str]
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("weights were read"))
    outcome = run("--chat", "--prompt", "x", *words)
    assert outcome.status == 1 and outcome.err.startswith(f"error: {words[1]}: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "word " * 500, "--context", "64"), "tokens and the context holds 64"),
        (("--prompt", "word " * 500, "--context", "64", "--chat"), "tokens and the context holds 64"),
        (("--prompt", "x", "--logit-bias", "99999=1"), "logit_bias names token 99999"),
        (("--prompt", "x", "--trace", "{folder}/t.jsonl", "--offload", "never"), "nothing to trace"),
    ],
)
def test_requests_are_judged_before_weights_are_read(
    run: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("runtime.startup.load_weights", lambda *_: pytest.fail("weights were read"))
    outcome = run(*(word.format(folder=tmp_path) for word in words))
    assert outcome.status in (1, 2) and outcome.err.count("\n") == 1 and message in outcome.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_devices_are_written_as_they_are(run: Callable[..., Outcome]) -> None:
    outcome = run(*FLAGS, "--prompt", PROMPT, "--quiet", "--stats-file", "/dev/full")
    assert outcome.status == 1 and "No space left" in outcome.err
    assert Path("/dev/full").is_char_device()


def test_a_dry_run_says_the_plan_and_reads_no_prompt(run: Callable[..., Outcome]) -> None:
    outcome = run("--dry-run", "--context", 77, stdin=b"")
    assert (outcome.status, outcome.out) == (0, "")
    assert "context 77 tokens" in outcome.err and "float32 on cpu" in outcome.err
    assert run("--dry-run", "--ram", "10KiB").status == 1
    assert run("--dry-run", model=Path("/nowhere")).status == 1


def test_stop_strings_and_other_params_reach_the_engine(run: Callable[..., Outcome], engine: Engine) -> None:
    whole = text_of(engine.generate(PROMPT, sampled(4)))
    outcome = run(*FLAGS, "--prompt", PROMPT, "--stop", "\x01", whole[7:9])
    assert (outcome.status, outcome.out) == (0, whole[: whole.index(whole[7:9])])
    params = SamplingParams(max_new_tokens=9, temperature=0, repetition_penalty=2, logit_bias={7: 30})
    words = shlex.split("--max-new-tokens 9 --temperature 0 --repetition-penalty 2 --logit-bias 7=30")
    assert run(*words, "--prompt", PROMPT).out == text_of(engine.generate(PROMPT, params))


def test_a_full_context_is_a_warning(run: Callable[..., Outcome]) -> None:
    outcome = run("--prompt", PROMPT, "--context", 12, "--ignore-eos", "--quiet")
    assert outcome.status == 0
    assert outcome.err == "warning: stopped early, the context of 12 tokens is full; raise --context\n"


def test_chat_with_a_system_message(run: Callable[..., Outcome], engine: Engine) -> None:
    session = engine.session("Be brief.")
    session.send("Hello")
    expected = text_of(session.generate(sampled(4)))
    assert run(*FLAGS, "--chat", "--system", "Be brief.", "--prompt", "Hello").out == expected
    assert run(*FLAGS, "--chat", "--system", "Be brief.", stdin=b"Hello\n").out == expected
    assert run(*FLAGS, "--chat", "--prompt", "Hello").out != expected
    assert run(*FLAGS, "--prompt", "Hello").out != expected


def test_a_conversation_goes_on_in_its_file(
    run: Callable[..., Outcome], engine: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "talk.session"
    with engine.session("Be brief.") as session:
        for message in ("Hello", "And then?"):
            session.send(message)
            expected = text_of(session.generate(sampled(4)))
            system = () if file.exists() else ("--system", "Be brief.")
            assert run(*FLAGS, "--chat", *system, "--session", file, "--prompt", message).out == expected
    before = file.read_bytes()
    assert run("--chat", "--session", file, "--prompt", "x" * 2000).status == 1
    small = run("--chat", "--session", file, "--prompt", "x", "--context", 20, "--quiet")
    assert small.status == 1 and small.err.startswith(f"error: {file}: the conversation has ")
    assert file.read_bytes() == before


# --- what goes wrong

FAILURES: list[tuple[list[object], bytes, str]] = [
    (["--model", "/nowhere/at all", "--prompt", "x"], b"", "/nowhere/at all: no such folder"),
    (["--model", __file__, "--prompt", "x"], b"", "folder"),
    ([], b"", "stdin is empty"),
    ([], b"\xff\xfed\x00", "stdin is UTF-16; save it as UTF-8"),
    ([], b"def \xff", "stdin is not UTF-8: byte 0xff at offset 4"),
    ([], b"def caf\xc3", "stdin is not UTF-8: byte 0xc3 at offset 7"),
    (["--prompt-file", "/nowhere/prompt"], b"", "/nowhere/prompt"),
    (["--prompt-file", "/"], b"", "directory"),
    (["--prompt-file", os.devnull], b"", "'/dev/null' is empty"),
    (["--prompt", "x" * 3000], b"", "tokens and the context holds 640"),
    (["--prompt", "x", "--context", 2], b"", "context holds 2"),
    (["--prompt", os.fsdecode(b"caf\xe9")], b"", "lone surrogate"),
    (["--chat", "--system", os.fsdecode(b"\xe9"), "--prompt", "x"], b"", "lone surrogate"),
    (["--model", os.fsdecode(b"/\xe9"), "--prompt", "x"], b"", "no such folder"),
    (["--prompt", "x", "--ram", "4000KiB"], b"", "budget is 3.9 MiB; lower --context to"),
    (["--prompt", "x", "--logit-bias", "400=1"], b"", "logit_bias names token 400"),
    (["--prompt", "x", "--temperature", "1e-300"], b"", "no token can be sampled"),
    (["--prompt", "x", "--quiet", "--stats-file", "/nowhere/s"], b"", "/nowhere/s"),
]


@pytest.mark.parametrize(("words", "stdin", "message"), FAILURES, ids=[f[2] for f in FAILURES])
def test_a_request_that_fails_says_why_in_one_line(
    run: Callable[..., Outcome], words: list[object], stdin: bytes, message: str
) -> None:
    outcome = run("--quiet", "--max-new-tokens", 1, *words, stdin=stdin)
    assert outcome.status == 1
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message in outcome.err
    assert outcome.out == "" or "--stats-file" in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frobnicate"], "--frobnicate"),
        (["a prompt without its flag"], "unrecognized"),
        (["--prompt", "x", "--prompt-file", "y"], "not allowed with"),
        (["--prompt", "x", "--system", "y"], "--system"),
        (["--prompt", "x", "--session", "y"], "--session is for conversations; add --chat"),
        (["--top-k", "many"], "--top-k"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--seed", "-1"], "seed is -1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--logit-bias", "7"], "--logit-bias"),
        (["--stop", ""], "stop is ('',)"),
        (["--dtype", "int4"], "--dtype"),
        (["--ram", "much"], "ram: 'much' is not a size"),
        (["--ram", "9" * 400], "is not a size"),
        (["--context", "1"], "context is 1"),
        (["--prompt", "x", "--context", "999999"], "context is 999999"),
        (["--prompt", "x", "--device", "gpu"], "device is 'gpu'"),
        (["--prompt", "x", "--device", "cuda:x"], "device is 'cuda:x'"),
        (["--stats", "xml"], "--stats"),
    ],
)
def test_wrong_usage_is_status_2(run: Callable[..., Outcome], words: list[str], message: str) -> None:
    outcome = run(*words)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err


def test_a_gpu_that_is_not_there(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = run("--device", "cuda", "--prompt", "x")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("error: device cuda: ") and "use --device cpu" in outcome.err


def test_an_interrupt_is_status_130(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Engine, "generate", interrupted)
    outcome = run("--prompt", "x", "--quiet")
    assert (outcome.status, outcome.out, outcome.err) == (130, "", "interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        outcome = run("--prompt", "x", "--quiet")
        full.flush()  # as the interpreter does at exit
    assert outcome.status == 1
    assert (
        outcome.err.startswith("error: ") and "No space left" in outcome.err and outcome.err.count("\n") == 1
    )


def test_streams_that_were_closed_from_the_start(
    run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run("--prompt", "x", "--quiet", "--stats-file", tmp_path / "stats") == (0, "", "")
    assert json.loads((tmp_path / "stats").read_text())["new_tokens"] > 0
    assert run("--quiet", stdin=None) == (
        1,
        "",
        "error: stdin is empty; give a prompt (--prompt '' lets the model begin by itself)\n",
    )


# --- as a process of its own


@pytest.fixture(scope="module")
def long_checkpoint(variant: Callable[..., Path]) -> Path:
    """One whose context takes longer to fill than a test waits."""
    return variant(context=30_000)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the command; whatever still runs when the test is over is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(model: Path, *words: object, **streams: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        } | streams
        arguments = [sys.executable, "-m", "runtime.generate", *command(model), *map(str, words)]
        process: Any = subprocess.Popen(arguments, env=environment, **streams)
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # closes its pipes and waits for it
            process.kill()


ENDLESS = ("--ignore-eos", "--context", 30_000, "--max-new-tokens", 29_000, "--quiet")


def test_a_pipe_in_and_a_reader_that_soon_has_had_enough(
    start: Callable[..., subprocess.Popen[bytes]], long_checkpoint: Path, engine: Engine
) -> None:
    expected = text_of(engine.generate(PROMPT, sampled(4, 40))).encode()[:20]
    process = start(long_checkpoint, *ENDLESS, "--seed", 4, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(PROMPT.encode() + b"\n")
    process.stdin.close()
    assert process.stdout.read(20) == expected
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


def test_ctrl_c(start: Callable[..., subprocess.Popen[bytes]], long_checkpoint: Path) -> None:
    process = start(long_checkpoint, *ENDLESS, "--prompt", PROMPT)
    assert process.stdout and process.stderr
    assert len(process.stdout.read(1)) == 1
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")


def test_a_conversation_on_a_terminal(checkpoint: Path, engine: Engine) -> None:
    session, expected = engine.session(), []
    for message in ("Hello", "And é?\nTwo"):
        session.send(message)
        expected.append(text_of(session.generate(sampled(4))).translate(ESCAPES) + "\n")
    session.close()
    words = ("-m", "runtime.generate", *command(checkpoint), *FLAGS, "--chat", "--quiet")
    with Terminal(*words, stderr=subprocess.PIPE) as terminal:
        terminal.until(ASKING)
        for keys, answer in (
            ("Holla" + LEFT * 4 + "\x1b[3~e" + "\x05\x7fo\r", expected[0]),
            ("\r", ""),
            ("/frobnicate\r", ""),
            (b"\xff\r", ""),
            (pasted("x" * 2000) + "\r", ""),
            (pasted("And é?\nTwo") + "\r", expected[1]),
        ):
            terminal.type(keys)
            assert answer in terminal.until(ASKING)
        terminal.type(CTRL_D)
        assert terminal.process.wait(60) == 0
        greeting, unknown, undecodable, long, *ends = terminal.process.stderr.read().decode().split("\n")
        terminal.process.stderr.close()
    assert "Ctrl-D" in greeting and ends == ["", ""]
    assert unknown.startswith("error: /frobnicate is no command")
    assert undecodable == "error: the message is not UTF-8: byte 0xff at offset 0; save it as UTF-8"
    assert long.startswith("error: the prompt has ")


def test_ctrl_c_ends_an_answer_and_twice_at_the_prompt_the_program(long_checkpoint: Path) -> None:
    words = ("-m", "runtime.generate", *command(long_checkpoint), *ENDLESS, "--chat")
    with Terminal(*map(str, words), stdout=subprocess.PIPE) as terminal:
        terminal.until("> ")
        for _ in range(2):
            terminal.type("Hello\r")
            assert terminal.process.stdout.read(1)
            terminal.type(CTRL_C)
            assert terminal.until("> ").endswith("the answer was ended\n> ")
            os.set_blocking(terminal.process.stdout.fileno(), False)
            terminal.process.stdout.read()
            os.set_blocking(terminal.process.stdout.fileno(), True)
        terminal.interrupt()
        assert terminal.until("> ").endswith("\nCtrl-C once more ends the program, and so does Ctrl-D\n> ")
        terminal.interrupt()
        assert terminal.process.wait(60) == 130
        assert terminal.rest().endswith("\ninterrupted\n")
        terminal.process.stdout.close()


def test_a_conversation_survives_the_end_of_its_process(
    checkpoint: Path, engine: Engine, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "talk.session"
    words = ("-m", "runtime.generate", *command(checkpoint), *FLAGS, "--chat", "--session", file)
    with Terminal(*words) as terminal:
        terminal.until(ASKING)
        terminal.type("Hello\r")
        terminal.until(ASKING)
        terminal.process.kill()
    with engine.session() as session:
        for message in ("Hello", "And then?"):
            session.send(message)
            expected = text_of(session.generate(sampled(4)))
    assert run(*FLAGS, "--chat", "--session", file, "--prompt", "And then?").out == expected
