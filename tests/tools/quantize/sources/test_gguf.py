"""GGUF files: every parameter to the bit, and what the engine makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from model.checkpoint import save_hf
from model.checkpoint.names import GGUF, HF
from model.checkpoint.pieces import Piece
from model.config import ModelConfig
from model.errors import ModelError
from tests.model.checkpoint.conftest import random_model, read_all
from tests.tools.quantize.sources.gguf_writer import (
    Kinds,
    as_read,
    facts_of,
    gguf_tensors,
    of_one_type,
    parameters,
    write_gguf,
)
from tools.quantize.sources import gguf as source_module
from tools.quantize.sources.gguf import GgufSource, open_gguf

SHAPE = ModelConfig(
    vocab=48, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, ffn=96, experts=3, experts_per_token=2,
    context=64, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
WIDE = replace(SHAPE, hidden=256, ffn=256, layers=1, heads=4, kv_heads=2, head_dim=64, experts=2)
CPU = torch.device("cpu")
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
READABLE = sorted(kind.name for kind in gguf.quants._type_traits)  # what the package itself lists


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tensor]:
    folder = tmp_path_factory.mktemp("gguf") / "hf"
    save_hf(random_model(SHAPE), folder, torch.float32)
    return read_all(folder)


def mixed(name: str) -> Type:
    """Another type for each kind of matrix, as llama.cpp's mixtures have."""
    for part, kind in (("attn_v", Type.Q8_0), ("attn_q", Type.F16), ("down", Type.Q5_1), ("embd", Type.BF16)):
        if part in name:
            return kind
    return of_one_type(Type.Q4_0)(name)


def same(source: GgufSource, expected: Mapping[str, Tensor]) -> None:
    """Every parameter, to the bit. NaN counts as itself."""
    assert source.parts.keys() == expected.keys()
    for name, weight in expected.items():
        read = source.read(name, CPU)
        assert read.shape == weight.shape, name
        assert torch.equal(read.float().view(torch.int32), weight.float().view(torch.int32)), name


@pytest.mark.parametrize("experts", ["split", "merged", "fused"])
@pytest.mark.parametrize(
    "kinds", [*map(of_one_type, map(Type.__getitem__, KINDS)), mixed], ids=[*KINDS, "mixed"]
)
def test_every_weight_to_the_bit(
    hf: Mapping[str, Tensor], tmp_path: Path, experts: str, kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "PIECE", 7 * 64)  # so that matrices are read in several pieces
    tensors = gguf_tensors(SHAPE, hf, experts)
    write_gguf(tmp_path / "x.gguf", tensors, kinds, facts_of(SHAPE))
    source = open_gguf(tmp_path / "x.gguf")
    assert source.config == SHAPE and source.gates == torch.float32
    same(source, parameters(SHAPE, as_read(tensors, kinds), experts))


def random_blocks(chance: np.random.Generator, count: int, kind: Type) -> np.ndarray:  # uint8 [count, bytes]
    """Any bytes at all, but scales that are NaN or infinite only by chance."""
    size = GGML_QUANT_SIZES[kind][1]
    return chance.integers(0, 256, (count, size), np.uint8)


@pytest.mark.parametrize("name", READABLE)
def test_every_type_of_the_package(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of random bytes: of each the package's own weights, among them those of scales that are NaN."""
    monkeypatch.setattr(source_module, "PIECE", 37 * 256)
    kind, chance = Type[name], np.random.default_rng(1)
    weights, size = GGML_QUANT_SIZES[kind]
    save_hf(random_model(WIDE), tmp_path / "hf", torch.float32)
    tensors = gguf_tensors(WIDE, read_all(tmp_path / "hf"), "merged")
    kinds = of_one_type(kind)
    for tensor, array in tensors.items():
        if kinds(tensor) is kind:
            blocks = random_blocks(chance, array.size // weights, kind)
            tensors[tensor] = blocks.reshape(*array.shape[:-1], array.shape[-1] // weights * size)
    write_gguf(tmp_path / "x.gguf", tensors, kinds, facts_of(WIDE))
    source = open_gguf(tmp_path / "x.gguf")
    with np.errstate(all="ignore"):
        expected = as_read(tensors, kinds)
    same(source, parameters(WIDE, expected, "merged"))
    assert source.lossy == (None if name == "BF16" else f"GGUF ({name})")
    assert source.description.startswith(f"GGUF, 1 file, {name}, ")
    assert sum(map(source.size, source.parts)) == sum(array.nbytes for array in tensors.values())


def test_types_that_the_package_does_not_read_are_refused_by_name(tmp_path: Path) -> None:
    others = sorted({kind.name for kind in GGML_QUANT_SIZES} - {"F32", "F16", *READABLE})
    assert others and {"Q8_1", "I32"} < {*others}
    save_hf(random_model(WIDE), tmp_path / "hf", torch.float32)
    plain = gguf_tensors(WIDE, read_all(tmp_path / "hf"), "merged")
    for name in others:
        weights, size = GGML_QUANT_SIZES[Type[name]]
        packed = np.zeros((WIDE.vocab, WIDE.hidden // weights * size), np.uint8)
        kinds = lambda tensor, kind=Type[name]: kind if tensor == "output.weight" else Type.F32  # noqa: E731
        write_gguf(tmp_path / "x.gguf", plain | {"output.weight": packed}, kinds, facts_of(WIDE))
        with pytest.raises(ModelError, match=rf"'output\.weight' is {name}, which the package gguf does not"):
            open_gguf(tmp_path / "x.gguf")


def test_tied_embeddings(hf: Mapping[str, Tensor], tmp_path: Path) -> None:
    tensors = gguf_tensors(SHAPE, hf, "merged")
    del tensors["output.weight"]
    tensors["rope_freqs.weight"] = np.ones(SHAPE.head_dim // 2, np.float32)
    kinds = of_one_type(Type.Q8_0)
    write_gguf(tmp_path / "x.gguf", tensors, lambda n: Type.F32 if "rope" in n else kinds(n), facts_of(SHAPE))
    source = open_gguf(tmp_path / "x.gguf")
    head, embeddings = (source.read(f"{name}.weight", CPU) for name in ("lm_head", "embed_tokens"))
    assert torch.equal(head, embeddings) and head.abs().sum() > 0


def test_dtypes_and_what_is_said(hf: Mapping[str, Tensor], tmp_path: Path) -> None:
    """What is not quantized counts for the dtype, and bytes for the order of types."""
    tensors = gguf_tensors(SHAPE, hf, "merged")

    def opened(kinds: Kinds) -> GgufSource:
        write_gguf(tmp_path / "x.gguf", tensors, kinds, facts_of(SHAPE))
        return open_gguf(tmp_path / "x.gguf")

    source = opened(mixed)
    assert source.dtype == torch.float16  # of q, against embeddings
    assert source.lossy == "GGUF (Q4_0, Q5_1, Q8_0)"
    assert source.read("layers.0.self_attn.qkv_proj.weight", CPU).dtype == torch.float32
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        source = opened(of_one_type(Type[name]))
        assert source.dtype == dtype and source.lossy is None
        assert source.read("layers.1.block_sparse_moe.experts.2.w13.weight", CPU).dtype == dtype
        assert source.description.startswith(f"GGUF, 1 file, {name}, ")
    gates = opened(lambda name: Type.F32 if "norm" in name else Type.F16)
    assert gates.gates == torch.float16


@pytest.mark.parametrize("given", ["x-00002-of-00003.gguf", "folder"])
def test_a_model_in_parts(hf: Mapping[str, Tensor], tmp_path: Path, given: str) -> None:
    tensors, kinds = gguf_tensors(SHAPE, hf, "merged"), of_one_type(Type.Q8_0)
    write_gguf(tmp_path / "whole.gguf", tensors, kinds, facts_of(SHAPE))
    whole = open_gguf(tmp_path / "whole.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(folder / "x.gguf", tensors, kinds, facts_of(SHAPE), split_max_tensors=9)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"x-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    source = open_gguf(folder if given == "folder" else folder / given)
    assert source.files.name == "x" and len(source.files.paths) == 3 and source.config == SHAPE
    same(source, {name: whole.read(name, CPU).float() for name in whole.parts})
    assert {path.name for name in source.parts for path, _, _ in source.extents(name)} == {*names}


def test_one_expert_of_many_is_read_alone_and_in_pieces(
    hf: Mapping[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "PIECE", 20 * SHAPE.hidden)
    tensors = gguf_tensors(SHAPE, hf, "merged")
    write_gguf(tmp_path / "x.gguf", tensors, of_one_type(Type.Q8_0), facts_of(SHAPE))
    source, read = open_gguf(tmp_path / "x.gguf"), []
    real = source_module.read_bytes

    def counted(piece: Piece, tensor: Tensor) -> None:
        read.append(piece.bytes)
        real(piece, tensor)

    monkeypatch.setattr(source_module, "read_bytes", counted)
    name = "layers.1.block_sparse_moe.experts.1.w13.weight"
    source.read(name, CPU)
    assert sum(read) == source.size(name) == 2 * SHAPE.ffn * SHAPE.hidden // 32 * 34
    assert max(read) == 20 * SHAPE.hidden // 32 * 34
    read.clear()
    source.read("layers.1.self_attn.qkv_proj.weight", CPU)  # of q and k a whole head, though it is larger
    assert max(read) == SHAPE.head_dim * SHAPE.hidden // 32 * 34


def test_a_file_that_shrinks(hf: Mapping[str, Tensor], tmp_path: Path) -> None:
    tensors = gguf_tensors(SHAPE, hf, "merged")
    path = tmp_path / "x.gguf"
    write_gguf(path, tensors, of_one_type(Type.Q8_0), facts_of(SHAPE))
    source = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ModelError, match=r"ended \d+ bytes early, in tensor 'blk\.1\..*'; did it change\?"):
        for name in source.parts:
            source.read(name, CPU)


def test_names_are_those_of_the_packages_own_table() -> None:
    """It tells GGUF's names of HF's tensors, and of experts whom their converter has stacked."""
    named = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.layers)
    ours = GGUF["experts stacked"]
    for parameter, names in HF.items():
        if "{e}" in parameter:
            moe = "layers.{n}.feed_forward.experts."
            names = tuple(f"{moe}{name}.weight" for name in (("w1", "w3") if "w13" in parameter else ("w2",)))
        for n in range(SHAPE.layers):
            found = [named.get_name(name.format(n=n), try_suffixes=(".weight",)) for name in names]
            assert found == [name.format(n=n) for name in ours[parameter]]
