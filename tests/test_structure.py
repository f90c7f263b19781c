"""Who may import whom: dev -> tools -> runtime -> model, tokenizer; and what an import brings along."""

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
    "dev": {"torch", "numpy", "hqq", "sentencepiece", "matplotlib", "transformers", "accelerate"},
}
TRITON = "model/kernels/"


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
    allowed = OURS[package] | OTHERS[package] | sys.stdlib_module_names
    if path.startswith(TRITON):
        allowed = allowed | {"triton"}
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
        ("model/checkpoint/load.py", "from transformers import AutoConfig"),
        ("tokenizer/chat.py", "import torch.nn"),
        ("tokenizer/chat.py", "from model import config"),
        ("runtime/engine.py", "import tools.bench"),
        ("runtime/engine.py", "import accelerate"),
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


ABSENT = "transformers accelerate hqq triton matplotlib"


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
