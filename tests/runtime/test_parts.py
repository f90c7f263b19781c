"""Parts of checkpoints, as engines load them, have the bits of the whole, wherever experts are."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from model.mixtral import Mixtral
from model.part import Part
from tests.parts import compare, spoiled
from tests.quantized import quantizer
from tests.runtime.parts import load_part

LAYERS = 4
CASES: list[tuple[str, int, dict[str, Any]]] = [  # formats, most parts, options
    ("", 2, {"dtype": "bfloat16"}),
    ("", 2, {"dtype": "float32", "slots": 2}),
    ("4 3 8", LAYERS, {"dtype": "bfloat16"}),
    ("4 3 8", 2, {"dtype": "bfloat16", "slots": 2, "few_berths": True}),
    ("4 3 8", 2, {"dtype": "float32", "map": False}),
    ("3 2 16", 2, {"dtype": "float16", "slots": 3, "lookahead": 2, "kv": 8}),
    ("16 16 16", 2, {"dtype": "bfloat16", "slots": 2, "few_berths": True}),
]


@pytest.fixture(scope="module")
def folder(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the checkpoint with attention, experts and head in these formats."""
    source = variant(hidden=128, head_dim=32, ffn=128, layers=LAYERS, context=64)
    make = quantizer(source, tmp_path_factory.mktemp("quantized"))
    return lambda formats: make(*formats.split()) if formats else source


@pytest.mark.parametrize(("formats", "most", "options"), CASES)
def test_all_splits(
    formats: str, most: int, options: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each part has files of its own, in which all other layers are spoiled."""
    with ExitStack() as after:

        def load(part: Part | None = None) -> Mixtral:
            whole = folder(formats)
            runner = load_part(spoiled(whole, tmp_path, part) if part else whole, part, **options)
            after.callback(runner.close)
            assert (runner.cache is None) == ("slots" not in options)
            assert (runner.files is not None) == (bool(formats) and options.get("map", True))
            return runner.model

        whole = load()
        with torch.inference_mode():
            compare(load, whole, options.get("kv", 16), most)
