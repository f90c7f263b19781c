"""Numbers that are not finite anywhere in attention end the request with one error, and never become text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.quant.backends.blocks import Blocks
from runtime import Engine, EngineOptions, RequestError, SamplingParams
from tests.runtime.gpu.plain_step import Recorded, use_plain_kernels

H, G, K, D = 4, 2, 16, 64
FIRST_ROW = {"q": K, "k": H * K, "v": (H + G) * K}  # of a head's projection
GREEDY = SamplingParams(max_new_tokens=3, temperature=0, ignore_eos=True)
ERROR = "the model computed NaN; try --dtype float32, or check the checkpoint"
X = 9  # a token like no other


@pytest.fixture(scope="module")
def folder(variant: Callable[..., Path]) -> Path:
    return variant(layers=1)  # so no later layer can show what attention hid


@pytest.fixture(params=["general", "step"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "step":
        use_plain_kernels(monkeypatch)
        monkeypatch.setattr("model.quant.backends.BACKENDS", (Blocks,))
        monkeypatch.setattr("runtime.gpu.decoder.CudaGraphs", lambda device: Recorded())
    monkeypatch.setattr("model.linear.packs", lambda weight: False)  # weights that can be spoilt
    return request.param


@pytest.fixture(params=["never", "always"])
def load(request: pytest.FixtureRequest, folder: Path, path: str) -> Iterator[Callable[[str], Engine]]:
    engines = []

    def load(dtype: str) -> Engine:
        engine = Engine.load(folder, EngineOptions(device="cpu", dtype=dtype, offload=request.param))
        assert (engine.runner.decoder is None) == (path == "general")
        assert (engine.runner.cache is None) == (request.param == "never")
        engines.append(engine)
        return engine

    yield load
    for engine in engines:
        engine.close()


@contextmanager
def spoilt(engine: Engine, projection: str, numbers: Tensor | float) -> Iterator[None]:
    """While inside, one row of a projection has other weights."""
    row = engine.model.layers[0].self_attn.qkv_proj.weight.detach()[FIRST_ROW[projection]]  # type: ignore
    before = row.clone()
    row.copy_(torch.as_tensor(numbers))
    yield
    row.copy_(before)


def text_of(engine: Engine, prompt: list[int]) -> list[int]:
    return [token.id for token in engine.generate(prompt, GREEDY)]


@pytest.mark.parametrize("projection", FIRST_ROW)
@pytest.mark.parametrize(
    ("dtype", "weight"), [("float32", torch.nan), ("bfloat16", torch.nan), ("float16", 6e4)]
)
def test_an_error_and_never_text(
    load: Callable[[str], Engine], dtype: str, weight: float, projection: str
) -> None:
    """In a prompt of one token, of some, and of more than a vector's length; and as a token follows. float16
    overflows: 60000 times what was normed."""
    engine = load(dtype)
    prompts = [[5], [5, 6, 7], [7 * i % 400 for i in range(40)]]
    expected = [text_of(engine, prompt) for prompt in prompts]
    for prompt, text in zip(prompts, expected, strict=True):
        with spoilt(engine, projection, weight), pytest.raises(RequestError) as caught:
            text_of(engine, prompt)
        assert str(caught.value) == ERROR
        tokens = engine.generate(prompt, GREEDY)
        assert next(tokens).id == text[0]
        with spoilt(engine, projection, weight), pytest.raises(RequestError) as caught:
            next(tokens)
        assert str(caught.value) == ERROR
        assert text_of(engine, prompt) == text  # and the next request is right


@pytest.mark.parametrize("projection", FIRST_ROW)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_token_that_overflows_in_an_earlier_chunk(
    load: Callable[[str], Engine], projection: str, sign: int
) -> None:
    """Those behind it see it with any score, or not at all: with a key of infinity, and -infinity."""
    engine = load("float16")
    embeddings = engine.model.embed_tokens.weight.detach()
    embeddings[:, 0] = 0
    embeddings[X] = torch.eye(D)[0]
    others = [i for i in range(3, 400) if i != X]
    prompt = [X, *others, *others][:600]
    assert engine.plan.chunk < len(prompt)
    alone = torch.zeros(D)
    alone[0] = sign * 6e4  # every other token's is 0
    expected = text_of(engine, prompt)
    with spoilt(engine, projection, alone):
        assert text_of(engine, others[:5])  # X is not there
        for length in (2, 300, 600):
            with pytest.raises(RequestError, match="computed NaN"):
                text_of(engine, prompt[:length])
        with engine.session() as session:
            session.prefill(others[:5])
            assert session.step(X).isnan().all()  # which ends a request
            if projection != "q":  # what is in the cache shows for ever
                assert all(session.step(token).isnan().all() for token in others[:5])
    assert text_of(engine, prompt) == expected
