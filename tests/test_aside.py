"""Tests that run in a second process are reported as if they had run in the first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import aside

TESTS = """
import os, sys, pytest

THERE = "--tell" in sys.argv

@pytest.mark.parametrize("n", [1, 2])
def test_fails(n):
    print("printed before")
    assert n == 1, "because it does"

def test_is_skipped():
    pytest.skip("for a reason")

@pytest.fixture
def broken():
    raise KeyError("in a fixture")

def test_has_an_error(broken): pass

def test_runs_there():
    assert THERE

@pytest.mark.MARKER
def test_of_a_gpu_runs_here():
    assert not THERE

def test_ends_its_process():
    if THERE:
        os._exit(7)

def test_after_the_end():
    assert not THERE
"""
CONFTEST = """
import os
from tests.aside import Aside, belongs

def pytest_collection_modifyitems(config, items):
    if not config.getoption("--tell", None):
        items.sort(key=belongs)
        config.pluginmanager.register(Aside(list(filter(belongs, items)), config.option.markexpr))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a test that runs where it is, and others that run in the second process."""
    (tmp_path / "tests/tools").mkdir(parents=True)
    for name in ("aside.py", "telling.py"):
        shutil.copy(Path(aside.__file__).with_name(name), tmp_path / "tests")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs one\n")
    (tmp_path / "tests/tools/test_there.py").write_text(
        TESTS.replace("MARKER", "gpu")
    )  # no test of this file is one
    (tmp_path / "test_here.py").write_text("def test_here(): pass\n")
    return tmp_path


def test_every_end_of_a_test_is_told(project: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(project / "tmp")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--import-mode=importlib"],
        cwd=project, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "1 failed, 6 passed, 1 skipped, 1 error" in done.stdout, done.stdout + done.stderr
    for words in ("printed before", "because it does", "for a reason", "in a fixture", "ended early"):
        assert words in done.stdout
    assert done.returncode == 1 and not list((project / "tmp").iterdir())
