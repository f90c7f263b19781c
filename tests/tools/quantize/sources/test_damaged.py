"""Damaged headers and indexes of hqq and mixtral-offloading: refused in one line, or read whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from dev.harness.mutate.header import File, damaged
from dev.harness.mutate.json_tree import as_text
from dev.harness.parts.index import changed
from model.checkpoint import save_hf
from model.errors import ModelError
from tests.model.checkpoint.conftest import random_model
from tests.tools.quantize.sources.offloading_writer import write_offloading
from tests.tools.quantize.sources.test_hqq import SHAPE, save_by_hqq
from tools.quantize.sources.opening import open_path
from tools.quantize.sources.stored import PartsSource

CASES = 200
INDEX = "model.safetensors.index.json"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["hqq", "offloading"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("damaged")
    shape = SHAPE if request.param == "hqq" else replace(SHAPE, ffn=256)
    save_hf(random_model(shape), base / "hf", torch.float32)
    if request.param == "hqq":
        save_by_hqq(base / "hf", base / "good")
    else:
        write_offloading(base / "hf", base / "good", (4, 64, 64), (2, 16, 32))
    return base / "good"


def use(folder: Path) -> dict[str, torch.Tensor]:
    """Read every parameter. Its bytes have to be within the files."""
    source = open_path(folder)
    assert isinstance(source, PartsSource)
    for name in source.parts:
        assert all(0 <= start < stop <= path.stat().st_size for path, start, stop in source.extents(name))
    return {name: source.read(name, CPU) for name in source.parts}


def one_line(error: ModelError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


def test_headers(good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "copy"))
    files = {path.name: File.parse(path.read_bytes()) for path in good.glob("*.safetensors")}
    shapes = {name: weight.shape for name, weight in use(folder).items()}
    refused = 0
    for seed in range(CASES):
        chance = Random(seed)
        name = chance.choice(sorted(files))
        (folder / name).write_bytes(damaged(files[name], chance))
        try:
            assert {name: weight.shape for name, weight in use(folder).items()} == shapes
        except ModelError as error:
            assert one_line(error), seed
            refused += 1
        shutil.copyfile(good / name, folder / name)
    assert refused > CASES / 2


def test_indexes(good: Path, tmp_path: Path) -> None:
    """An index only says where tensors are. A damaged one changes no weight."""
    folder = Path(shutil.copytree(good, tmp_path / "copy"))
    index, known = json.loads((good / INDEX).read_text()), use(folder)
    refused = 0
    for seed in range(CASES):
        chance = Random(seed)
        (folder / INDEX).write_bytes(as_text(changed(index, chance), chance))
        try:
            weights = use(folder)
        except ModelError as error:
            assert one_line(error), seed
            refused += 1
        else:
            assert all(torch.equal(weight, known[name]) for name, weight in weights.items()), seed
    assert CASES / 4 < refused < CASES
