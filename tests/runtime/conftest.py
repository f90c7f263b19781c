"""A tiny Mixtral with random weights and a tokenizer trained here, as a checkpoint folder and as engines."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceTrainer

from model.checkpoint import save_hf
from model.config import ModelConfig
from model.mixtral import Mixtral
from runtime import Engine, EngineOptions

if find_spec("hypothesis"):  # tests for GPUs run without it
    from hypothesis import settings

    settings.register_profile("unhurried", deadline=None)  # the machine may be busy
    settings.load_profile("unhurried")

CONTEXT = 640  # more than a prefill chunk
NAMES = ("alpha", "beta", "gamma", "delta", "value", "result", "index", "count", "name", "item")
CORPUS = [
    f"def {a}_{b}({a}, n={n * 7}):\n    return {b} + n * {a}\n" for n, a in enumerate(NAMES) for b in NAMES
]


def train_tokenizer(file: Path, vocab_size: int = 400, **options: Any) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=5,
        **options,
    )
    file.write_bytes(model.getvalue())


def make_checkpoint(folder: Path, tokenizer: Path, config: ModelConfig, spoil: bool = False) -> Path:
    """Random weights, large enough that logits differ by several units; all NaN in the head with `spoil`."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = Mixtral(config)
    for name, weight in model.named_parameters():
        if not name.endswith("norm.weight") and "layernorm" not in name:
            torch.nn.init.normal_(weight, std=2 / weight.shape[-1] ** 0.5)
    if spoil:
        model.lm_head.weight.detach().fill_(torch.nan)
    torch.random.set_rng_state(torch_state)
    save_hf(model, folder, torch.float32)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        vocab=400, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=32, experts=4,
        experts_per_token=2, context=CONTEXT, rope_theta=1e4, norm_eps=1e-5)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(file)
    return file


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path, config: ModelConfig) -> Path:
    """The checkpoint that most tests share."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer_file, config)


@pytest.fixture(scope="session")
def variant(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path, config: ModelConfig
) -> Callable[..., Path]:
    """Make another checkpoint, whose configuration differs in the given fields."""

    def make(tokenizer: Path = tokenizer_file, spoil: bool = False, **changes: Any) -> Path:
        return make_checkpoint(
            tmp_path_factory.mktemp("variant"), tokenizer, replace(config, **changes), spoil
        )

    return make


@pytest.fixture(scope="session")
def v3_checkpoint(tmp_path_factory: pytest.TempPathFactory, variant: Callable[..., Path]) -> Path:
    """A checkpoint whose tokenizer has the control pieces of the V3 chat format."""
    file = tmp_path_factory.mktemp("v3") / "tokenizer.model"
    train_tokenizer(file, control_symbols=["[INST]", "[/INST]"])
    return variant(tokenizer=file)


@pytest.fixture(scope="session")
def shared_engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, EngineOptions(device="cpu", dtype="float32")) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    """One engine for all tests, with counters at zero. What one test does to it, the next must survive."""
    shared_engine.runner.counters.__init__()  # type: ignore[misc]
    return shared_engine


@pytest.fixture
def load(checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    """Load further engines, by default of the shared checkpoint. They are closed after the test."""
    engines = []

    def load(path: Path = checkpoint, **options: Any) -> Engine:
        engines.append(Engine.load(path, EngineOptions(**{"device": "cpu", "dtype": "float32"} | options)))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.fixture
def with_eos(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """The shared checkpoint with other end-of-sequence ids in its `config.json`."""

    def write(eos: int | list[int] | None) -> Path:
        folder = shutil.copytree(checkpoint, tmp_path / "eos", dirs_exist_ok=True)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": eos}))
        return folder

    return write
