"""Running test files in processes of their own.

Triton reads whether to interpret when it is imported. So a test that imported it here would decide for
others.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_cases(file: str, tmp_path: Path, *options: str, **environment: str) -> None:
    """Run tests of a file that pytest does not find by itself: all of them, unless options say which.

    A test that is marked `aside(file, **environment)` and calls this may find that they ran already.
    """
    ahead = begun.pop(name_of(file, environment), None) if not options else None
    returncode, out, err = ahead.result() if ahead else run(tmp_path, file, *options, **environment)
    assert returncode == 0 and " passed" in out, out[-20000:] + err[-5000:]
    assert "skipped" not in out, out


def run(cache: Path, file: str, *options: str, **environment: str) -> tuple[int, str, str]:
    """Run pytest. Returns its exit status, and what it wrote."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *options]
    ours = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), **environment}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        command, cwd=ROOT, env=inherited | ours, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        processes.append(process)
        try:
            out, err = process.communicate(timeout=900)
        finally:
            process.kill()
    return process.returncode, out, err


# Files that run beside the other tests, one after the other: each takes a minute or more of one processor.
begun: "dict[str, Future[tuple[int, str, str]]]" = {}
processes: list["subprocess.Popen[str]"] = []
begun_in: list[Path] = []


def name_of(file: str, environment: Mapping[str, str]) -> str:
    return " ".join([file, *map("=".join, sorted(environment.items()))])


def begin_aside(cases: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Begin to run files, each given with its environment. `end_aside` ends it."""
    cache, pool = Path(tempfile.mkdtemp(prefix="triton-")), ThreadPoolExecutor(1)
    for number, (file, environment) in enumerate(cases):
        work = partial(run, cache / str(number), file, **environment)
        begun[name_of(file, environment)] = pool.submit(work)
    begun_in.append(cache)
    pool.shutdown(wait=False)


def end_aside() -> None:
    """End what nobody has waited for, and remove what was compiled."""
    for ahead in begun.values():
        ahead.cancel()
    for process in processes:
        process.kill()
    for cache in begun_in:
        shutil.rmtree(cache, ignore_errors=True)


def imports_triton(module: str) -> bool:
    """Whether importing this module imports Triton."""
    program = f"import sys, {module}; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout in ("True\n", "False\n"), done.stderr
    return done.stdout == "True\n"
