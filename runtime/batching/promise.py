"""Whether what a request writes depends on who else is served.

On a CPU it does not. A token that is decoded beside others has the same bits as alone (`model.rows.apart`).
If numba's kernels compute all matrices, they also make a prompt's tokens the same however the prompt is cut,
so a beginning that was computed for another request is the same, too. Elsewhere the last bits of numbers may
differ, and with them, now and then, a token.

Nor does it matter over how many ranks the layers are spread, unless the CPU computes missing experts. Which
ones those are depends on guesses, and no rank guesses another's experts.
"""

from collections.abc import Iterator

from model.kernels.cpu import rowwise
from model.mixtral import Mixtral
from runtime.runner import ModelRunner


def caveats(runner: ModelRunner) -> list[str]:
    """Why a text may depend on the other requests, or on the number of ranks: one line for each reason."""
    found = []
    others = runner.company.plans.plans[1:] if runner.company else ()  # other ranks'
    on_gpu = any(device.type == "cuda" for device in (runner.device, *(plan.device for plan in others)))
    offloads = runner.cache is not None or not all(plan.resident for plan in others)
    if on_gpu:
        found.append(
            "a text may differ in single tokens from the same text served alone, because a GPU computes "
            "several tokens by other kernels than one"
        )
    elif offloads and runner.options.misses != "copy":
        found.append(
            f"a text may differ in single tokens from the same text served alone, because misses is "
            f"{runner.options.misses!r}, and the CPU computes experts of a single text only"
        )
    if runner.company and offloads and runner.options.misses != "copy":
        found.append(
            f"a text may differ in single tokens from what another number of ranks writes, because misses is "
            f"{runner.options.misses!r}, and no rank guesses another's experts"
        )
    if on_gpu or not cuts_alike(runner):
        found.append(
            "a text may differ in single tokens if its prompt's beginning was computed for another request; "
            "a request that says so computes all of its prompt"
        )
    return found


def cuts_alike(runner: ModelRunner) -> bool:
    """Whether a prompt's keys and values have the same bits however it is cut."""
    c = runner.config
    by_rows = rowwise.takes(runner.dtype, runner.device, c.head_dim, c.heads // c.kv_heads)
    return by_rows and c.hidden % 16 == 0 and all(getattr(p, "independent", False) for p in products(runner))


def products(runner: ModelRunner) -> Iterator[object]:
    """What multiplies the rows of a prompt: attention's projections and the experts. The head has one row."""
    model: Mixtral = runner.model
    for block in model.blocks:
        yield block.self_attn.qkv_proj
        yield block.self_attn.o_proj
        experts = getattr(block.block_sparse_moe.experts, "experts", ())
        yield from runner.cache.bound[:1] if runner.cache else list(experts)[:1]
