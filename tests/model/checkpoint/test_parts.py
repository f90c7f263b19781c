"""Parts of a checkpoint: the whole one's weights, whatever its spelling, and not a byte of other layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import Checkpoint, open_checkpoint, save_hf
from model.errors import ModelError
from model.mixtral import Mixtral
from model.part import Part
from tests.model.checkpoint.conftest import TINY, random_model
from tests.model.checkpoint.test_load import write_mistral
from tests.model.checkpoint.test_native import SMALL, write_native
from tests.model.test_merged import save
from tests.parts import compare, in_order, splits, spoiled

CONFIG = replace(TINY, layers=3)
NATIVE = replace(SMALL, layers=3)
SPELLINGS = ("HF", "HF, experts stacked", "Mistral", "tied")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint in that spelling. Where there are several files, they cut through layers."""
    spelling, out = request.param, tmp_path / "whole"
    if spelling in ("HF", "Mistral"):
        hf = tmp_path / "hf"
        save_hf(random_model(CONFIG), hf, torch.float32, max_shard_bytes=20_000)
        if spelling == "HF":
            return hf
        write_mistral(hf, out, shards=3)
        params = json.loads((out / "params.json").read_text())
        (out / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    else:
        save(out, CONFIG, tied=spelling == "tied", stacked=spelling != "tied")
    return out


def filled(checkpoint: Checkpoint) -> Mixtral:
    """The network of a checkpoint or of a part, in which a row that is not filled shows."""
    model = Mixtral(checkpoint.config, embeds=checkpoint.embeds, heads=checkpoint.heads)
    for weight in model.requires_grad_(False).parameters():
        weight.fill_(torch.nan)
    seen: list[int] = []
    checkpoint.load(model, seen.append)
    assert sum(seen) == checkpoint.bytes
    return model


@pytest.mark.parametrize("folder", SPELLINGS, indirect=True)
def test_all_splits_need_only_their_own_bytes(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tied = request.node.callspec.params["folder"] == "tied"

    def load(part: Part) -> Mixtral:
        checkpoint = open_checkpoint(spoiled(folder, tmp_path, part, tied))
        everything = filled(checkpoint)
        fine = all(weight.isfinite().all() for weight in everything.parameters())
        assert fine == (part == Part.whole(CONFIG)), "the others' bytes are no longer there"
        return filled(checkpoint.part(part))

    with torch.inference_mode():
        compare(load, filled(open_checkpoint(folder)))


@pytest.mark.parametrize("folder", ["HF"], indirect=True)
def test_what_a_part_says_of_itself(folder: Path, tmp_path: Path) -> None:
    for whole in (open_checkpoint(folder), open_checkpoint(write_native(tmp_path / "native", config=NATIVE))):
        for layers in splits(3):
            parts = [whole.part(part) for part in in_order(whole.config, layers)]
            assert sum(part.bytes for part in parts) == whole.bytes
            assert [part.config for part in parts] == [replace(whole.config, layers=n) for n in layers]
            assert all(part.formats == whole.formats and part.dtype == whole.dtype for part in parts)
            assert [part.embeds for part in parts] == [True] + [False] * (len(layers) - 1)
            assert [part.heads for part in parts] == [False] * (len(layers) - 1) + [True]
            assert all(part.files <= whole.files for part in parts)
        assert whole.part(Part.whole(whole.config)) == whole
    assert [part.mappable for part in parts] == [whole.mappable] * 3 == [torch.bfloat16] * 3
    assert parts[1].files == 1
    assert parts[0].description.startswith("native, 2 files, attention 4, experts 3g128, head 8, ")


@pytest.mark.parametrize("folder", ["HF"], indirect=True)
def test_messages_name_what_the_file_has(folder: Path) -> None:
    part = open_checkpoint(folder).part(Part(1, 2, embeds=False, heads=True))
    with pytest.raises(ModelError, match=r"'layers\.2.* is only in the model"):
        part.load(Mixtral(CONFIG, embeds=False))
    with pytest.raises(ModelError, match=r"'(norm|lm_head).weight' is only in the checkpoint"):
        part.load(Mixtral(part.config, embeds=False, heads=False))
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as cut:
            cut.truncate(file.stat().st_size - 8)
    with pytest.raises(ModelError, match=r"ended 8 bytes early, in tensor '(model\.layers\.[12]\.|lm_head)"):
        filled(part)
