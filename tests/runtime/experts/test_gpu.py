"""What only a GPU can show of the way that experts take: pinned memory, the copy stream, and the budget."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from runtime import Engine, EngineOptions, SamplingParams
from runtime.experts.arena import Arena
from runtime.experts.copying import CopyEngine
from runtime.experts.cuda_link import PIECE, CudaLink

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = torch.device("cuda", 0)
BLOB = 3 * PIECE + 4096  # bytes


@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("urgent", [True, False])
def test_what_computing_sees_behind_a_mark_has_arrived(pin: bool, urgent: bool) -> None:
    """Slots are overwritten again and again, in the midst of computing with them."""
    arena = Arena(1, 8, BLOB, pin=pin)
    assert arena.pinned == pin
    for e in range(8):
        arena.blob(0, e).fill_(e + 1)
    copies = CopyEngine(CudaLink(GPU, arena.pinned))
    try:
        slots, sums = torch.zeros(2, BLOB, dtype=torch.uint8, device=GPU), []
        busy = torch.rand(2048, 2048, device=GPU)
        free = [copies.link.used()] * 2
        for n in range(24):
            e, slot = n % 8, n % 2
            ticket = copies.submit(arena.blob(0, e), slots[slot], urgent, free[slot])
            copies.wait(ticket)
            busy = busy @ busy / 2048  # computing is behind, the copies could overtake it
            sums.append((slots[slot].long().sum(), (e + 1) * BLOB))
            free[slot] = copies.link.used()
        assert [int(found) for found, _ in sums] == [expected for _, expected in sums]
        assert copies.link.stalled() >= 0
    finally:
        copies.close()
        arena.close()


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Let PyTorch take no more than so many bytes of the device."""
    total = torch.cuda.get_device_properties(GPU).total_memory

    def limit(size: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(GPU)
        torch.cuda.set_per_process_memory_fraction(size / total, GPU)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)


def test_the_plan_is_kept_under_a_hard_limit(
    limited: Callable[[int], None], variant: Callable[..., Path]
) -> None:
    """The driver's share, which PyTorch does not see, is what the plan says or less."""
    folder = variant(
        hidden=1024, ffn=2048, layers=6, experts=8, heads=8, kv_heads=2, head_dim=128, context=4096
    )
    vram = 3 << 29
    limited(vram)
    options = EngineOptions(device="cuda:0", vram=str(vram), dtype="bfloat16", slots=4)
    with Engine.load(folder, options) as engine:
        prompt = torch.randint(3, 400, (2500,)).tolist()
        params = SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)
        assert len(list(engine.generate(prompt, params))) == 40
        reserved, plan = torch.cuda.max_memory_reserved(GPU), engine.plan
        assert not plan.resident and engine.stats().misses > 0
        assert reserved + plan.driver <= vram and plan.device_total <= vram
        free, total = torch.cuda.mem_get_info(GPU)
        assert total - free - torch.cuda.memory_reserved(GPU) <= plan.driver, "or another process is there"


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
