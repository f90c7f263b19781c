"""The notebook in examples/, executed with the demo model on a CPU, and what its file may hold."""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "examples" / "colab.ipynb"

Cell = Any  # nbformat's nodes have no types
Run = Callable[..., dict[str, str]]


def cells() -> dict[str, Cell]:
    return {cell.id: cell for cell in nbformat.read(PATH, as_version=4).cells}


def code(text: str) -> Cell:
    return nbformat.v4.new_code_cell(text)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Executes cells in an empty folder, and returns what each says, by its id. Figures are `<image/png>`."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    work = tmp_path / "work"
    work.mkdir()

    def run(*cells: Cell) -> dict[str, str]:
        book = nbformat.v4.new_notebook(cells=list(cells))
        client = NotebookClient(
            book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        )
        client.execute()
        return {cell.id: "".join(map(said, cell.get("outputs", []))) for cell in cells}

    return run


def said(output: Any) -> str:
    if output.output_type == "display_data" and "image/png" in output.data:
        return "<image/png>"
    assert output.output_type == "stream", output  # an error raises before
    return str(output.text)


def test_it_runs(run: Run, tmp_path: Path) -> None:
    given = cells()
    settings = given["parameters"]
    settings.source = settings.source.replace("VRAM = None", 'VRAM = "15GiB"')
    settings.source = settings.source.replace("\nRAM = None", '\nRAM = "11GiB"')
    assert settings.source.count("GiB") == cells()["parameters"].source.count("GiB") + 2
    out = run(*given.values())

    assert "is installed" in out["install"]
    assert "host memory: " in out["machine"] and "disk: " in out["machine"]

    table, ours = out["plan"].split("This machine:")
    assert re.search(r"^ +8GiB +15GiB +24GiB\s*$", table, re.MULTILINE)
    assert re.search(r"^slots per layer +2 in ", table, re.MULTILINE) and "a miss takes" in table
    assert re.search(r"^15GiB +GiB +bytes\s*$", ours, re.MULTILINE) and "slots per layer" in ours
    assert (
        re.search(r"^berths in host memory +\d+ of 256\s*$", ours, re.MULTILINE)
        and "in float16 on cuda" in ours
    )

    assert "native, 9 files, attention 4, experts 2, head 8" in out["quantize"]
    assert (tmp_path / "work/notebook/demo-quantized/quantization.json").exists()

    before, text = out["generate"].split("of host memory", 1)
    text, stats = text.split("first token")
    assert "slots: 3 in each of 8 layers" in before and len(text.split()) > 20
    assert re.search(r"decode 99 tokens.*hit ratio 0\.[1-9]", stats, re.DOTALL)

    assert out["trace"].count("<image/png>") == (3 if find_spec("matplotlib") else 0)
    assert len(re.findall(r"^> .+\?\n\s*\S", out["chat"], re.MULTILINE)) == 2
    turns = re.findall(r"the conversation has (\d+) tokens", out["chat"])
    assert 48 < int(turns[0]) < int(turns[1]) - 48 and "tokens and " in out["chat"]
    assert not [name for name, text in out.items() if "error:" in text or "Traceback" in text]


def test_without_matplotlib(run: Run) -> None:
    gone = code('import sys\nsys.modules["matplotlib"] = None\ntrace = "missing.jsonl"')
    given = cells()
    out = run(given["parameters"], given["install"], gone, given["trace"])
    assert out["trace"].startswith("matplotlib would draw three figures here")
    assert "error: missing.jsonl: " in out["trace"]


NOT_INSTALLED = """
from importlib import metadata

def version(name):
    if name == "mixtral-runtime":
        raise metadata.PackageNotFoundError(name)
    return "2.11.0+cu128"

metadata.version = version
get_ipython().register_magic_function(lambda line: print("pip", line), magic_name="pip")
REPOSITORY = None
"""


def test_pip_installs_a_checkout_and_keeps_pytorch(run: Run, tmp_path: Path) -> None:
    checkout = tmp_path / "work" / "mixtral-runtime"
    (checkout / "runtime").mkdir(parents=True)
    (checkout / "runtime" / "engine.py").touch()
    out = run(code(NOT_INSTALLED), cells()["install"])
    assert out["install"] == f'pip install -q -e "{checkout}[plot]" torch==2.11.0+cu128\n'


def test_without_a_checkout_it_says_what_to_do(run: Run) -> None:
    with pytest.raises(
        CellExecutionError, match="no checkout is here: set REPOSITORY above, or bring its folder\n"
    ):
        run(code(NOT_INSTALLED), cells()["install"])


def test_the_file_holds_no_outputs_and_no_machine() -> None:
    text = PATH.read_text("utf-8")
    book = json.loads(text)
    nbformat.validate(book)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in book["cells"])
    ran = [cell for cell in book["cells"] if cell.get("outputs") or cell.get("execution_count")]
    assert ran == [] and not re.search(r"/(home|root|content|Users|tmp|usr)/|[A-Z]:\\\\", text)
    assert len(book["cells"]) <= 20 and max(len(cell["source"]) for cell in book["cells"]) <= 25
