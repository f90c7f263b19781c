"""The terms of a plan against the tensors that are really there."""

import dataclasses
import itertools
import weakref
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention import Attending, attend_by_scores
from model.kv_cache import KVCache
from model.kv_codes import STRETCH
from model.mixtral import Block, Mixtral
from model.moe import Experts, ManyTokens, ResidentExperts
from model.router import Choice
from model.target import Target
from runtime.planning.plan import MAX_CHUNK, PREFILL_CHUNK, lay_out
from tests.runtime.planning.asked import CPU, SMALL, asked, plan


def size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [2, 700, 4096])
def test_trunk_experts_and_kv_are_the_bytes_of_the_real_tensors(dtype: torch.dtype, context: int) -> None:
    model = Mixtral(SMALL, dtype)
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name]
    trunk = [weight for name, weight in model.named_parameters() if ".experts." not in name]
    kv = KVCache.allocate(SMALL, 1, context, dtype, CPU)

    planned = plan(SMALL, dtype, context)
    assert planned.resident and planned.slots_per_layer == (5, 5, 5) and planned.spares == 0
    assert planned.slots_bytes == size(experts) == 15 * planned.blob_bytes
    assert planned.trunk_bytes == size([*trunk, model.rope.cos, model.rope.sin])
    assert planned.kv_bytes == size([tensor for layer in kv.layers for tensor in (layer.k, layer.v)])
    assert (
        planned.device_bytes
        == planned.trunk_bytes + planned.slots_bytes + planned.kv_bytes + planned.workspace_bytes
    )
    assert planned.host_bytes == 0


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside took at once; what kernels allocate within is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def as_they_arrive(experts: ResidentExperts) -> Experts:
    """The same experts, their outputs held apart until all are there, as the cache does it."""

    def apply(x: Tensor, choice: Choice) -> Tensor:
        counts = choice.ids.flatten().bincount(minlength=len(experts.experts)).tolist()
        sums = ManyTokens(x, choice, counts)
        for e in reversed(choice.ids.unique().tolist()):  # the order in which most is held
            sums.add(e, experts.experts[e](sums.inputs(e)))
        return sums.total()

    return apply


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("hidden", "ffn", "dtype"), [
    (128, 256, torch.float32), (256, 896, torch.bfloat16), (32, 32, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize(("context", "large"), [(128, False), (700, False), (2500, True)])
def test_the_workspace_is_enough_for_a_chunk_and_not_far_too_much(
    context: int, large: bool, hidden: int, ffn: int, dtype: torch.dtype, resident: bool, kv_bits: int
) -> None:
    config = dataclasses.replace(SMALL, layers=2, hidden=hidden, ffn=ffn)
    blob = 1 << 40 if large else None  # next to such an expert, a chunk may be as large as it likes
    planned = lay_out(asked(config, dtype, context, expert=blob, kv=kv_bits), (2, 2), resident)
    N = planned.chunk
    assert planned.chunk == (MAX_CHUNK if large else min(PREFILL_CHUNK, context))

    torch.manual_seed(0)
    provide = [ResidentExperts(config, dtype, CPU) for _ in range(2)]
    model = Mixtral(
        config, dtype, experts=lambda n: provide[n] if resident else as_they_arrive(provide[n])
    ).requires_grad_(False)
    for weight in [*model.parameters(), *(w for experts in provide for w in experts.parameters())]:
        weight.detach().normal_(std=0.1)
    for gate in (weight for name, weight in model.named_parameters() if "gate" in name):
        gate.zero_()  # all tokens choose the same experts: the most rows at once
    kv = KVCache.allocate(config, 1, context, dtype, CPU, kv_bits)
    kv.length = context - N
    with torch.inference_mode(), LiveBytes() as measured:
        model(torch.randint(config.vocab, (1, N)), kv, last=True)
    unseen = N * context * dtype.itemsize if context > N else 0  # the kernel's own copy of the mask
    plain = asked(config, dtype, context, expert=blob, attending=Attending.FLASH, kv=kv_bits)
    without = lay_out(plain, (2, 2), resident)
    assert planned.workspace_bytes - without.workspace_bytes == N * context * (1 + dtype.itemsize)
    assert planned.workspace_bytes >= measured.peak + unseen
    assert planned.workspace_bytes <= 4 * (measured.peak + unseen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [2, 700, 4096])
def test_codes_take_less_of_the_cache_and_some_of_the_workspace(dtype: torch.dtype, context: int) -> None:
    kv = KVCache.allocate(SMALL, 1, context, dtype, CPU, bits=8)
    scales = [scale for layer in kv.layers for scale in layer.scales or ()]
    tensors = [tensor for layer in kv.layers for tensor in (layer.k, layer.v)] + scales
    wide, coded = plan(SMALL, dtype, context), plan(SMALL, dtype, context, kv=8)
    assert (wide.kv, coded.kv) == (16, 8)
    assert coded.kv_bytes == size(tensors) == wide.kv_bytes * 36 // (32 * dtype.itemsize)
    decoded = SMALL.kv_heads * SMALL.head_dim * (2 * context * dtype.itemsize + 4 * min(context, STRETCH))
    changed = {"kv": 8, "kv_bytes": coded.kv_bytes, "workspace_bytes": wide.workspace_bytes + decoded}
    assert coded == dataclasses.replace(wide, **changed)  # type: ignore[arg-type]
    if context == 4096:
        assert coded.device_bytes < wide.device_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "S"), [(2, 2), (512, 512), (512, 1500)])
def test_scores_of_a_gpu_without_flash_attention_are_counted(T: int, S: int, dtype: torch.dtype) -> None:
    H, G, K = SMALL.heads, SMALL.kv_heads, SMALL.head_dim
    q, k = torch.randn(1, H, T, K).to(dtype), torch.randn(1, G, S, K).to(dtype)
    with torch.inference_mode(), LiveBytes() as measured:
        out = attend_by_scores(q, k, k)
    counted = Attending.SCORES.bytes(SMALL, dtype, T, S)
    assert measured.peak - out.nbytes <= counted <= 1.7 * (measured.peak - out.nbytes)


def test_a_plan_has_them_and_cuts_prompts_as_ever() -> None:
    for dtype, capability in ((torch.float16, (7, 5)), (torch.float32, (9, 0))):
        way = Attending.of(SMALL, dtype, Target.hypothetical(capability))
        plans = [plan(SMALL, dtype, 4096, attending=each) for each in (way, Attending.FLASH)]
        more = way.bytes(SMALL, dtype, plans[0].chunk, 4096)
        assert (
            plans[0].workspace_bytes - plans[1].workspace_bytes == more > 0
            and plans[0].chunk == plans[1].chunk
        )


def test_a_chunk_is_as_long_as_experts_are_large_whatever_the_context() -> None:
    assert [plan(SMALL, torch.float32, 4096, expert=size << 20).chunk for size in (1, 11, 22)] == [
        512, 1024, 2048,
    ]  # fmt: skip
    contexts = range(2, 4096, 50)
    plans = [plan(SMALL, torch.float32, context, expert=22 << 20) for context in contexts]
    assert [planned.chunk for planned in plans] == [min(context, MAX_CHUNK) for context in contexts]
    assert all(a.workspace_bytes < b.workspace_bytes for a, b in itertools.pairwise(plans))


@pytest.mark.parametrize("distance", [1, 2])
def test_gates_that_look_ahead_are_counted(distance: int) -> None:
    model = Mixtral(SMALL, torch.bfloat16)
    blocks = [cast(Block, block) for block in model.layers]
    for gate in (block.block_sparse_moe.gate for block in blocks):
        gate.weight.detach().normal_()
    model.look_ahead(distance)
    model.prepare_step()
    routers = [block.block_sparse_moe.gate for block in blocks]
    ahead = [router.ahead for router in routers]
    routed = [router.gates if router.ahead is not None else None for router in routers]
    for shared, held in ((True, [ahead]), (False, [ahead, routed])):
        request = asked(SMALL, torch.bfloat16, 100, lookahead=distance, shared=shared)
        planned = lay_out(request, (2, 2, 2))
        gates = planned.staging_bytes - planned.spares * planned.blob_bytes
        real = size(gate for group in held for gate in group if gate is not None)
        assert real <= gates <= 3 * real, "the last layers have fewer"
        assert lay_out(request.changed(prefetch=0), (2, 2, 2)).staging_bytes == 0
        assert lay_out(request, (5, 5, 5), resident=True).staging_bytes == 0
