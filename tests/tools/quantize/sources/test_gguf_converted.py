"""GGUF files through `tools.quantize` to the engine, against Transformers on the dequantized weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralForCausalLM

from model.checkpoint import save_hf
from model.checkpoint.safetensors import DTYPES, read_header
from model.config import ModelConfig, to_hf
from runtime import Engine, EngineOptions, LoadError, SamplingParams
from runtime.engine import DEMO
from tests.model.checkpoint.conftest import random_model, read_all
from tests.tools.quantize.sources.gguf_vocabulary import keys_of
from tests.tools.quantize.sources.gguf_writer import (
    Kinds,
    facts_of,
    gguf_tensors,
    of_one_type,
    packed,
    tokens_of,
    write_gguf,
)
from tests.tools.quantize.sources.test_gguf import SHAPE, mixed
from tests.tools.quantize.sources.test_gguf_tokenizer import PLAIN
from tools.quantize import command as quantize
from tools.quantize.sources.gguf_types import NEEDED, kinds

CONFIG = replace(SHAPE, vocab=272)
AT_16 = ["--attention", "16", "--experts", "16", "--head", "16", "--threads", "1", "--quiet"]
IDS = [1, 259, 100, 7, 263, 2, 50]
TYPES = {"F16": Type.F16, "BF16": Type.BF16, "F32": Type.F32, "Q8_0": Type.Q8_0, "Q4_0": Type.Q4_0}
KINDS: dict[str, Kinds] = {name: of_one_type(kind) for name, kind in TYPES.items()} | {"mixed": mixed}
FACTS = facts_of(CONFIG) | tokens_of(PLAIN)
SPELLED = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "w2": "down",
           "embed": "embd"}  # fmt: skip


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights that float16 holds."""
    folder = tmp_path_factory.mktemp("gguf") / "hf"
    save_hf(random_model(CONFIG), folder, torch.float32)
    return {name: tensor.half().float() for name, tensor in read_all(folder).items()}


def name_in_gguf(name: str) -> str:
    """Enough of a tensor's name in GGUF to tell its type."""
    if "norm" in name or ".gate." in name:
        return "norm"
    return next(
        (theirs for ours, theirs in SPELLED.items() if ours in name), "embd" if "embed" in name else ""
    )


def rounded(hf: Mapping[str, Tensor], kinds: Kinds, dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights after packing, in the output's dtype, and in that of its gates. Rows are packed one by one,
    so their order does not matter."""
    made = {}
    for name, tensor in hf.items():
        kind = kinds(name_in_gguf(name))
        weight = torch.from_numpy(dequantize(packed(tensor.numpy(), kind), kind).copy())
        made[name] = weight.to(DTYPES[dtypes["gate" if ".gate." in name else "others"]]).float()
    return made


def stored(folder: Path) -> dict[str, str]:
    """The dtype of gates, and that of all other tensors."""
    headers = [read_header(path) for path in folder.glob("*.safetensors")]
    found = {
        ("gate" if ".gate." in name else "others", entry.dtype)
        for header in headers
        for name, entry in header.tensors.items()
    }
    assert len(found) == 2
    return dict(found)


@pytest.mark.parametrize(("name", "experts"), [*((name, "merged") for name in KINDS), ("Q8_0", "split"),
                                               ("mixed", "fused")])  # fmt: skip
def test_logits(hf: Mapping[str, Tensor], tmp_path: Path, name: str, experts: str) -> None:
    config = replace(CONFIG, rope_factor=2.5) if experts == "split" else CONFIG
    facts = FACTS | facts_of(config)
    write_gguf(tmp_path / "x.gguf", gguf_tensors(config, hf, experts), KINDS[name], facts)
    out, peer = tmp_path / "out", tmp_path / "peer"
    assert quantize.main([str(tmp_path / "x.gguf"), str(out), *AT_16]) == 0
    peer.mkdir()
    dtypes = stored(out)
    assert dtypes["others"] == ("BF16" if name == "BF16" else "F16")
    save_file(rounded(hf, KINDS[name], dtypes), peer / "model.safetensors", {"format": "pt"})
    (peer / "config.json").write_text(json.dumps(to_hf(config, "float32")))
    theirs = MixtralForCausalLM.from_pretrained(peer, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    with Engine.load(out, EngineOptions(device="cpu", dtype="float32")) as engine:
        found = engine.logits(IDS)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_quantized_again(
    hf: Mapping[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole folder comes out, with a tokenizer, and the summary says that the source was lossy."""
    write_gguf(tmp_path / "x.gguf", gguf_tensors(CONFIG, hf, "merged"), mixed, FACTS)
    out = tmp_path / "out"
    formats = ["--attention", "4g32", "--experts", "8g32", "--head", "8", "--threads", "1", "--quiet"]
    assert quantize.main([str(tmp_path), str(out), *formats, "--verify"]) == 0
    printed = capsys.readouterr()
    assert "the source is lossy: GGUF (Q4_0, Q5_1, Q8_0); errors are against its weights" in printed.out
    assert "experts: 5.00 bits a weight before and 8." in printed.out and printed.err == ""
    assert json.loads((out / "quantization.json").read_text())["lossy"] == "GGUF (Q4_0, Q5_1, Q8_0)"
    assert {"tokenizer.model", "tokenizer_config.json"} < {path.name for path in out.iterdir()}
    with Engine.load(out, EngineOptions(device="cpu")) as engine:
        assert engine.tokenizer.encode("ab a") == [1, 261, 259, 260, 261, 259]


def test_the_demo_comes_back(tmp_path: Path) -> None:
    """A trained model, with its tokenizer: the same text as before, and the same logits to the bit."""
    config, kinds = ModelConfig.read(DEMO), of_one_type(Type.BF16)
    facts = facts_of(config) | keys_of(DEMO, config.vocab, "today")
    write_gguf(tmp_path / "x.gguf", gguf_tensors(config, read_all(DEMO), "split"), kinds, facts)
    assert quantize.main([str(tmp_path / "x.gguf"), str(tmp_path / "out"), *AT_16]) == 0
    texts, logits = [], []
    for folder in (DEMO, tmp_path / "out"):
        with Engine.load(folder, EngineOptions(device="cpu", dtype="float32")) as engine:
            greedy = SamplingParams(max_new_tokens=30, temperature=0)
            texts.append("".join(token.text for token in engine.generate("The little fox", greedy)))
            logits.append(engine.logits(engine.tokenizer.encode("Once upon a time")))
    assert texts[0] == texts[1] and len(texts[0]) > 20
    assert torch.equal(*logits)


def test_the_engine_says_how_to_convert_it(hf: Mapping[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, gguf_tensors(CONFIG, hf, "merged"), mixed, FACTS)
    for model in (path, tmp_path):
        with pytest.raises(
            LoadError, match=rf"GGUF.*; convert it with python -m tools\.quantize {model} OUT"
        ):
            Engine.load(model, EngineOptions(device="cpu"))


def test_a_tokenizer_of_another_kind(
    hf: Mapping[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is written, unless another is given."""
    path, out, good = tmp_path / "x.gguf", tmp_path / "out", tmp_path / "good.gguf"
    tensors = gguf_tensors(CONFIG, hf, "merged")
    write_gguf(good, tensors, mixed, FACTS)
    assert quantize.main([str(good), str(tmp_path / "good"), *AT_16]) == 0
    write_gguf(path, tensors, mixed, FACTS | {"tokenizer.ggml.model": "gpt2"})
    capsys.readouterr()
    assert quantize.main([str(path), str(out), *AT_16]) == 1
    line = f"error: {path}: its tokenizer is 'gpt2', and only sentencepiece's ('llama') can be read; give"
    assert capsys.readouterr().err.startswith(line) and not out.exists()
    assert quantize.main([str(path), str(out), *AT_16, "--tokenizer", str(tmp_path / "good")]) == 0
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


def test_without_the_package(
    hf: Mapping[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    write_gguf(tmp_path / "x.gguf", gguf_tensors(CONFIG, hf, "merged"), mixed, FACTS)
    monkeypatch.setitem(sys.modules, "gguf", None)
    kinds.cache_clear()
    assert quantize.main([str(tmp_path / "x.gguf"), str(tmp_path / "out"), *AT_16]) == 1
    said = capsys.readouterr().err
    assert said == f"error: GGUF needs the package gguf, which is not installed; pip install '{NEEDED}'\n"
    monkeypatch.undo()
    kinds.cache_clear()
