"""Running test files in processes of their own.

Triton reads whether to interpret when it is imported. So a test that imported it here would decide for
others.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_cases(file: str, tmp_path: Path, *options: str, **environment: str) -> None:
    """Run tests of a file that pytest does not find by itself: all of them, unless options say which."""
    returncode, out, err = run(tmp_path, file, *options, **environment)
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
        try:
            out, err = process.communicate(timeout=900)
        finally:
            process.kill()
    return process.returncode, out, err


def imports_triton(module: str) -> bool:
    """Whether importing this module imports Triton."""
    program = f"import sys, {module}; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout in ("True\n", "False\n"), done.stderr
    return done.stdout == "True\n"
