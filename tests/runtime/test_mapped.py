"""Engines whose weights are views of mapped files: they give the same bits as read ones, and copy nothing."""

import errno
import gc
import mmap
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import open_checkpoint
from model.moe import SparseMoE
from model.quant.backends import int4pack
from model.quant.backends.blocks import Blocks
from model.quant.expert import BlobExperts
from model.quant.product import QuantizedLinear
from model.quant.spec import QuantSpec
from model.quant.streams import Field, matrix_fields
from runtime import Engine, EngineOptions, LoadError, SamplingParams
from runtime import generate as command
from runtime.units import format_bytes
from tests.leftovers import open_below
from tests.quantized import quantizer

ROOT = Path(__file__).resolve().parents[2]
IDS = [1, *range(30, 75), 2, 2]
GREEDY = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def quantized(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    source = variant(hidden=128, head_dim=32, ffn=256)
    return quantizer(source, tmp_path_factory.mktemp("quantized"))


@pytest.fixture
def folder(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return shutil.copytree(quantized(4, 3), tmp_path / "model")


def answers(engine: Engine) -> tuple[Tensor, list[int]]:
    return engine.logits(IDS), [token.id for token in engine.generate(IDS, GREEDY)]


def weights(engine: Engine) -> Iterator[Tensor]:
    """The tensors of quantized matrices of the trunk, and the blobs of resident experts."""
    for module in engine.model.modules():
        if isinstance(module, QuantizedLinear):
            yield from module.memory.values()
        elif isinstance(module, SparseMoE) and isinstance(module.experts, BlobExperts):
            yield from module.experts.blobs


def is_mapped(engine: Engine, tensor: Tensor) -> bool:
    """Whether a tensor lies in the mapping of a file."""
    starts = [(file.bytes.data_ptr(), len(file.bytes)) for file in engine.runner.files.files.values()]
    return any(0 <= tensor.data_ptr() - start <= size - tensor.nbytes for start, size in starts)


# --- the same bits, from mappings


@pytest.mark.parametrize("options", [{}, {"offload": "always", "slots": 2}])
@pytest.mark.parametrize(
    ("attention", "experts", "head"),
    [(16, 4, 16), (4, 16, 8), (4, 2, 4), (8, 3, 16), (3, 8, 3), ("4g16", "2g64", "8g16"), (16, 16, 8)],
)
def test_mapped_weights_give_the_bits_of_read_ones(
    attention: object,
    experts: object,
    head: object,
    options: dict[str, object],
    quantized: Callable[..., Path],
    load: Callable[..., Engine],
) -> None:
    folder = quantized(attention, experts, head)
    mapped, read = load(folder, **options), load(folder, map=False, **options)
    for one, other in zip(answers(mapped), answers(read), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert read.runner.files is None and read.plan.mapped_bytes == 0
    resident = mapped.plan.resident
    views = [is_mapped(mapped, tensor) for tensor in weights(mapped)] if mapped.plan.mapped_bytes else []
    assert all(views) or experts == 16, "float32 experts are no bytes of a file"
    assert bool(views) == (attention != 16 or head != 16 or resident)
    if head != 16:
        assert all(is_mapped(mapped, t) for t in cast(QuantizedLinear, mapped.model.lm_head).memory.values())
    assert mapped.plan.chunk == read.plan.chunk


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("attention", "experts"), [(4, 3), (4, 16), (16, 16), (8, 2), (3, 8), ("4g16", "2g64")]
)
def test_in_bfloat16_embeddings_and_16_bit_experts_are_mapped_too(
    attention: object,
    experts: object,
    quantized: Callable[..., Path],
    load: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int4pack, "kernel_block", lambda: 0)  # no backend wants another order
    folder = quantized(attention, experts)
    mapped, read = (load(folder, dtype="bfloat16", map=wish) for wish in (True, False))
    for one, other in zip(answers(mapped), answers(read), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert all(is_mapped(mapped, tensor) for tensor in weights(mapped))
    assert is_mapped(mapped, mapped.model.embed_tokens.weight)
    assert mapped.plan.slots_bytes == 0
    assert f"; {format_bytes(mapped.plan.mapped_bytes)} of files mapped; context" in str(mapped.plan)


def test_what_a_backend_keeps_in_another_order_is_read(
    quantized: Callable[..., Path], load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(name: str, shape: tuple[int, int], spec: QuantSpec, offset: int = 0) -> list[Field]:
        """What files have, and 16 bytes."""
        fields = matrix_fields(name, shape, spec, offset)
        return [*fields, Field(f"{name}.more", torch.uint8, (16,), fields[-1].end)]

    monkeypatch.setattr(Blocks, "fields", staticmethod(more))
    engine = load(quantized(4, 3))
    assert engine.runner.files is None and engine.plan.mapped_bytes == 0
    read = engine.logits(IDS)
    monkeypatch.undo()
    mapped = load(quantized(4, 3))
    assert engine.plan.slots_bytes + engine.plan.trunk_bytes > mapped.plan.mapped_bytes > 0
    assert torch.equal(mapped.logits(IDS), read)


def test_files_in_another_order_are_read(
    folder: Path, quantized: Callable[..., Path], load: Callable[..., Engine]
) -> None:
    """Another program may have written the same tensors again."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(load_file(path), path, metadata)  # sorts them
    assert open_checkpoint(folder).mappable is None
    engine = load(folder)
    assert engine.plan.mapped_bytes == 0
    assert torch.equal(engine.logits(IDS), load(quantized(4, 3)).logits(IDS))


def test_unquantized_checkpoints_are_read(load: Callable[..., Engine]) -> None:
    assert load().runner.files is None


def test_nothing_is_copied_and_nothing_warned_of(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine.load(folder, EngineOptions(device="cpu", dtype="float32"))
    assert engine.plan.mapped_bytes == engine.runner.files.bytes
    assert engine.plan.device_bytes < Engine.plan(
        folder, EngineOptions(device="cpu", dtype="float32", map=False)
    ).device_bytes  # fmt: skip
    engine.close()


@LINUX
def test_the_pages_are_shared_and_given_back_with_the_engine(folder: Path) -> None:
    engine = Engine.load(folder, EngineOptions(device="cpu", dtype="float32"))
    engine.logits(IDS)
    sizes = [kibibytes(part) for part in mappings(folder)]
    assert sum(part["Rss"] for part in sizes) > 0
    assert sum(part["Anonymous"] for part in sizes) == 0, "pages of its own"
    modes = {part.split(maxsplit=2)[1] for part in mappings(folder)}
    assert modes == {"r--s"}
    assert open_below(folder)
    engine.close()
    gc.collect()
    assert mappings(folder) == [] and open_below(folder) == []


@LINUX
def test_an_engine_that_is_dropped_gives_them_back_too(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine.load(folder, EngineOptions(device="cpu", dtype="float32"))
        assert mappings(folder)
        del engine
        gc.collect()
    assert mappings(folder) == [] and open_below(folder) == []


def mappings(folder: Path) -> list[str]:
    """What the system says about each mapping of a file in `folder`."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return [part for part in parts if f"{folder}{os.sep}" in part]


def kibibytes(part: str) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", part, re.MULTILINE)}


@contextmanager
def counting(seen: list[int], total: int) -> Iterator[Callable[[int], None]]:
    seen.append(total)
    yield seen.append


def test_what_is_mapped_counts_as_read_at_once(folder: Path) -> None:
    seen: list[int] = []
    options = EngineOptions(device="cpu", dtype="float32")
    with Engine.load(folder, options, progress=lambda total: counting(seen, total)) as engine:
        total, first, *_ = seen
        assert total == sum(seen[1:]) == open_checkpoint(folder).bytes
        assert first == engine.plan.mapped_bytes


# --- what cannot be mapped


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENODEV, "--no-map reads it"), (errno.ENOMEM, "raise the limit of address space"),
])  # fmt: skip
def test_a_file_that_cannot_be_mapped_is_an_error_with_the_remedy(
    folder: Path,
    load: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    remedy: str,
) -> None:
    """A file system may have no mappings, and a process too few addresses."""

    real = mmap.mmap

    def refuse(file: int, *words: int, **more: int) -> mmap.mmap:
        if file == -1:  # memory, of no file
            return real(file, *words, **more)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(mmap, "mmap", refuse)
    reason = re.escape(os.strerror(number))
    with pytest.raises(LoadError, match=rf"safetensors: cannot be mapped \({reason}\); {remedy}"):
        load(folder)
    words = ["--model", str(folder), "--prompt", "def", "--max-new-tokens", "2", "--device", "cpu"]
    assert command.main([*words, "--quiet", "--dtype", "float32"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_map_is_a_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder), "--prompt", "def", "--max-new-tokens", "2", "--device", "cpu"]
    lines = []
    for more in ([], ["--no-map"]):
        assert command.main([*words, "--dtype", "float32", "--temperature", "0", *more]) == 0
        out, err = capsys.readouterr()
        lines.append((out, "of files mapped" in err))
    assert lines[0][0] == lines[1][0] and (lines[0][1], lines[1][1]) == (True, False)


def test_a_file_that_vanishes_before_it_is_mapped(folder: Path) -> None:
    @contextmanager
    def vanishing(total: int) -> Iterator[Callable[[int], None]]:
        max(folder.glob("*.safetensors")).unlink()
        yield lambda size: None

    with pytest.raises(LoadError, match=r"safetensors: cannot be mapped \(No such file"):
        Engine.load(folder, EngineOptions(device="cpu", dtype="float32"), progress=vanishing)


def test_a_model_larger_than_memory_runs_and_says_so(
    folder: Path, load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load(folder).plan
    ram = plan.device_bytes + plan.mapped_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, ram=str(ram))
    with pytest.warns(
        RuntimeWarning, match=r"the model is 100 B larger than memory on cpu under --ram "
    ) as w:
        load(folder, ram=str(ram - 100))
    assert len(w) == 1 and w[0].filename == str(ROOT / "tests/runtime/conftest.py")
    monkeypatch.setattr("runtime.planning.request.free_device_bytes", lambda device: plan.device_bytes + 1)
    with pytest.warns(RuntimeWarning, match=r"larger than memory on cpu \(.*again and again") as w:
        Engine.plan(folder, EngineOptions(device="cpu", dtype="float32"))
    assert len(w) == 1 and w[0].filename == __file__
