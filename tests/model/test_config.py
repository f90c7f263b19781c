"""Configurations: which spellings are read, and which fields are refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, MixtralConfig

from model.config import (
    MAX_CONFIG_BYTES,
    MAX_ENDS,
    MOST,
    ModelConfig,
    from_hf,
    from_mistral,
    read_json,
    ties_embeddings,
    to_hf,
)
from model.errors import ModelError
from tests.model.reference import GEOMETRIES, TINY

# What mistralai/Mixtral-8x7B-Instruct-v0.1 and mistralai/Mixtral-8x22B-Instruct-v0.1 publish.
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
EXPECTED_8X7B = ModelConfig(
    vocab=32000, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, experts=8,
    experts_per_token=2, context=32768, rope_theta=1e6, norm_eps=1e-5, bos_id=1, eos_ids=(2,),
)  # fmt: skip
MIXTRAL_8X22B = MIXTRAL_8X7B | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "vocab_size": 32768,
}
PARAMS_8X7B: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_published_files() -> None:
    assert from_hf(MIXTRAL_8X7B) == EXPECTED_8X7B
    assert from_hf(MIXTRAL_8X22B) == replace(
        EXPECTED_8X7B, vocab=32768, hidden=6144, layers=56, heads=48, ffn=16384, context=65536
    )
    assert from_mistral(PARAMS_8X7B) == EXPECTED_8X7B


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({"rope_theta": 5e5}, 5e5),
        ({"rope_theta": 10000}, 1e4),
        ({"rope_theta": None}, 1e6),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": None, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, 5e5),
        ({}, 1e6),
    ],
)
def test_rope_spellings(change: dict[str, Any], theta: float) -> None:
    found = from_hf(without(MIXTRAL_8X7B, "rope_theta") | change)
    assert (found.rope_theta, found.rope_factor) == (theta, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.5}},
        {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.5}},
        {"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_theta": 1e4},
        {"rope_scaling": {"type": "default", "factor": 4.0}, "rope_theta": 1e4},
        {"rope_scaling": {"factor": 4.0}},
        {"rope_scaling": {}, "rope_theta": 1e4},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e5}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e5},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        {
            "rope_parameters": {"rope_type": "linear", "factor": 8.0},
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_theta": 5e5,
        },
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, "rope_scaling": None},
    ],
)
def test_rotary_embedding_is_read_as_transformers_reads_it(change: dict[str, Any]) -> None:
    written = without(MIXTRAL_8X7B, "rope_theta") | change
    theirs = MixtralConfig.from_dict(json.loads(json.dumps(written))).rope_parameters
    ours = from_hf(written)
    assert theirs["rope_type"] in ("default", "linear")
    factor = theirs["factor"] if theirs["rope_type"] == "linear" else 1
    assert (ours.rope_theta, ours.rope_factor) == (theirs["rope_theta"], factor)


@pytest.mark.parametrize(("said", "tied"), [(True, True), (False, False), (None, False)])
def test_tied_embeddings(tmp_path: Path, said: bool | None, tied: bool) -> None:
    write(tmp_path / "config.json", MIXTRAL_8X7B | {"tie_word_embeddings": said})
    assert ties_embeddings(tmp_path) is tied
    assert ModelConfig.read(tmp_path) == EXPECTED_8X7B


def test_tied_embeddings_by_default(tmp_path: Path) -> None:
    write(tmp_path / "params.json", PARAMS_8X7B)
    assert not ties_embeddings(tmp_path)
    write(tmp_path / "config.json", without(MIXTRAL_8X7B, "tie_word_embeddings"))
    assert not ties_embeddings(tmp_path)


@pytest.mark.parametrize("said", ["true", 1, 0, {}, []])
def test_embeddings_neither_tied_nor_not_are_refused(tmp_path: Path, said: Any) -> None:
    write(tmp_path / "config.json", {"tie_word_embeddings": said})
    with pytest.raises(ModelError, match=r"tie_word_embeddings is .*, and must be true or false"):
        ties_embeddings(tmp_path)


def test_a_mixtral_of_llama_3_experts() -> None:
    """Of another vocabulary and other ends, and not scaled as Llama 3.1 is."""
    merged = MIXTRAL_8X7B | {
        "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": [128001, 128009], "rope_theta": 5e5,
        "max_position_embeddings": 8192, "num_local_experts": 4, "rope_scaling": None,
    }  # fmt: skip
    assert from_hf(merged) == replace(
        EXPECTED_8X7B, vocab=128256, bos_id=128000, eos_ids=(128001, 128009), rope_theta=5e5, context=8192,
        experts=4,
    )  # fmt: skip
    with pytest.raises(ModelError, match="rope_type is 'llama3'"):
        from_hf(merged | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}})


def test_a_sliding_window_is_ignored_with_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert from_hf(MIXTRAL_8X7B | {"sliding_window": None}) == EXPECTED_8X7B
    assert not recwarn.list
    assert from_hf(MIXTRAL_8X7B | {"sliding_window": 4096}) == EXPECTED_8X7B
    (said,) = [str(warning.message) for warning in recwarn.list]
    assert said == "config.json: sliding_window is 4096, and is ignored: Mixtral attends to all tokens"


def test_head_dim() -> None:
    assert from_hf(MIXTRAL_8X7B | {"head_dim": None}).head_dim == 128
    assert from_hf(MIXTRAL_8X7B | {"head_dim": 96}).head_dim == 96
    assert from_hf(MIXTRAL_8X22B).head_dim == 128


def test_kv_heads_default_to_heads() -> None:
    assert from_hf(without(MIXTRAL_8X7B, "num_key_value_heads")).kv_heads == 32
    assert from_hf(MIXTRAL_8X7B | {"num_key_value_heads": None}).kv_heads == 32


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, (2,)),
        ({}, {}, (2,)),
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 9]}, None, (7, 9)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": []}, None, ()),
        ({"eos_token_id": 7}, {"bos_token_id": 1}, (7,)),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, (7, 9)),
        ({"eos_token_id": 7}, {"eos_token_id": [2, 32000]}, (7, 2, 32000)),
        ({"eos_token_id": 32000}, {"eos_token_id": None}, (32000,)),
    ],
)
def test_end_of_sequence(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert from_hf(MIXTRAL_8X7B | {"vocab_size": 32002} | config, generation).eos_ids == expected


@pytest.mark.parametrize("value", [32002, -1, 10**30])
def test_ends_outside_the_vocabulary_are_left_out_with_a_warning(value: int) -> None:
    config = MIXTRAL_8X7B | {"vocab_size": 32002, "eos_token_id": [value, 7, 7]}
    with pytest.warns(RuntimeWarning, match=rf"eos_token_id \[{value}\] is outside the vocabulary of 32002"):
        assert from_hf(config).eos_ids == (7,)


def test_end_of_sequence_defaults() -> None:
    assert from_hf(without(MIXTRAL_8X7B, "eos_token_id", "bos_token_id")) == EXPECTED_8X7B


INTEGERS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
]


@pytest.mark.parametrize("name", [*INTEGERS, "bos_token_id"])
@pytest.mark.parametrize("value", ["32", 32.0, True, [32], {}])
def test_a_field_that_is_no_integer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {name} is .*integer"):
        from_hf(MIXTRAL_8X7B | {name: value})


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize(
    "value", ["1e6", True, 0, -1.0, 1e-39, 4e38, float("nan"), float("inf"), 10**400, [1.0]]
)
def test_a_field_that_is_no_positive_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {name} is .*positive number"):
        from_hf(MIXTRAL_8X7B | {name: value})


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {name} is None"):
        from_hf(without(MIXTRAL_8X7B, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"model_type": other}, rf"^config\.json: model_type is '{other}'; only 'mixtral' is supported$")
            for other in (
                "llama",
                "mistral",
                "qwen2_moe",
                "qwen3_moe",
                "deepseek_v2",
                "dbrx",
                "phimoe",
                "gpt_oss",
            )
        ),
        ({"model_type": None}, r"model_type is None"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            r"quantized by 'awq'; start from the 16-bit checkpoint, and quantize it with",
        ),
        ({"quantization_config": {"bits": 4}}, r"quantized by 'another program'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantized by 'mlx'"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "linear"}}, r"config\.json rope_scaling: factor is None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling: factor is 0, .* positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, r"rope_scaling: factor is '2'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": -2.0}},
            r"rope_parameters: factor is -2\.0, and must be a positive number",
        ),
        *(
            ({"rope_scaling": {key: kind, "factor": 2.0}}, rf"rope_type is '{kind}'; only .* 'linear' are")
            for key in ("type", "rope_type")
            for kind in ("dynamic", "yarn", "longrope", "llama3", "su", "proportional")
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor is 0\.25"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, r"rope_type is 'dynamic'"),
        ({"rope_parameters": "default"}, r"rope_parameters is 'default'"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
        ({"quantization_config": "awq"}, r"quantization_config is 'awq'"),
        ({"eos_token_id": "2"}, r"eos_token_id is '2'"),
        ({"eos_token_id": [2, None]}, r"eos_token_id is \[2, None\]"),
        ({"eos_token_id": True}, r"eos_token_id is True"),
        ({"eos_token_id": [2] * (MAX_ENDS + 1)}, r"eos_token_id is \[2, 2, .* at most 64 of them"),
        ({"bos_token_id": 32000}, r"id 32000 is outside the vocabulary of 32000"),
        ({"bos_token_id": -1}, r"id -1 is outside the vocabulary of 32000"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_hf(MIXTRAL_8X7B | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: 0}, f"{name} is 0")
            for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim")
        ),
        *(({name: -3}, f"{name} is -3") for name in ("ffn", "experts", "context", "heads")),
        ({"heads": 6, "kv_heads": 4}, "6 query heads .* 4 kv heads"),
        ({"head_dim": 7}, "head_dim 7"),
        *(
            ({name: most + 1}, f"{name} is {most + 1}, and must be at most {most}")
            for name, most in MOST.items()
        ),
        ({"layers": 10**5000}, "layers is <int>, and must be at most 4096"),
        ({"eos_ids": (TINY.vocab,)}, f"id {TINY.vocab} is outside the vocabulary"),
        ({"experts_per_token": 0}, "0 experts per token out of 4"),
        ({"experts_per_token": 5}, "5 experts per token out of 4"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    "name", ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size"]
)
def test_params_json_refusals(name: str) -> None:
    for broken in (without(PARAMS_8X7B, name), PARAMS_8X7B | {name: "8"}):
        with pytest.raises(ModelError, match=rf"params\.json: {name} is"):
            from_mistral(broken)


@pytest.mark.parametrize(
    "change",
    [
        {name: "\x1b[2J\n" + "x" * 10**6}
        for name in (
            "model_type",
            "hidden_act",
            "vocab_size",
            "rope_theta",
            "eos_token_id",
            "rope_parameters",
        )
    ]
    + [
        {"rope_scaling": {"type": "\x1b[2J\n" + "x" * 10**6}},
        {"quantization_config": {"quant_method": "\x1b[2J\n" + "x" * 10**6}},
        {"eos_token_id": ["\x1b[2J\n" + "x" * 10**6] * 10**4},
    ],
)
def test_values_from_files_are_shown_escaped_and_cut(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as error:
        from_hf(MIXTRAL_8X7B | change)
    said = str(error.value)
    assert said.isprintable() and len(said) < 300 and "\\x1b[2J" in said


def test_params_json_without_experts() -> None:
    for moe in (None, [8, 2]):
        with pytest.raises(ModelError, match="'moe'"):
            from_mistral(PARAMS_8X7B | {"moe": moe})
    for name in ("num_experts", "num_experts_per_tok"):
        with pytest.raises(ModelError, match=rf"params\.json moe: {name} is None"):
            from_mistral(PARAMS_8X7B | {"moe": without(PARAMS_8X7B["moe"], name)})


def test_params_json_rope_theta() -> None:
    assert from_mistral(PARAMS_8X7B | {"rope_theta": 5e5}).rope_theta == 5e5
    assert from_mistral(PARAMS_8X7B | {"rope_theta": None}).rope_theta == 1e6


def test_read_hf(tmp_path: Path) -> None:
    write(tmp_path / "config.json", MIXTRAL_8X7B)
    assert ModelConfig.read(tmp_path) == EXPECTED_8X7B
    write(tmp_path / "generation_config.json", {"eos_token_id": [2, 5]})
    assert ModelConfig.read(tmp_path) == replace(EXPECTED_8X7B, eos_ids=(2, 5))


def test_read_mistral(tmp_path: Path) -> None:
    write(tmp_path / "params.json", PARAMS_8X7B)
    assert ModelConfig.read(tmp_path) == EXPECTED_8X7B
    write(tmp_path / "config.json", MIXTRAL_8X7B | {"num_hidden_layers": 3})  # HF's goes before Mistral's
    assert ModelConfig.read(tmp_path).layers == 3


def test_read_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json .* no params\.json"):
        ModelConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"model_type": "mixtral"', "cannot be read as JSON"),
        (b'{"model_type": "\xff"}', "cannot be read as JSON"),
        (b"[" * 200_000, "cannot be read as JSON"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b"[1, 2]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b" " * (MAX_CONFIG_BYTES + 1), f"{MAX_CONFIG_BYTES + 1} bytes, too large"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "params.json"])
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: .*{message}"):
        ModelConfig.read(tmp_path)


def test_read_json_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent"):
        read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("name", GEOMETRIES)
def test_transformers_reads_what_we_write(name: str) -> None:
    config = replace(GEOMETRIES[name], bos_id=3, eos_ids=(4, 5))
    theirs = MixtralConfig(**to_hf(config, "float16"))
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": config.rope_theta}
    assert (theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers) == (
        config.vocab,
        config.hidden,
        config.layers,
    )
    assert (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.intermediate_size,
    ) == (
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.ffn,
    )
    assert (theirs.num_local_experts, theirs.num_experts_per_tok) == (
        config.experts,
        config.experts_per_token,
    )
    assert (theirs.max_position_embeddings, theirs.rms_norm_eps) == (config.context, config.norm_eps)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (3, [4, 5])
    assert theirs.sliding_window is None and not theirs.tie_word_embeddings
    assert str(theirs.dtype) == "torch.float16" and theirs.architectures == ["MixtralForCausalLM"]


@pytest.mark.parametrize("factor", [2.0, 2.5, 8.0])
def test_transformers_reads_our_linear_scaling(factor: float) -> None:
    theirs = MixtralConfig(**to_hf(replace(TINY, rope_theta=12345.0, rope_factor=factor)))
    assert theirs.rope_parameters == {"rope_type": "linear", "factor": factor, "rope_theta": 12345.0}


@pytest.mark.parametrize("head_dim", [None, 24])
@pytest.mark.parametrize("eos", [2, [2, 32]])
def test_we_read_what_transformers_writes(tmp_path: Path, head_dim: int | None, eos: int | list[int]) -> None:
    MixtralConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        num_local_experts=6,
        num_experts_per_tok=3,
        max_position_embeddings=777,
        rms_norm_eps=1e-6,
        bos_token_id=11,
        eos_token_id=eos,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    ).save_pretrained(tmp_path)
    expected = ModelConfig(
        vocab=101, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=head_dim or 16, ffn=80, experts=6,
        experts_per_token=3, context=777, rope_theta=12345.0, norm_eps=1e-6, bos_id=11,
        eos_ids=(2,) if eos == 2 else (2, 32),
    )  # fmt: skip
    assert ModelConfig.read(tmp_path) == expected
    GenerationConfig(eos_token_id=[7, 8]).save_pretrained(tmp_path)
    assert ModelConfig.read(tmp_path) == replace(expected, eos_ids=(*expected.eos_ids, 7, 8))


def test_we_read_what_transformers_writes_by_default(tmp_path: Path) -> None:
    MixtralConfig().save_pretrained(tmp_path)
    assert replace(ModelConfig.read(tmp_path), context=32768) == EXPECTED_8X7B


def up_to(name: str) -> st.SearchStrategy[int]:
    return st.integers(1, MOST[name])


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads, experts = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    vocab = draw(st.integers(2, 1 << 17))
    tokens = st.integers(0, vocab - 1)
    return ModelConfig(
        vocab=vocab,
        hidden=draw(up_to("hidden")),
        layers=draw(up_to("layers")),
        heads=kv_heads * draw(st.integers(1, 16)),
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        ffn=draw(up_to("ffn")),
        experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        context=draw(up_to("context")),
        rope_theta=draw(st.floats(1.0, 1e9)),
        rope_factor=draw(st.just(1.0) | st.floats(2.0**-10, 2.0**10)),
        norm_eps=draw(st.floats(1e-12, 1.0)),
        bos_id=draw(tokens),
        eos_ids=tuple(draw(st.lists(tokens, unique=True, max_size=3))),
    )


@settings(deadline=None)
@given(configs())
def test_round_trip(config: ModelConfig) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 40), 1 << 40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None)
@given(
    st.sampled_from(
        [
            "eos_token_id",
            "rope_theta",
            "rope_parameters",
            "rope_scaling",
            "rms_norm_eps",
            "model_type",
            *INTEGERS,
        ]
    ),
    json_values,
)
def test_any_value_is_read_or_refused(name: str, value: Any) -> None:
    """Any value of a field is read or raises `ModelError`."""
    try:
        config = from_hf(MIXTRAL_8X7B | {name: value})
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert config.experts_per_token <= config.experts and config.rope_theta > 0
