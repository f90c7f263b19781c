"""What only a GPU can show: pinned memory, the copy stream, and the memory budget."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.target import Target
from runtime import Engine, EngineOptions, SamplingParams
from runtime.experts import arena as arena_module
from runtime.experts.arena import Arena
from runtime.experts.copying import CopyEngine
from runtime.experts.cuda_link import PIECE, CudaLink
from runtime.planning import memory
from tests.quantized import quantize_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = torch.device("cuda", 0)
BLOB = 3 * PIECE + 4096  # bytes


@pytest.mark.parametrize("locked", ["all", "half", "none"])
@pytest.mark.parametrize("demand", [True, False])
@pytest.mark.parametrize("size", [BLOB, BLOB - 4096 - 16])
def test_what_computing_sees_after_a_mark_has_arrived(
    size: int, demand: bool, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies overwrite two slots again and again while the device computes with them. The arena is locked in
    many runs."""
    monkeypatch.setattr(arena_module, "PIN_BYTES", 2 * BLOB)
    pin = locked != "none"
    arena = Arena(8, size, pin, GPU)
    middle = arena.berth(4).data_ptr()
    ways = {"all": None, "half": lambda source: source.data_ptr() < middle, "none": arena.locked}
    assert arena.pinned == pin and len(arena.registered) == 4 * pin
    for e in range(8):
        arena.berth(e).fill_(e + 1)
    copies = CopyEngine(CudaLink(GPU, ways[locked]))
    copies.start(arena)
    try:
        slots, sums = torch.zeros(2, size, dtype=torch.uint8, device=GPU), []
        busy = torch.rand(2048, 2048, device=GPU)
        free = [copies.link.used()] * 2
        for n in range(24):
            e, slot = n % 8, n % 2
            ticket = copies.submit(arena.berth(e)[:size], slots[slot], demand, free[slot])
            copies.wait(ticket)
            busy = busy @ busy / 2048  # the device lags, so copies could overtake it
            sums.append((slots[slot].long().sum(), (e + 1) * size))
            free[slot] = copies.link.used()
        assert [int(found) for found, _ in sums] == [expected for _, expected in sums]
        assert copies.link.stalled() >= 0
    finally:
        copies.close()
        arena.close()


@pytest.fixture
def limited() -> Iterator[Callable[[int], int]]:
    """Limits PyTorch to a number of bytes of the device, beside those that it keeps by now for cuBLAS on
    other streams. Returns the number of those."""
    total = torch.cuda.get_device_properties(GPU).total_memory

    def limit(size: int) -> int:
        memory.release(GPU)
        torch.cuda.reset_peak_memory_stats(GPU)
        before = torch.cuda.memory_reserved(GPU)
        torch.cuda.set_per_process_memory_fraction((before + size) / total, GPU)
        return before

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)


@pytest.fixture(scope="module")
def quantized(variant: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in 4 bits whose experts are most of it."""
    plain = variant(
        hidden=1024, ffn=1792, layers=4, experts=8, heads=8, kv_heads=2, head_dim=128, context=8192
    )
    return quantize_folder(plain, tmp_path_factory.mktemp("quantized") / "4", "4")


def test_the_plan_is_kept_under_a_hard_limit(limited: Callable[[int], int], quantized: Path) -> None:
    """Slots fill the budget. PyTorch takes no byte more than planned for it, and not much less. The driver's
    share, which PyTorch does not see, is at most what the plan says."""
    vram = memory.overhead_bytes(Target.of(GPU)) + (720 << 20)
    before = limited(vram - memory.driver_bytes(Target.of(GPU)))
    options = EngineOptions(device="cuda:0", vram=str(vram), dtype="bfloat16", context=8192)
    with Engine.load(quantized, options) as engine:
        plan = engine.plan
        assert not plan.resident and plan.device_bytes <= vram < plan.device_bytes + plan.blob_bytes
        prompt = torch.randint(3, 400, (5000,)).tolist()
        params = SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)
        for _ in range(2):
            assert len(list(engine.generate(prompt, params))) == 40
        assert engine.stats().misses > 0 and len(prompt) > 2 * plan.chunk
        reserved = torch.cuda.max_memory_reserved(GPU) - before
        inside = plan.device_bytes - plan.driver_bytes
        assert inside - plan.overhead_bytes <= reserved <= inside
        free, total = torch.cuda.mem_get_info(GPU)
        outside = total - free - torch.cuda.memory_reserved(GPU)
        assert outside <= plan.driver_bytes, "or another process is there"


def test_a_closed_engine_gives_back_what_it_took(quantized: Path) -> None:
    options = EngineOptions(device="cuda:0", vram="1GiB", offload="always", slots=3)
    params = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)
    plans, free = [], []
    for _ in range(3):
        with Engine.load(quantized, options) as engine:
            plans.append(engine.plan)
            assert len(list(engine.generate([1, 2, 3], params))) == 4
        free.append(memory.free_device_bytes(GPU) or 0)
    assert plans[0] == plans[1] == plans[2]
    assert free[0] - free[2] < 96 << 20, "no more than cuBLAS's workspaces for the streams that captured"
    block = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    assert free[2] - (memory.free_device_bytes(GPU) or 0) >= block.nbytes
    del block  # and PyTorch keeps it
    assert free[2] - (memory.free_device_bytes(GPU) or 0) < 32 << 20


def test_decoding_asks_the_driver_for_no_memory(
    variant: Callable[..., Path],
) -> None:
    options = EngineOptions(device="cuda:0", offload="always", slots=2)
    with Engine.load(variant(hidden=64, ffn=64, layers=3, experts=8, context=640), options) as engine:
        params = SamplingParams(max_new_tokens=200, temperature=0, ignore_eos=True)
        tokens = engine.generate([1, 2, 3], params)
        for _ in range(20):
            next(tokens)
        before = torch.cuda.memory_stats(GPU)["num_device_alloc"]
        assert len(list(tokens)) == 180
        assert torch.cuda.memory_stats(GPU)["num_device_alloc"] == before
