"""Loading: every spelling, dtype and number of files gives the weights that an independent reader finds."""

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralForCausalLM

import model.checkpoint.load
from model.checkpoint import open_checkpoint, save_hf
from model.checkpoint.load import rotate_half_order
from model.errors import ModelError
from model.mixtral import Mixtral
from tests.leftovers import workers
from tests.model.checkpoint.conftest import TINY, random_model, read_all, read_index


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Mixtral:
    checkpoint = open_checkpoint(folder)
    ours = Mixtral(checkpoint.config, dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(float("nan"))  # a row that is not filled shows
    checkpoint.load(ours)
    return ours


def assert_same(ours: Mixtral, theirs: Mixtral) -> None:
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.fixture(params=[1, 100, 16 << 20], ids=["row by row", "few rows", "whole tensors"])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.checkpoint.load, "CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("spelling", ["HF", "HF, experts stacked"])
def test_logits_equal_transformers(reference: tuple[MixtralForCausalLM, Path, Path], spelling: str) -> None:
    theirs, per_expert, stacked = reference
    folder = per_expert if spelling == "HF" else stacked
    checkpoint = open_checkpoint(folder)
    shards = len(set(read_index(folder)["weight_map"].values()))
    assert shards > 2
    assert checkpoint.description == f"{spelling}, {shards} files, float32, {checkpoint.bytes / 1000:.1f} kB"
    ids = torch.randint(TINY.vocab, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (load(folder)(ids) - theirs(ids).logits).abs().max()
    assert difference < 1e-4


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """HF's q or k rows in Mistral's order, one row at a time: HF keeps the partner of row i at i + K/2."""
    half = head_dim // 2
    out = []
    for head in range(rows.shape[0] // head_dim):
        for i in range(half):
            out += [rows[head * head_dim + i], rows[head * head_dim + half + i]]
    return torch.stack(out)


def write_mistral(hf: Path, folder: Path, shards: int = 1) -> None:
    """The same weights as Mistral would have published them."""
    folder.mkdir()
    words = {
        "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn": "attention", "block_sparse_moe": "feed_forward",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
    }  # fmt: skip
    tensors = {}
    for name, tensor in read_all(hf).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, TINY.head_dim)
        for theirs, mistrals in words.items():
            name = name.replace(theirs, mistrals)
        tensors[name] = tensor
    names = sorted(tensors)
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = "consolidated" + (f"-{number + 1:05d}-of-{shards:05d}" if shards > 1 else "")
        save_file(part, folder / f"{file}.safetensors")
    params = {
        "dim": TINY.hidden, "n_layers": TINY.layers, "head_dim": TINY.head_dim, "hidden_dim": TINY.ffn,
        "n_heads": TINY.heads, "n_kv_heads": TINY.kv_heads, "norm_eps": 1e-5, "vocab_size": TINY.vocab,
        "rope_theta": 1e4, "max_seq_len": 64, "moe": {"num_experts": TINY.experts, "num_experts_per_tok": 2},
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mistral(hf: Path, tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    write_mistral(hf, tmp_path / "mistral", shards)
    assert open_checkpoint(tmp_path / "mistral").description.startswith("Mistral, ")
    assert_same(load(tmp_path / "mistral", dtype), load(hf, dtype))


def test_rotate_half_order_inverts_the_slow_reference() -> None:
    rows = torch.arange(3 * 8 * 5.0).view(24, 5)
    assert torch.equal(rotate_half_order(interleaved(rows, 8), 8), rows)


def test_spelling_comes_from_the_tensors_not_from_file_names(hf: Path, tmp_path: Path) -> None:
    write_mistral(hf, tmp_path / "mistral")
    shutil.copy(tmp_path / "mistral" / "consolidated.safetensors", hf / "model.safetensors")
    assert open_checkpoint(hf).description.startswith("Mistral, ")


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    original = random_model()
    save_hf(original, tmp_path, stored)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == stored
    expected = {name: parameter.to(stored) for name, parameter in original.named_parameters()}
    for name, parameter in load(tmp_path, wanted).named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def test_mixed_dtypes_and_what_old_exports_carry(rewrite: Callable[..., Path]) -> None:
    norm = torch.rand(TINY.hidden).half()
    folder = rewrite(
        {"model.norm.weight": norm, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    )
    assert open_checkpoint(folder).dtype == torch.float32
    assert torch.equal(load(folder).norm.weight, norm.float())


def test_fills_tensors_kept_elsewhere(hf: Path) -> None:
    """Slices of somebody's memory, contiguous or not."""
    wide = {name: torch.zeros(*p.shape, 2) for name, p in random_model().named_parameters()}
    open_checkpoint(hf).fill({name: tensor[..., 1] for name, tensor in wide.items()})
    for name, parameter in random_model().named_parameters():
        assert torch.equal(wide[name][..., 1], parameter) and not wide[name][..., 0].any()


def test_progress_adds_up(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    steps: list[int] = []
    checkpoint.load(Mixtral(checkpoint.config), steps.append)
    assert sum(steps) == checkpoint.bytes == 4 * sum(tensor.numel() for tensor in read_all(sharded).values())
    assert all(step > 0 for step in steps)


def test_reads_each_byte_once_and_in_order(sharded: Path) -> None:
    layout = open_checkpoint(sharded).layout
    places = [(piece.path, piece.offset) for piece in layout.pieces]
    assert places == sorted(places)
    assert all(
        a.path != b.path or a.offset + a.bytes == b.offset
        for a, b in zip(layout.pieces, layout.pieces[1:], strict=False)
    )


@pytest.mark.parametrize("limit", [20_000, 1])
def test_saved_shards_load_and_open_with_transformers(tmp_path: Path, limit: int) -> None:
    original = random_model()
    save_hf(original, tmp_path, torch.float32, max_shard_bytes=limit)
    assert_same(load(tmp_path), original)
    ids = torch.randint(TINY.vocab, (2, 9))
    theirs = MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(ids).logits - original(ids)).abs().max() < 1e-4


def test_saving_again_replaces_shards_by_one_file_and_back(tmp_path: Path) -> None:
    for limit, seed in ((20_000, 1), (1 << 40, 2), (20_000, 3)):
        save_hf(random_model(seed=seed), tmp_path, torch.float32, max_shard_bytes=limit)
        assert_same(load(tmp_path), random_model(seed=seed))


def test_saves_exactly_what_transformers_would(
    tmp_path: Path, reference: tuple[MixtralForCausalLM, Path, Path]
) -> None:
    _, per_expert, _ = reference
    save_hf(load(per_expert), tmp_path, torch.float32)
    theirs, ours = read_all(per_expert), load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_model_of_another_shape_is_refused(hf: Path) -> None:
    wider = Mixtral(dataclasses.replace(TINY, ffn=24))
    with pytest.raises(
        ModelError, match=r"'layers.0.block_sparse_moe.experts.0.w13.weight' is \[40, 24\], and \[48"
    ):
        open_checkpoint(hf).load(wider)
    deeper = Mixtral(dataclasses.replace(TINY, layers=3))
    with pytest.raises(ModelError, match=r"'layers\.2.* is only in the model"):
        open_checkpoint(hf).load(deeper)


def test_a_file_cut_after_it_was_opened(hf: Path) -> None:
    checkpoint = open_checkpoint(hf)
    with (hf / "model.safetensors").open("r+b") as file:
        file.truncate((hf / "model.safetensors").stat().st_size - 10)
    with pytest.raises(
        ModelError, match=r"model.safetensors: ended 10 bytes early, in tensor 'model.layers.1.*w2"
    ):
        checkpoint.load(Mixtral(checkpoint.config))
    (hf / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model.safetensors: tensor .* cannot be read"):
        checkpoint.load(Mixtral(checkpoint.config))


def test_an_interrupt_ends_the_readers(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have begun come to their end, and the others are not begun."""
    read, seen, ended = model.checkpoint.load.read_piece, list[threading.Thread](), list[int]()

    def slow(*args: Any) -> None:
        seen.append(threading.current_thread())
        time.sleep(0.02)
        read(*args)
        ended.append(1)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.checkpoint.load, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(model.checkpoint.load, "read_piece", slow)
    checkpoint, before = open_checkpoint(hf), workers()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(Mixtral(checkpoint.config), interrupt)
    assert 0 < len(seen) == len(ended) < checkpoint.bytes // 4096
    assert threading.current_thread() not in seen and not workers() - before
