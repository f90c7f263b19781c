"""What runs while faults come: loading and answering, quantizing, the command. Each runs under a fault, and
again after the fault is over, and knows its right result."""

import shutil
from collections.abc import Callable
from pathlib import Path

from dev.harness.answers import PROMPTS, answer, answers
from dev.harness.command import DONE, run_main
from dev.harness.faults import Fault
from dev.harness.outcome import Verdict, Wrong
from dev.harness.quantizing import check_left, contents, finish, quantize
from dev.harness.subject import OFFLOADED, RESIDENT, Subject
from runtime import Engine, EngineOptions, RequestError, generate

Scenario = Callable[[Fault], Verdict]


def scenarios(subject: Subject, work: Path) -> list[Scenario]:
    return [
        engine(subject.hf, RESIDENT),
        engine(subject.hf, OFFLOADED),
        engine(subject.native, RESIDENT),
        engine(subject.native, OFFLOADED),
        command(subject, work),
        quantizer(subject, work),
    ]


def engine(folder: Path, options: EngineOptions) -> Scenario:
    known = answers(folder, options)

    def run(fault: Fault) -> Verdict:
        try:
            with fault, Engine.load(folder, options) as engine:
                try:
                    found = [answer(engine, prompt) for prompt in PROMPTS]
                except (RequestError, KeyboardInterrupt):
                    fault.over()
                    if [answer(engine, prompt) for prompt in PROMPTS] != known:
                        raise Wrong(f"after {fault.fired} failed, the next answer is wrong") from None
                    raise
        except KeyboardInterrupt:
            if not fault.fired:
                raise
            return Verdict.REFUSED
        if found != known:
            raise Wrong(f"{fault.fired} failed, and the answers are wrong")
        return Verdict.ACCEPTED

    return run


def command(subject: Subject, work: Path) -> Scenario:
    stats, trace = work / "stats.json", work / "trace.jsonl"
    argv = ["--model", str(subject.hf), "--prompt", "def f(", "--temperature", "0", "--max-new-tokens", "5",
            "--device", "cpu", "--dtype", "float32", "--slots", "2", "--stats-file", str(stats),
            "--trace", str(trace)]  # fmt: skip
    known = run_main(generate.main, argv).out

    def run(fault: Fault) -> Verdict:
        stats.unlink(missing_ok=True)
        with fault:
            ended = run_main(generate.main, argv)
        if ended.status == DONE and ended.out != known:
            raise Wrong(f"{fault.fired} failed, and the text is wrong")
        if stats.is_file() and not stats.read_bytes().endswith(b"}\n"):
            raise Wrong(f"{fault.fired} failed, and half a statistics file is left")
        verdict = ended.judged()
        if run_main(generate.main, argv).out != known:
            raise Wrong(f"after {fault.fired} failed, the next text is wrong")
        return verdict

    return run


def quantizer(subject: Subject, work: Path) -> Scenario:
    out = work / "out"
    expected = contents(subject.native)

    def run(fault: Fault) -> Verdict:
        shutil.rmtree(out, ignore_errors=True)
        with fault:
            ended = quantize(subject.hf, out)
        if out.is_dir():
            check_left(out, expected)
        verdict = ended.judged()
        finish(subject, out, expected)
        return verdict

    return run
