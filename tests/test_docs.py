"""README, docs and the notebook against the tree: links, paths, commands and their flags, line counts,
programs."""

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NOTEBOOK = ROOT / "examples" / "colab.ipynb"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), NOTEBOOK]
ROOMS = ("model", "tokenizer", "runtime", "tools", "dev", "tests", "docs", "examples", ".ci")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\b(?:python3?|torchrun [^|&#\n]*?) -m ([\w.]+)([^|&#]*)")


def each_page(test: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(test)


@cache
def markdown(page: Path) -> str:
    """A page's text. A notebook's shell commands become blocks, and the rest of its code is left out."""
    if page.suffix == ".md":
        return page.read_text("utf-8")
    parts = []
    for cell in json.loads(page.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            found = re.findall(r"^ *(?:\w+ = )?!(.+)", text.replace("\\\n", " "), re.MULTILINE)
            text = "```sh\n" + "\n".join(found) + "\n```"
        parts.append(text)
    return "\n\n".join(parts)


def prose(page: Path) -> str:
    return FENCE.sub("", markdown(page))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings.

    >>> "the-afternoon" in anchors(README)
    True
    """
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@each_page
def test_paths(page: Path) -> None:
    """Every file or folder of ours that a page names is there."""
    named = [words for words in INLINE.findall(prose(page)) if re.fullmatch(r"[\w.]+/[\w./]*", words)]
    ours = [path for path in named if path.split("/")[0] in ROOMS]
    assert [path for path in ours if not (ROOT / path).exists()] == []


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every `python -m` and `torchrun -m` of a page, in blocks and between words, and what follows each.

    >>> list(commands("Run `python -m tools.plan --vram\\n8GiB` now."))
    [('tools.plan', ['--vram', '8GiB'])]
    >>> list(commands("`torchrun --nproc-per-node 2 -m runtime.serve --distributed`"))
    [('runtime.serve', ['--distributed'])]
    """
    spans = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    spans += [" ".join(span.split()) for span in INLINE.findall(FENCE.sub("", text))]
    for span in spans:
        for module, rest in COMMAND.findall(span):
            yield module, shlex.split(rest.replace("[", " ").replace("]", " "))


PROBE = """
import argparse, json, runpy, sys

def options(parser):
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options(sub)

def record(parser, *_):
    found[module] = list(options(parser))
    raise SystemExit

found = {}
argparse.ArgumentParser.parse_args = record
for module in sys.argv[1:]:
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit:
        pass
print(json.dumps(found))
"""


@cache
def flags() -> dict[str, set[str]]:
    """All flags of every command that the pages name, its subcommands' included.

    Each command starts as it does from the shell, and stops where it would parse its arguments.
    """
    named = {module for page in PAGES for module, _ in commands(markdown(page))}
    ours = sorted(module for module in named if module.split(".")[0] in ROOMS and find_spec(module))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *ours], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {module: set(options) for module, options in json.loads(done.stdout).items()}


@each_page
def test_commands(page: Path) -> None:
    """Every module that a page runs is there, and knows the flags that it is given."""
    unknown = []
    for module, words in commands(markdown(page)):
        if find_spec(module) is None:
            unknown.append(module)
        elif module.split(".")[0] in ROOMS:
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            unknown += [f"{module} {flag}" for flag in sorted(given - flags()[module])]
    assert unknown == []


@each_page
def test_flags_in_tables(page: Path) -> None:
    """A flag that begins a table's row is one of the commands' that the page is about."""
    rows = re.findall(r"^\| (`--[^|]+) \|", prose(page), re.MULTILINE)
    shown = {flag for row in rows for flag in re.findall(r"--[\w-]+", row)}
    assert shown <= flags()["runtime.generate"] | flags()["runtime.serve"]


def test_the_notebooks_commands_are_found() -> None:
    """Each `!` line, and a line that goes on in the next one."""
    found = {module: words for module, words in commands(markdown(NOTEBOOK))}
    assert set(found) == {"tools.plan", "tools.quantize", "runtime.generate", "tools.trace"}
    assert {"--trace", "--seed"} <= set(found["runtime.generate"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def programs() -> list[str]:
    """The Python programs of all pages, with the demo in place of a checkpoint of the reader's."""
    found = [code for page in PAGES for kind, code in FENCE.findall(markdown(page)) if kind == "python"]
    return [
        code.replace('"path/to/checkpoint"', "None").replace("context=8192", 'device="cpu", context=512')
        for code in found
    ]


@pytest.mark.parametrize("number", range(len(programs())))
def test_programs_run(
    number: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for the files that they write
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in alone.items():  # for those that torchrun should start
        monkeypatch.setenv(name, value)
    seeded = lambda params, device: torch.Generator(device).manual_seed(1)  # noqa: E731
    monkeypatch.setattr("runtime.answer.new_generator", seeded)  # always the same text
    exec(compile(programs()[number], "page", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_the_reading_order_has_the_files_lines() -> None:
    rows = re.findall(r"^\| \[`([\w/.]+)`\]\(\1\) \| (\d+) \|", README.read_text("utf-8"), re.MULTILINE)
    assert 10 <= len(rows) <= 16
    lines = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path, _ in rows}
    assert {path: lines[path] for path, n in rows if abs(int(n) - lines[path]) > 0.15 * lines[path]} == {}


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 130
