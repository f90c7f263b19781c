"""Who may import whom: dev -> tools -> runtime -> model, tokenizer, never in a circle.

Also what an import brings along, and how long files are."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "tokenizer", "runtime", "tools", "dev")

OURS = {
    "model": {"model"},
    "tokenizer": {"tokenizer"},
    "runtime": {"runtime", "model", "tokenizer"},
    "tools": {"tools", "runtime", "model", "tokenizer"},
    "dev": {"dev", "tools", "runtime", "model", "tokenizer"},
}
OTHERS = {
    "model": {"torch", "safetensors", "numpy", "hqq"},
    "tokenizer": {"sentencepiece", "numpy", "jinja2"},
    "runtime": {"torch", "safetensors", "numpy", "tqdm"},
    "tools": {"torch", "safetensors", "numpy", "sentencepiece", "hqq", "tqdm", "matplotlib"},
    "dev": {
        "torch", "numpy", "hqq", "sentencepiece", "matplotlib", "transformers", "accelerate",
        "llama_cpp", "gguf", "triton",
    },
}  # fmt: skip
EXTRAS = {  # what the files of a folder may import besides; the first folder counts
    "model/kernels/cpu/": {"numba", "llvmlite"},
    "model/kernels/": {"triton"},
    "runtime/hub/": {"huggingface_hub", "filelock"},
    "runtime/serve/": {"starlette", "uvicorn", "h11", "pydantic", "prometheus_client"},
    "runtime/guidance.py": {"llguidance"},
    "tools/quantize/sources/": {"gguf"},
}


def imported(source: str, path: str) -> Iterator[str]:
    """Top-level names of all that a file imports, inside functions and by `import_module("...")` too.

    >>> sorted(imported("import os.path\\nfrom . import x\\nfrom torch import nn", "model/moe.py"))
    ['model', 'os', 'torch']
    """
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield path.split("/")[0] if node.level else str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            yield from (str(a.value).split(".")[0] for a in node.args if isinstance(a, ast.Constant))


def violations(source: str, path: str) -> list[str]:
    """What the file at `path`, relative to the root, imports and may not."""
    package = path.split("/")[0]
    extras = next((extras for folder, extras in EXTRAS.items() if path.startswith(folder)), set())
    allowed = OURS[package] | OTHERS[package] | extras | sys.stdlib_module_names
    return [f"{path} imports {name}" for name in imported(source, path) if name not in allowed]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [v for f in files for v in violations(f.read_text("utf-8"), f.relative_to(ROOT).as_posix())]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("model/moe.py", "from runtime.engine import Engine"),
        ("model/moe.py", "def late():\n    import tokenizer"),
        ("model/quant/packing.py", "import triton"),
        ("model/quant/backends/lanes.py", "import numba"),
        ("model/kernels/matrices.py", "import numba"),
        ("model/kernels/cpu/products.py", "import triton"),
        ("model/checkpoint/load.py", "from transformers import AutoConfig"),
        ("tokenizer/chat.py", "import torch.nn"),
        ("tokenizer/chat.py", "from model import config"),
        ("runtime/engine.py", "import tools.bench"),
        ("runtime/engine.py", "import accelerate"),
        ("runtime/engine.py", "from huggingface_hub import HfApi"),
        ("runtime/engine.py", "import starlette"),
        ("runtime/session.py", "import llguidance"),
        ("tools/quantize/job.py", "import gguf"),
        ("runtime/engine.py", "import importlib\nimportlib.import_module('tools.plan')"),
        ("runtime/trace.py", "import matplotlib.pyplot as plt"),
        ("tools/bench/command.py", "if True:\n    import transformers"),
        ("tools/bench/command.py", "import tests.model.reference"),
        ("tools/bench/command.py", "import dev.harness"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tools/plan.py", "import runtime, model.config, tokenizer, tools.units"),
        ("dev/harness/child.py", "import tools.quantize, runtime, model.config, tokenizer, transformers"),
        ("runtime/engine.py", "import json\nfrom model import mixtral\nfrom tokenizer import Tokenizer"),
        ("model/kernels/gpu.py", "import triton.language as tl\nfrom .. import moe"),
    ],
)
def test_an_allowed_import_is_left_alone(path: str, source: str) -> None:
    assert violations(source, path) == []


def import_graph(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, set[str]]:
    """For each module of the packages under `root`, those of their modules that it imports. Imports under
    TYPE_CHECKING, inside functions and by `import_module("...")` count.

    A package's own module is its `__init__.py`. `from package import module` counts as an import of the
    module alone. Python runs `__init__.py` first, but if that counted, no package could import from itself.
    """
    files = {module_name(f, root): f for package in packages for f in (root / package).rglob("*.py")}
    return {
        name: {nearest(target, files) for target in targets(f.read_text("utf-8"), name, f.stem)} - {"", name}
        for name, f in files.items()
    }


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def targets(source: str, name: str, stem: str) -> Iterator[str]:
    """Dotted names of all that the module `name` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - (stem == "__init__")
            base = name.split(".")[: -up or None] if node.level else []
            yield from (
                ".".join([*base, *([node.module] if node.module else []), a.name]) for a in node.names
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))


def nearest(target: str, files: dict[str, Path]) -> str:
    """The module that a dotted name is, or that defines what it names; empty if it is not ours."""
    while target and target not in files:
        target = target.rpartition(".")[0]
    return target


def circles(graph: dict[str, set[str]]) -> set[str]:
    """For each module in a circle of imports, a shortest circle through it, as a path from its first name."""
    found = set()
    for start in graph:
        paths, seen = [[start]], set[str]()
        for path in paths:  # which grows: breadth first
            for target in sorted(graph[path[-1]] - seen):
                seen.add(target)
                paths.append([*path, target])
        if closed := next((path for path in paths[1:] if path[-1] == start), None):
            first = closed.index(min(closed))
            found.add(" -> ".join([*closed[first:-1], *closed[: first + 1]]))
    return found


def test_no_circle_of_imports() -> None:
    assert circles(import_graph(ROOT)) == set()


def test_a_circle_is_found_however_it_hides(tmp_path: Path) -> None:
    sources = {
        "__init__": "from p.engine import Engine",  # for outsiders: the modules below do not import p
        "engine": "from p.session import Session\nfrom p.options import parse",
        "session": "if TYPE_CHECKING:\n    from p.engine import Engine",
        "options": "def late():\n    import p.room.plan",
        "room/__init__": "",
        "room/plan": "from .. import units\nfrom p.room import cache",
        "room/cache": "import_module('p.options')",
        "units": "import os.path",
        "errors": "from p import Engine",
    }
    (tmp_path / "p/room").mkdir(parents=True)
    for name, source in sources.items():
        (tmp_path / f"p/{name}.py").write_text(source)
    assert circles(import_graph(tmp_path, ("p",))) == {
        "p.engine -> p.session -> p.engine",
        "p.options -> p.room.plan -> p.room.cache -> p.options",
    }
    (tmp_path / "p/units.py").write_text("import p")
    assert "p -> p.engine -> p.options -> p.room.plan -> p.units -> p" in circles(
        import_graph(tmp_path, ("p",))
    )


def test_no_file_is_long() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    long = {f.relative_to(ROOT).as_posix() for f in files if len(f.read_text("utf-8").splitlines()) > 330}
    assert long == set()


def test_quantize_is_spelled_one_way() -> None:
    folders = [ROOT / name for name in (*PACKAGES, "tests", "docs")]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in (".py", ".md")]
    other = "quanti" + "s"
    assert [
        str(f) for f in (*files, *ROOT.glob("*.*")) if f.is_file() and other in f.read_text("utf-8").lower()
    ] == []


ABSENT = "transformers accelerate hqq triton matplotlib numba gguf llguidance"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from runtime import Engine, EngineOptions, SamplingParams", ABSENT + " tools"),
        ("import runtime.generate", ABSENT + " tools"),
        ("import model.mixtral, model.checkpoint", ABSENT + " runtime tokenizer tools"),
        ("from tokenizer import Tokenizer", ABSENT + " torch runtime model tools"),
    ],
)
def test_an_import_brings_nothing_unasked(statement: str, absent: str) -> None:
    program = f"import sys\n{statement}\nprint([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_importing_changes_no_setting() -> None:
    """A program that embeds the runtime keeps its own threads, dtype, gradients, seed and signal handlers."""
    program = """
import signal, torch
def settings():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGPIPE)]
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.initial_seed(), handlers)
before = settings()
from runtime import Engine
assert settings() == before, (before, settings())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "Generator",
}


def made_anywhere(source: str, path: str) -> list[str]:
    """Calls that make a tensor without saying where: `torch.set_default_device` would decide for them."""
    return [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source, path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
        and not any(keyword.arg == "device" for keyword in node.keywords)
        and not (node.func.attr == "Generator" and node.args)
    ]


@pytest.mark.parametrize("package", ["model", "runtime"])
def test_every_tensor_is_made_on_a_named_device(package: str) -> None:
    assert made_anywhere("torch.empty(3)", "x.py") and not made_anywhere("torch.empty(3, device=d)", "x.py")
    files = sorted((ROOT / package).rglob("*.py"))
    assert [
        m for f in files for m in made_anywhere(f.read_text("utf-8"), f.relative_to(ROOT).as_posix())
    ] == []
