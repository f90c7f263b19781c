"""Models with any number of experts, tied embeddings and linear scaling, from Transformers' files through
quantizing to engines with all experts resident, offloaded, and partly in files."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from dev.peers.config import FORMULAS
from model.checkpoint import open_checkpoint
from model.config import ModelConfig
from runtime import Engine, EngineOptions, SamplingParams
from tests.model.oracle import random_oracle, to_oracle
from tests.quantized import quantize_folder
from tests.runtime.test_loader import dequantized
from tools.trace.read import read_trace
from tools.trace.statistics import replay_agrees, summarize

IDS = [1, 7, 300, 42, 9, 9, 120, 55, 3]
STEPS = 16


@dataclass(frozen=True)
class Model:
    """A checkpoint of Transformers, the same quantized, and what Transformers says of each."""

    config: ModelConfig
    folders: dict[str, Path]
    oracles: dict[str, Any]


@pytest.fixture(
    scope="module",
    params=[(1, 1, 1.0), (2, 1, 1.0), (2, 2, 4.0), (3, 2, 1.0), (6, 6, 2.5), (12, 5, 1.0), (16, 2, 1.0)],
    ids=lambda shape: "{1} of {0} experts, factor {2}".format(*shape),
)
def merged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path
) -> Model:
    experts, chosen, factor = request.param
    config = ModelConfig(
        vocab=400, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=32, experts=experts,
        experts_per_token=chosen, context=128, rope_theta=1e4, norm_eps=1e-5, rope_factor=factor,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("merged")
    oracle = random_oracle(config, seed=experts, tied=True)
    oracle.config.bos_token_id, oracle.config.eos_token_id = 1, 2
    oracle.save_pretrained(folder / "hf")
    shutil.copy(tokenizer_file, folder / "hf" / "tokenizer.model")
    quantize_folder(folder / "hf", folder / "native", "3g32")
    native = open_checkpoint(folder / "native")
    assert native.config == open_checkpoint(folder / "hf").config == config
    theirs = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32, **FORMULAS).eval()
    oracles = {"hf": theirs, "native": to_oracle(dequantized(native))}
    return Model(config, {name: folder / name for name in oracles}, oracles)


@pytest.fixture
def engine() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def load(folder: Path, **options: Any) -> Engine:
        made.append(Engine.load(folder, EngineOptions(**{"device": "cpu", "dtype": "float32"} | options)))
        return made[-1]

    yield load
    for each in made:
        each.close()


def greedy(engine: Engine) -> list[int]:
    params = SamplingParams(max_new_tokens=STEPS, temperature=0, ignore_eos=True)
    return [token.id for token in engine.generate(IDS, params)]


@pytest.mark.parametrize("stored", ["hf", "native"])
def test_resident(merged: Model, engine: Callable[..., Engine], stored: str) -> None:
    ours, oracle = engine(merged.folders[stored], offload="never"), merged.oracles[stored]
    with torch.inference_mode():
        expected = oracle(torch.tensor([IDS])).logits[0]
        text = oracle.generate(
            torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS), dtype=torch.int64),
            max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(IDS) :]  # fmt: skip
    assert expected.std() > 0.1, "these logits could not tell models apart"
    size = float(expected.abs().max())
    torch.testing.assert_close(ours.logits(IDS), expected, rtol=1e-4, atol=1e-4 * size)
    assert greedy(ours) == text.tolist()


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize(("stored", "tiered"), [("hf", False), ("native", False), ("native", True)])
def test_offloaded_is_resident_to_the_bit(
    merged: Model, engine: Callable[..., Engine], tmp_path: Path, stored: str, tiered: bool, lookahead: int
) -> None:
    """With slots for a token's experts and no more. What is traced is what the simulation says."""
    folder, config = merged.folders[stored], merged.config
    options: dict[str, Any] = {"offload": "always", "slots": config.experts_per_token}
    options |= {"lookahead": lookahead, "prefetch": min(lookahead, config.experts)}
    if tiered:
        options["berths"] = config.layers * config.experts // 2 + 4
    resident, offloaded = engine(folder, offload="never"), engine(folder, **options)
    with offloaded.recording(tmp_path / "trace"):  # from the first forward on, as the simulation wants it
        assert greedy(offloaded) == greedy(resident)
    trace = read_trace(tmp_path / "trace")
    assert (trace.header.experts, trace.header.experts_per_token) == (
        config.experts,
        config.experts_per_token,
    )
    assert replay_agrees(trace)
    assert summarize(trace)
    assert torch.equal(offloaded.logits(IDS), resident.logits(IDS))


def test_misses_computed_by_the_host(merged: Model, engine: Callable[..., Engine]) -> None:
    folder = merged.folders["native"]
    offloaded = engine(folder, offload="always", slots=merged.config.experts_per_token, misses="compute")
    assert greedy(offloaded) == greedy(engine(folder, offload="never"))
