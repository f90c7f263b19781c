"""Where compiled kernels are kept, and what becomes of machines that cannot compile them."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from model.kernels.cpu import launching

pytest.importorskip("numba")

PROGRAM = """
import warnings
warnings.simplefilter("error")
from numba.core import compiler
compile_extra, compiled = compiler.compile_extra, []
compiler.compile_extra = lambda *words, **more: (compiled.append(1), compile_extra(*words, **more))[1]
from model.kernels.cpu import compiling
from model.kernels.cpu.rounding import Scheme
addresses = [compiling.kernel(name, Scheme(2, 16)) for name in ("round_rows", "product")]
assert all(addresses) and len({*addresses}) == 2
compiling.grid(True), compiling.grid(False)
print(len(compiled))
"""


def compile_in(folder: Path, program: str = PROGRAM, **environment: str) -> int:
    """What `program` prints in a new process with its cache in `folder`: how much it has compiled."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that was empty before."""
    folder = tmp_path_factory.mktemp("filled")
    assert compile_in(folder) > 0
    return folder


@pytest.fixture
def cache(filled: Path, tmp_path: Path) -> Path:
    """The same, for a test that spoils it."""
    return shutil.copytree(filled, tmp_path / "cache")


def test_each_kernel_is_compiled_once(cache: Path) -> None:
    kept = {path.name for path in cache.rglob("*.nbc")}
    assert len(kept) == 4, "two kernels, and a grid with and without threads"
    assert compile_in(cache) == 0
    changed = PROGRAM.replace(
        "from model.kernels.cpu.rounding",
        "compiling.version = lambda: 7\n" + "from model.kernels.cpu.rounding",
    )
    assert compile_in(cache, changed) > 0, "another version of the kernels' code"


ONE_FORMAT = """
import sys, torch
from model.kernels.cpu import products
from model.quant.spec import QuantSpec
from tests.model.kernels.cpu.rounded_reference import multiply, random_matrix
spec = QuantSpec(int(BITS), 64)
matrix, x = random_matrix(spec, (16, 64)), torch.ones(1, 64)
y = products.multiply(x, products.PackedMatrix(spec, matrix.shape, matrix.streams()))
torch.testing.assert_close(y, multiply(x, matrix), rtol=1e-4, atol=1e-4)
print(0)
"""


def test_processes_that_compile_at_the_same_time_do_not_mix_up_their_kernels(tmp_path: Path) -> None:
    """Each has seen an empty cache, and numbers its files as if it were alone."""
    programs = {bits: ONE_FORMAT.replace("BITS", bits) for bits in ("4", "2")}
    for bits, program in programs.items():
        compile_in(tmp_path / bits, program)
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "4", both)
    shutil.copytree(tmp_path / "2", both, dirs_exist_ok=True)  # its index is written last
    for file in (tmp_path / "4").rglob("*.nbc"):  # but its kernels first
        shutil.copy(file, both / file.relative_to(tmp_path / "4"))
    for program in programs.values():
        compile_in(both, program)


@pytest.mark.parametrize(("extension", "length"), [("nbi", 0), ("nbc", 100)])
def test_a_damaged_cache_is_written_again(cache: Path, extension: str, length: int) -> None:
    """As after a power failure."""
    for file in cache.rglob(f"*.{extension}"):
        os.truncate(file, length)
    assert compile_in(cache) > 0
    assert compile_in(cache) == 0, "it is whole again"


def test_a_cache_that_cannot_be_read_or_written_does_no_harm(cache: Path) -> None:
    for file in [*cache.rglob("*.nbi")]:
        file.unlink()
        file.mkdir()
    assert compile_in(cache) > 0


def reason(**environment: str) -> str:
    """What a new process says of its kernels."""
    program = "from model.kernels.cpu import launching as l; print(l.unsupported() or l.compile_grids())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return (done.stdout + done.stderr).splitlines()[-1]


def test_what_keeps_numba_from_compiling_is_named() -> None:
    assert "NUMBA_DISABLE_JIT is set" in (said := reason(NUMBA_DISABLE_JIT="1")), said
    assert reason() == "None"


@pytest.mark.skipif(find_spec("tbb") is not None, reason="the library is there")
def test_a_threading_layer_that_is_not_there_is_named() -> None:
    said = reason(NUMBA_THREADING_LAYER="tbb", NUMBA_NUM_THREADS="2")
    assert "ModelError" in said and "NUMBA_THREADING_LAYER is tbb" in said, said


def test_another_threading_layer() -> None:
    assert reason(NUMBA_THREADING_LAYER="workqueue") == "None"


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


THREADS = """
from model.kernels.cpu import compiling
code = ["".join(compiling.grid(parallel).inspect_llvm().values()) for parallel in (True, False)]
print(int(["numba_parallel_for" in text for text in code] == [True, False]))
"""


def test_several_threads_compute(tmp_path: Path) -> None:
    """In a new cache: numba shows the code of what it has just compiled alone."""
    assert compile_in(tmp_path, THREADS) == 1


def test_starting_threads_leaves_pytorchs_number() -> None:
    """Otherwise an engine would change the bits of float32 products of the program around it."""
    code = (
        "import torch; from model.kernels.cpu import launching; "
        "launching.compile_grids(); print(torch.get_num_threads())"
    )
    words = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | words, capture_output=True, text=True)
    assert run.stdout == "1\n", run.stderr
