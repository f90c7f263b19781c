"""GGUF files that are no Mixtral, or none that can be read: one line for each, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from model.checkpoint import save_hf
from model.errors import ModelError
from tests.model.checkpoint.conftest import random_model, read_all
from tests.tools.quantize.sources.gguf_writer import facts_of, gguf_tensors, of_one_type, write_gguf
from tests.tools.quantize.sources.test_gguf import SHAPE
from tools.quantize import command as quantize
from tools.quantize.sources.gguf import open_gguf
from tools.quantize.sources.opening import open_path

Tensors = dict[str, np.ndarray]
OTHERS = "the files are incomplete or belong to another configuration"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    folder = tmp_path_factory.mktemp("gguf") / "hf"
    save_hf(random_model(SHAPE), folder, torch.float32)
    return gguf_tensors(SHAPE, read_all(folder), "merged")


def kinds(name: str) -> Type:
    return Type.F32 if "rope" in name or "rot" in name or "bias" in name else of_one_type(Type.Q8_0)(name)


def write(path: Path, tensors: Tensors, **changes: Any) -> Path:
    """A file with other keys of the architecture; None removes one."""
    facts = facts_of(SHAPE) | {f"llama.{name.replace('__', '.')}": value for name, value in changes.items()}
    write_gguf(path, tensors, kinds, facts)
    return path


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"expert_count": None}, "F: a Llama without experts; only Mixtral is supported"),
    ({"expert_count": 0}, "F: a Llama without experts; only Mixtral is supported"),
    ({"expert_count": 300}, "config: experts is 300, and must be at most 256"),
    ({"expert_used_count": None}, "F: llama.expert_used_count is None, and must be an integer"),
    ({"expert_used_count": 4}, "config: 4 experts per token out of 3"),
    ({"block_count": "x"}, "F: llama.block_count is 'x', and must be an integer"),
    ({"block_count": 2.0}, "F: llama.block_count is 2.0, and must be an integer"),
    ({"block_count": 3}, f"F: 10 tensors missing ('blk.2.attn_norm.weight', 'blk.2.attn_q.weight', "
     f"'blk.2.attn_k.weight' and 7 more); {OTHERS}"),
    ({"block_count": 1}, f"F: 10 tensors unexpected ('blk.1.attn_norm.weight', 'blk.1.ffn_norm.weight', "
     f"'blk.1.attn_q.weight' and 7 more); {OTHERS}"),
    ({"block_count": 4000}, "F: holds 23 tensors, and the configuration's 4000 layers of 3 experts are "
     f"40003; {OTHERS}"),
    ({"context_length": None}, "F: llama.context_length is None, and must be an integer"),
    ({"feed_forward_length": [96, 96]},
     "F: llama.feed_forward_length is [96, 96], and must be an integer"),
    ({"attention__head_count": 0}, "config: heads is 0, and must be at least 1"),
    ({"attention__head_count_kv": 3}, "config: 4 query heads are not a multiple of 3 kv heads"),
    ({"attention__value_length": 16},
     "F: llama.attention.value_length is 16, and Mixtral's is the head's 32"),
    ({"rope__dimension_count": 16}, "F: llama.rope.dimension_count is 16, and Mixtral's is the head's 32"),
    ({"rope__freq_base": 0.0}, "F: llama.rope.freq_base is 0.0, and must be a positive number that "
     "float32 holds"),
    ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0},
     "F: llama.rope.scaling.type is 'yarn'; only 'none' and 'linear' are supported"),
    ({"rope__scaling__factor": -2.0},
     "F: llama.rope.scaling.factor is -2.0, and must be a positive number that float32 holds"),
    ({"rope__scale_linear": "x"},
     "F: llama.rope.scale_linear is 'x', and must be a positive number that float32 holds"),
    ({"attention__layer_norm_rms_epsilon": float("nan")}, "F: llama.attention.layer_norm_rms_epsilon is "
     "nan, and must be a positive number that float32 holds"),
    ({"attention__layer_norm_rms_epsilon": None}, "F: llama.attention.layer_norm_rms_epsilon is None, "
     "and must be a positive number that float32 holds"),
    ({"embedding_length": 32, "attention__key_length": 32},
     "F: tensor 'token_embd.weight' has shape [48, 64], and must have [48, 32]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), KEYS, ids=[" ".join(changes) for changes, _ in KEYS])
def test_keys(tmp_path: Path, tensors: Tensors, changes: dict[str, Any], line: str) -> None:
    path = write(tmp_path / "x.gguf", tensors, **changes)
    with pytest.raises(ModelError) as error:
        open_gguf(path)
    assert str(error.value) == line.replace("F: ", f"{path}: ", 1)


@pytest.mark.parametrize("architecture", ["qwen2moe", "mixtral"])
def test_other_architectures(tmp_path: Path, tensors: Tensors, architecture: str) -> None:
    facts = facts_of(SHAPE) | {"general.architecture": architecture}
    write_gguf(tmp_path / "x.gguf", tensors, kinds, facts)
    line = f"general.architecture is '{architecture}'; only 'llama' with experts is supported, as GGUF calls"
    with pytest.raises(ModelError, match=line):
        open_gguf(tmp_path / "x.gguf")


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if name not in names}


def also(**more: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): each for name, each in more.items()}


def scaled(size: int, factor: float) -> np.ndarray:
    return np.full(size, factor, np.float32)


ROPE = "rope_freqs.weight"
TENSORS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (without("token_embd.weight"), "F: no tensor 'token_embd.weight', so this is not a language model"),
    (without("blk.0.attn_v.weight"), f"F: 1 tensor missing ('blk.0.attn_v.weight'); {OTHERS}"),
    (also(blk__0__attn_q__bias=scaled(128, 0)), f"F: 1 tensor unexpected ('blk.0.attn_q.bias'); {OTHERS}"),
    (also(blk__1__ffn_gate_shexp__weight=scaled(128, 0)),
     f"F: 1 tensor unexpected ('blk.1.ffn_gate_shexp.weight'); {OTHERS}"),
    (also(rope_freqs__weight=scaled(16, 2)),
     f"F: tensor '{ROPE}' scales rotary embedding; Mixtral's is not scaled"),
    (also(rope_freqs__weight=scaled(8, 1)), f"F: tensor '{ROPE}' has shape [8], and must have [16]"),
    (also(output_norm__weight=scaled(32, 1)),
     "F: tensor 'output_norm.weight' has shape [32], and must have [64]"),
    (also(blk__0__ffn_down_exps__weight=np.ones((2, 64, 96), np.float32)),
     "F: tensor 'blk.0.ffn_down_exps.weight' has shape [2, 64, 96], and must have [3, 64, 96]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), TENSORS, ids=[line[3:40] for _, line in TENSORS])
def test_tensors(tmp_path: Path, tensors: Tensors, change: Callable[[Tensors], Tensors], line: str) -> None:
    path = write(tmp_path / "x.gguf", change(tensors))
    with pytest.raises(ModelError) as error:
        open_gguf(path)
    assert str(error.value) == line.replace("F: ", f"{path}: ", 1)


def test_frequencies_of_1_and_what_follows_from_the_configuration(tmp_path: Path, tensors: Tensors) -> None:
    more = {ROPE: scaled(16, 1), "blk.0.attn_rot_embd.weight": scaled(16, 3)}
    path = write(tmp_path / "x.gguf", tensors | more)
    assert open_gguf(path).config == SHAPE


SCALINGS: list[tuple[dict[str, Any], float]] = [
    ({}, 1.0), ({"scaling__type": "none", "scaling__factor": 4.0}, 1.0), ({"scaling__type": "linear"}, 1.0),
    ({"scaling__type": "linear", "scaling__factor": 4.1}, 4.1), ({"scaling__factor": 2.0}, 2.0),
    ({"scaling__factor": 0.0}, 1.0), ({"scale_linear": 8.0}, 8.0),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "factor"), SCALINGS)
def test_linear_scaling(tmp_path: Path, tensors: Tensors, keys: Mapping[str, Any], factor: float) -> None:
    path = write(tmp_path / "x.gguf", tensors, **{f"rope__{name}": value for name, value in keys.items()})
    assert open_gguf(path).config == replace(SHAPE, rope_factor=factor)


def test_ends_and_defaults(tmp_path: Path, tensors: Tensors) -> None:
    """Without a base of its own a model has llama.cpp's, and without a head's size, what heads share."""
    facts = facts_of(SHAPE) | {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}
    facts |= {
        "llama.rope.freq_base": None,
        "llama.rope.dimension_count": None,
        "tokenizer.ggml.bos_token_id": 3,
    }
    write_gguf(tmp_path / "x.gguf", tensors, kinds, facts)
    config = open_gguf(tmp_path / "x.gguf").config
    assert (config.bos_id, config.eos_ids, config.rope_theta) == (3, (7, 9), 1e4)
    write_gguf(tmp_path / "x.gguf", tensors, kinds, facts | {"tokenizer.ggml.eos_token_id": 48})
    with pytest.raises(ModelError, match=r"eos_token_id is 48, and must be an id below 48"):
        open_gguf(tmp_path / "x.gguf")


# --- folders and parts


@pytest.fixture
def parts(tmp_path: Path, tensors: Tensors) -> list[Path]:
    write_gguf(tmp_path / "x.gguf", tensors, kinds, facts_of(SHAPE), split_max_tensors=9)
    return sorted(tmp_path.iterdir())


def test_missing_parts(parts: list[Path]) -> None:
    parts[0].unlink()
    parts[2].unlink()
    line = r"2 of 3 parts missing \('x-00001-of-00003\.gguf', 'x-00003-of-00003\.gguf'\); download them again"
    for given in (parts[0].parent, parts[1]):
        with pytest.raises(ModelError, match=line):
            open_path(given)


def test_parts_in_each_others_place(parts: list[Path]) -> None:
    middle = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ModelError, match=r"is part 2 of 3, counted from 0, and must be 1 of 3; download it"):
        open_path(parts[0])
    parts[1].rename(parts[0].parent / "y.gguf")
    parts[1].write_bytes(middle)
    with pytest.raises(ModelError, match=r"y\.gguf: one of 3 parts; put all of them into one folder, with"):
        open_path(parts[0].parent / "y.gguf")


def test_parts_of_other_models(parts: list[Path], tensors: Tensors, tmp_path: Path) -> None:
    """A part with other tensors than belong there."""
    good = parts[2].read_bytes()
    for names, line in (
        ([*tensors][:2], r"00003\.gguf: tensor 'token_embd\.weight' is in x-00001-of-00003\.gguf, too"),
        (
            [],
            r"the 3 parts have 18 tensors, and split\.tensors\.count is 23; they belong to different models",
        ),
    ):
        out = {name: tensors[name] for name in names}
        facts: dict[str, Any] = {"split.no": 2, "split.count": 3}
        write_gguf(parts[2], out, kinds, facts)
        with pytest.raises(ModelError, match=line):
            open_path(tmp_path)
    parts[2].write_bytes(good)
    assert open_path(tmp_path).config == SHAPE


def test_several_models_in_a_folder(tmp_path: Path, tensors: Tensors, parts: list[Path]) -> None:
    write(tmp_path / "y.gguf", tensors)
    line = r"2 models in GGUF \('x-00001-of-00003\.gguf', 'y\.gguf'\); give the path of one"
    with pytest.raises(ModelError, match=line):
        open_path(tmp_path)
    assert open_path(tmp_path / "y.gguf").config == open_path(parts[0]).config == SHAPE


def test_safetensors_come_first(tmp_path: Path, tensors: Tensors) -> None:
    save_hf(random_model(SHAPE), tmp_path / "hf", torch.float32)
    write(tmp_path / "hf" / "x.gguf", tensors)
    assert open_path(tmp_path / "hf").description.startswith("HF, 1 file, ")


def test_the_command_says_one_line(
    tmp_path: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write(tmp_path / "x.gguf", tensors, expert_count=None), tmp_path / "out"
    for source, line in (
        (path, f"{path}: a Llama without experts; only Mixtral is supported"),
        (tmp_path / "none.gguf", f"{tmp_path / 'none.gguf'}: no such file"),
    ):
        assert quantize.main([str(source), str(out), "--quiet"]) == 1
        assert capsys.readouterr().err == f"error: {line}\n"
    assert not out.exists()


def test_a_tensor_name_cannot_write_to_the_terminal(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    named: Any = tensors | {"\x1b[2J\n": np.ones(3, np.float32)}
    path = tmp_path / "x.gguf"
    write_gguf(path, named, lambda name: Type.F32, facts_of(SHAPE))
    with pytest.raises(ModelError) as error:
        open_gguf(path)
    assert str(error.value).isprintable() and "'\\x1b[2J\\n'" in str(error.value)
