"""Quantized checkpoints in an engine, against the network with dequantized weights."""

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, open_checkpoint
from model.checkpoint.native import native_shards
from model.linear import Linear, PackedLinear
from model.mixtral import Mixtral
from model.moe import SparseMoE
from model.quant.backends import int4pack
from model.quant.expert import BlobExperts, aligned
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from model.quant.tensor import QuantizedTensor
from model.target import Target
from runtime import Engine, EngineOptions, LoadError, SamplingParams
from runtime import generate as command
from runtime.planning.device import pick_dtype
from tests.quantized import quantizer

IDS = [1, *range(30, 75), 2, 2]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
FORMATS = [(16, 4, 16), (4, 16, 8), (4, 2, 4), (8, 3, 16), (3, 8, 3), (2, 4, 8), (16, 16, 16), (16, 16, 8)]


@pytest.fixture(scope="module")
def quantized(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    source = variant(vocab=448, hidden=128, head_dim=32, ffn=256)
    return quantizer(source, tmp_path_factory.mktemp("quantized"))


def dequantized(checkpoint: Checkpoint) -> Mixtral:
    """The plain network in float32, with the weights that the checkpoint's streams encode."""
    model = Mixtral(checkpoint.config).requires_grad_(False)
    parameters = dict(model.named_parameters())
    for shard in native_shards(checkpoint.config, checkpoint.formats, checkpoint.dtype):
        for stored in shard.parameters:
            weight = parameters[stored.name]
            tensors = {t.name: torch.empty(t.shape, dtype=t.dtype) for t in stored.tensors}
            checkpoint.fill(tensors)
            if stored.spec.quantized:
                streams = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
                N, K = weight.shape
                weight.copy_(QuantizedTensor.of(stored.spec, (N, K), streams).dequantize())
            else:
                weight.copy_(checkpoint.read(stored.name, weight.device))
    return model


def reference_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return dequantized(open_checkpoint(folder))(torch.tensor([IDS]))[0]


def held(engine: Engine) -> tuple[int, int, int]:
    """The bytes that trunk and experts really take, and those that are mapped."""
    files = engine.runner.files
    mappings = {file.bytes.data_ptr() for file in files.files.values()} if files else set()
    mapped, model = 0, engine.model

    def allocated(tensors: Iterable[Tensor]) -> int:
        nonlocal mapped
        own = 0
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() in mappings:
                mapped += tensor.nbytes
            else:
                own += tensor.nbytes
        return own

    trunk = model.rope.cos.nbytes + model.rope.sin.nbytes + allocated(model.parameters())
    experts = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            trunk += aligned(allocated(module.memory.values()))
        elif isinstance(module, PackedLinear):
            trunk += module.packed.numel() * 2
        elif isinstance(module, SparseMoE) and isinstance(module.experts, BlobExperts):
            experts += allocated(module.experts.blobs)
    return trunk, experts, mapped


def planned(engine: Engine) -> tuple[int, int, int]:
    return engine.plan.trunk_bytes, engine.plan.slots_bytes, engine.plan.mapped_bytes


def test_quantized_attention_is_one_piece_of_memory(
    quantized: Callable[..., Path], load: Callable[..., Engine]
) -> None:
    model = load(quantized(3, 4), dtype="float32", map=False).model
    memories = [list(m.memory.values()) for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(memories) == 4
    [whole] = {stream.untyped_storage().nbytes() for memory in memories for stream in memory}
    ends = [(min(t.data_ptr() for t in m), max(t.data_ptr() + t.nbytes for t in m)) for m in memories]
    assert all(end <= start for (_, end), (start, _) in pairwise(ends)) and ends[-1][1] - ends[0][0] <= whole
    assert all((start - ends[0][0]) % 256 == 0 for start, _ in ends)


def test_a_quantized_head_is_the_product_with_its_weights(
    quantized: Callable[..., Path], load: Callable[..., Engine]
) -> None:
    folder = quantized(16, 16, 8)
    head, weight = load(folder, dtype="float32").model.lm_head, dequantized(open_checkpoint(folder)).lm_head
    assert isinstance(head, QuantizedLinear) and head.spec == QuantSpec(8)
    for shape in ((1, 1, 128), (1, 40, 128)):
        x = torch.randn(shape)
        torch.testing.assert_close(head(x), x @ cast(Linear, weight).weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_head_gives_the_same_bits_wherever_experts_are(
    dtype: str, quantized: Callable[..., Path], load: Callable[..., Engine]
) -> None:
    folder = quantized(4, 2, 4)
    resident = load(folder, dtype=dtype, offload="never")
    offloaded = load(folder, dtype=dtype, offload="always", slots=2)
    assert torch.equal(resident.logits(IDS), offloaded.logits(IDS))
    assert torch.equal(token_logits(resident, IDS), token_logits(offloaded, IDS))
    assert resident.plan.trunk_bytes == offloaded.plan.trunk_bytes


@pytest.mark.parametrize("formats", FORMATS)
def test_all_widths_load_without_a_flag(
    formats: tuple[int, int, int], quantized: Callable[..., Path], load: Callable[..., Engine]
) -> None:
    folder = quantized(*formats)
    expected = reference_logits(folder)
    assert expected.std() > 0.5
    engine = load(folder, dtype="float32")
    logits = engine.logits(IDS)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    greedy = [token.id for token in engine.generate(IDS, GREEDY)]
    assert len(greedy) == 8 and greedy[0] == int(logits[-1].argmax())
    assert planned(engine) == held(engine)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("formats", [(16, 4, 16), (4, 16, 16), (4, 2, 8), (3, 8, 4), (2, 3, 16), (16, 16, 3)])
def test_half_precision_is_near(
    formats: tuple[int, int, int], dtype: str, quantized: Callable[..., Path], load: Callable[..., Engine]
) -> None:
    folder = quantized(*formats)
    expected, engine = reference_logits(folder), load(folder, dtype=dtype)
    logits = engine.logits(IDS)
    distance = (logits - expected).norm(dim=1) / expected.norm(dim=1)  # [T]; a routing on the edge may tip
    assert distance.median() < 0.12  # activations of 8 bits tip more of them than half precision does
    one_by_one = torch.stack([token_logits(engine, IDS[: n + 1]) for n in (0, 20, len(IDS) - 1)])
    known = one_by_one[0] > -torch.inf  # the tokenizer lacks the last ids
    one_by_one, together = one_by_one[:, known], logits[[0, 20, -1]][:, known]
    assert ((one_by_one - together).norm(dim=1) / together.norm(dim=1)).median() < 0.05
    assert planned(engine) == held(engine)
    assert len(list(engine.generate(IDS, GREEDY))) == 8


def token_logits(engine: Engine, ids: list[int]) -> Tensor:  # [V]
    """Computed one token at a time, as decoding does."""
    kv = engine.runner.take_kv()
    for i in ids:
        logits = engine.runner.forward([i], kv)
    engine.runner.give_kv(kv)
    return logits


@pytest.mark.parametrize("formats", [(4, 2, 4), (4, 16, 8), (16, 4, 16), (16, 16, 16), (16, 16, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_progress_adds_up_to_the_bytes_of_the_files(
    formats: tuple[int, int, int], dtype: str, quantized: Callable[..., Path]
) -> None:
    folder, seen, totals = quantized(*formats), [], []

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], None]]:
        totals.append(total)
        yield seen.append

    Engine.load(folder, EngineOptions(device="cpu", dtype=dtype), progress=bar).close()
    assert totals == [sum(seen)] == [open_checkpoint(folder).bytes]
    assert len(seen) > 4


def test_the_dtype_of_quantized_weights_is_the_fast_products(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    cpu = Target(torch.device("cpu"))
    assert pick_dtype(None, cpu, 1000, quantized=True) == torch.bfloat16
    request.getfixturevalue("without_numba")
    monkeypatch.setattr(int4pack, "kernel_block", lambda: 32)
    assert pick_dtype(None, cpu, 1000, quantized=True) == torch.bfloat16
    assert pick_dtype(None, cpu, 1000) == torch.float32
    monkeypatch.setattr(int4pack, "kernel_block", lambda: 0)
    assert pick_dtype(None, cpu, 1000, quantized=True) == torch.float32


# --- what goes wrong


def test_a_file_that_is_too_short(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(quantized(4, 2), tmp_path / "short")
    last = max(folder.glob("*.safetensors"))
    data = last.read_bytes()
    last.write_bytes(data[:-1000])
    with pytest.raises(LoadError, match=last.name):
        Engine.load(folder, EngineOptions(device="cpu"))

    last.write_bytes(data)

    @contextmanager
    def shrinking(total: int) -> Iterator[Callable[[int], None]]:
        """Headers have been checked by now."""
        last.write_bytes(data[:-1000])
        yield lambda size: None

    with pytest.raises(LoadError, match=rf"{last.name}: ended \d+ bytes early, in .*experts\.3\.w2"):
        Engine.load(folder, EngineOptions(device="cpu"), progress=shrinking)


def caught(folder: Path, **options: str) -> list[str]:
    """The warnings of loading an engine."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        Engine.load(folder, EngineOptions(device="cpu", **options)).close()  # type: ignore[arg-type]
    assert all(w.category is RuntimeWarning for w in raised)
    return [str(w.message) for w in raised]


def test_a_slow_product_is_warned_of_once_for_each_reason(
    quantized: Callable[..., Path], without_numba: str
) -> None:
    assert caught(quantized(4, 2), dtype="float32") == []
    for dtype in ("float16", "bfloat16"):
        (warning,) = caught(quantized(4, 2), dtype=dtype)
        assert warning == (
            "attention in format 4 and experts in format 2: computed slowly, because the fast product "
            + without_numba
        )
    assert [w.split(":")[0] for w in caught(quantized(16, 4), dtype="float16")] == ["experts in format 4"]
    assert [w.split(":")[0] for w in caught(quantized(4, 16), dtype="float16")] == ["attention in format 4"]
    (warning,) = caught(quantized(4, 2, 4), dtype="float16")
    assert warning.startswith("attention in format 4, head in format 4 and experts in format 2: computed")
    assert "pip install 'numba" in without_numba


@pytest.mark.parametrize("block", [None, 0])
def test_without_a_kernel_the_answer_is_the_same(
    block: int | None,
    quantized: Callable[..., Path],
    load: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    without_numba: str,
) -> None:
    """PyTorch's kernel takes the place of numba's, and if there is none, expanding the weights does."""
    folder = quantized(4, 2)
    if block is not None:
        monkeypatch.setattr(int4pack, "kernel_block", lambda: block)
    with pytest.warns(RuntimeWarning, match="computed slowly"):
        logits = load(folder, dtype="bfloat16").logits(IDS)
    expected = reference_logits(folder)
    assert ((logits - expected).norm(dim=1) / expected.norm(dim=1)).median() < 0.05


def test_with_the_kernel_nothing_is_warned_of(quantized: Callable[..., Path]) -> None:
    for formats in FORMATS:
        assert caught(quantized(*formats), dtype="bfloat16") == []


def test_the_command_line_shows_a_warning_as_one_line(
    quantized: Callable[..., Path], capfd: pytest.CaptureFixture[str], without_numba: str
) -> None:
    words = ["--model", str(quantized(4, 2)), "--device", "cpu", "--prompt", "def", "--max-new-tokens", "3"]
    before = warnings.showwarning
    for _ in range(2):  # the second time, too
        assert command.main([*words, "--quiet", "--dtype", "float16"]) == 0
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("warning: attention in format 4 and experts in format 2: computed slowly")
    assert command.main([*words, "--quiet", "--dtype", "float32"]) == 0
    assert capfd.readouterr().err == ""
    assert warnings.showwarning is before
