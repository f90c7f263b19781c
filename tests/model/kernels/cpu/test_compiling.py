"""Where compiled kernels are kept, and what becomes of machines that cannot compile them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.kernels.cpu import launching

pytest.importorskip("numba")

PROGRAM = """
import warnings
warnings.simplefilter("error")
from model.kernels.cpu import compiling
from model.kernels.cpu.rounding import Scheme
addresses = [compiling.kernel(name, Scheme(2, 16)) for name in ("round_rows", "product")]
assert all(addresses) and len({*addresses}) == 2
compiling.grid(True), compiling.grid(False)
print(compiling.Clock.seconds)
"""


def compile_in(folder: Path, program: str = PROGRAM, **environment: str) -> float:
    """The seconds that a new process compiles, with its cache in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_each_kernel_is_compiled_once(tmp_path: Path) -> None:
    assert compile_in(tmp_path) > 0
    kept = {path.name for path in tmp_path.rglob("*.nbc")}
    assert len(kept) == 4, "two kernels, and a grid with and without threads"
    assert compile_in(tmp_path) == 0
    changed = PROGRAM.replace(
        "from model.kernels.cpu.rounding",
        "compiling.sources = lambda: 7\n" + "from model.kernels.cpu.rounding",
    )
    assert compile_in(tmp_path, changed) > 0, "another version of the kernels' code"


def test_the_cache_is_the_users_and_not_beside_the_source(tmp_path: Path) -> None:
    package = Path(launching.__file__).parent
    before = {*package.rglob("*.nb?")}
    compile_in(
        tmp_path / "unused", NUMBA_CACHE_DIR="", HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")
    )
    assert {*package.rglob("*.nb?")} == before == set()
    assert len([*(tmp_path / "cache" / "numba").rglob("*.nbc")]) == 4


def test_where_nothing_can_be_kept_kernels_are_compiled_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "folder")
    assert compile_in(tmp_path, NUMBA_CACHE_DIR=nowhere, XDG_CACHE_HOME=nowhere) > 0


def test_a_numba_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    """As when it does not fit the NumPy that is installed."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 2.2 or less')")
    done = subprocess.run(
        [sys.executable, "-c", "from model.kernels.cpu import launching; print(launching.unsupported())"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Numba needs NumPy 2.2 or less" in done.stdout and "pip install 'numba" in done.stdout


def test_the_extra_names_the_versions_that_the_remedy_names() -> None:
    pyproject = (Path(__file__).parents[4] / "pyproject.toml").read_text("utf-8")
    assert pyproject.count(f'"{launching.NUMBA}"') == 2, "in the extras cpu and test"
