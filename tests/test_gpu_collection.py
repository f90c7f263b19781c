"""The commands for a GPU in docs/install.md find all that there is to check on one, and need only pytest of
the test extra."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import EXTRA

ROOT = Path(__file__).resolve().parent.parent
HIDE = f"""
import sys

class Fewer:
    finders = sys.meta_path[:]

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {sorted(EXTRA)}:
            return next((s for f in self.finders if (s := f.find_spec(name, path, target))), None)

sys.meta_path[:] = [Fewer()]
"""


def test_without_the_test_extra_every_gpu_test_is_collected(tmp_path: Path) -> None:
    (tmp_path / "hide.py").write_text(HIDE)
    commands = re.findall(r"-m pytest -m gpu (.+?) *#", (ROOT / "docs" / "install.md").read_text())
    folders = tuple(f"{folder}/" for command in commands for folder in command.split())
    assert len(commands) == 2
    # Of `tests` alone, as the commands do: doctests of a CPU's kernels cannot be collected without numba.
    words = ["tests", "-m", "gpu", "--collect-only", "-q", "-p", "hide", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    marked = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("*.py")
        if "mark.gpu" in file.read_text() and file != Path(__file__)
    }
    assert found == marked and len(marked) >= 8
    assert all(file.startswith(folders) for file in marked)


def test_nothing_that_tests_import_is_unknown_here() -> None:
    """Or a new package would fail the collection on such a machine alone."""
    declared = (ROOT / "pyproject.toml").read_text()
    for name in EXTRA - {"accelerate"}:  # which the comparison with accelerate asks for by itself
        assert f'"{name.replace("_", "-")}' in declared, name
