"""Files and folders of another program that have the names of our packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
USE = "from runtime import SamplingParams\nprint(SamplingParams().top_k)\n"
# What setuptools installs for `pip install -e`: a finder that Python asks after it has looked along its path.
EDITABLE = f"""
import importlib.machinery, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if path else importlib.machinery.PathFinder.find_spec(name, [{str(ROOT)!r}])
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder) + 1, Finder)
"""


def python(folder: Path, *words: str, installed: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    """Python in `folder`, which it searches before the place where ours is installed."""
    environment = {**os.environ, "PYTHONPATH": installed}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def line(theirs: Path, name: str) -> str:
    ours = str(ROOT / name / "__init__.py")
    return (
        f"`import {name}` finds {str(theirs)!r} and not mixtral-runtime's {ours!r}; "
        "rename the first, or run from another folder"
    )


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_a_file_beside_the_script(tmp_path: Path, name: str) -> None:
    theirs, script = tmp_path / f"{name}.py", tmp_path / "app.py"
    theirs.write_text("raise SystemExit('theirs has run')")
    script.write_text(
        f"try:\n    import runtime\nexcept ImportError as error:\n    print(error.name, error)\n{USE}"
    )
    done = python(tmp_path.parent, str(script))
    assert done.stdout == f"{name} {line(theirs, name)}\n"
    assert done.stderr.endswith(f"ImportError: {line(theirs, name)}\n")


def test_the_script_itself(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(USE)
    done = python(tmp_path.parent, str(tmp_path / "model.py"))
    assert done.returncode == 1
    assert done.stderr.endswith(f"ImportError: {line(tmp_path / 'model.py', 'model')}\n")


def test_a_module_that_has_been_imported(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(USE)
    done = python(tmp_path, "-c", "import model")
    assert done.stderr.endswith(f"ImportError: {line(tmp_path / 'model.py', 'model')}\n")
    made = "import sys, types\nsys.modules['model'] = types.ModuleType('model')\n"
    done = python(tmp_path.parent, "-c", made + USE)
    assert "ImportError: `import model` finds 'a module model without a file'" in done.stderr


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("runtime.generate", "model"),
        ("runtime.generate", "tokenizer"),
        ("tools.quantize", "model"),
        ("tools.plan", "tokenizer"),
        ("tools.bench", "runtime"),
    ],
)
def test_a_file_where_a_command_starts(tmp_path: Path, command: str, name: str) -> None:
    theirs = tmp_path / f"{name}.py"
    theirs.write_text("raise SystemExit('theirs has run')")
    done = python(tmp_path, "-m", command, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line(theirs, name)}\n")


def test_another_program_is_told_by_an_exception(tmp_path: Path) -> None:
    """Its own command must not end because it imports ours."""
    (tmp_path / "model.py").touch()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text(
        "try:\n    import runtime\nexcept ImportError:\n    print('goes on')\n"
    )
    (tmp_path / "theirs" / "__main__.py").touch()
    assert python(tmp_path, "-m", "theirs").stdout == "goes on\n"


def test_a_folder_hides_an_editable_installation(tmp_path: Path) -> None:
    """A folder of weights called `model` is a package to Python where no other is on its path."""
    (tmp_path / "model").mkdir()
    assert python(tmp_path, "-c", USE).stdout == "0\n"
    done = python(tmp_path, "-c", EDITABLE + USE, installed="")
    assert done.stderr.endswith(f"ImportError: {line(tmp_path / 'model', 'model')}\n")


def test_our_own_are_found_through_a_link(tmp_path: Path) -> None:
    for name in ("runtime", "model", "tokenizer"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert python(tmp_path, "-c", USE).stdout == "0\n"
    (tmp_path / "runtime").unlink()
    assert python(tmp_path, "-c", USE).stdout == "0\n"
