"""Makes an expert cache, with its memory and the channels that fill it."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice

import torch

from model.quant.expert import ExpertFormat
from runtime.experts.arena import Arena, unlocked_remedy
from runtime.experts.berths import Berths
from runtime.experts.cache import ExpertCache
from runtime.experts.copying import CopyEngine
from runtime.experts.cuda_link import CudaLink, CudaReturn
from runtime.experts.files import DiskLink, ExpertFiles
from runtime.experts.link import HostLink, Link
from runtime.experts.policy import LRU, PolicyMaker, make_policy
from runtime.experts.slots import SlotTable, Spares
from runtime.experts.store import Channels, Store
from runtime.experts.tiers import SPARE_BERTHS, SPARE_SLOTS
from runtime.units import format_bytes


def make_cache(
    form: ExpertFormat,
    device: torch.device,
    experts: int,
    slots_per_layer: Sequence[int],
    spares: int,
    berths: int,
    policy: str | PolicyMaker = "lru",
    prefetch: int = 1,
    link_gbps: float | None = None,
    disk_gbps: float | None = None,
    files: ExpertFiles | None = None,
) -> ExpertCache:
    """A cache with slots and spares, and an arena with `berths` for the `experts` of all layers. With fewer
    than all, `files` have the others, and `SPARE_SLOTS` of the spares are for experts that leave. On a CPU,
    copies and reads are slowed down to the given rates; a GPU's are not.

    The caller fills the berths (`Store.load`), and closes the cache after its last use. That closes the
    files. Raises `DeviceError` if the host cannot give that much memory.
    """
    pinned_for = device if device.type == "cuda" else None
    with ExitStack() as on_error:
        if files:
            on_error.callback(files.close)
        arena = Arena(berths, form.blob_bytes, pinned_for is not None, pinned_for, tiered=files is not None)
        on_error.callback(arena.close)
        if pinned_for and not arena.pinned:
            warn_of_unlocked(arena)
        channels = make_channels(device, arena, files, link_gbps, disk_gbps)
        every = len(slots_per_layer) * experts
        chooser = make_policy(policy, 0, len(slots_per_layer)) if files else LRU()  # if all stay, not asked
        holding = Berths(berths, chooser, SPARE_BERTHS, every)
        store = Store(arena, holding, experts, form.kept[-1].end, channels, files)
        cache = cache_over(store, form, device, slots_per_layer, spares, policy, prefetch)
        on_error.pop_all()
    return cache


def warn_of_unlocked(arena: Arena) -> None:
    locked, total = format_bytes(arena.locked_bytes), format_bytes(arena.total_bytes)
    warnings.warn(
        f"the driver locks {locked} of the {total} of host memory that hold experts; the others "
        f"are copied through small buffers, which is slower; {unlocked_remedy()}",
        RuntimeWarning,
        stacklevel=7,  # the caller of Engine.load
    )


def cache_over(
    store: Store,
    form: ExpertFormat,
    device: torch.device,
    slots_per_layer: Sequence[int],
    spares: int,
    policy: str | PolicyMaker = "lru",
    prefetch: int = 1,
) -> ExpertCache:
    """A cache over an existing store."""
    numbers = iter(range(sum(slots_per_layer) + spares))
    tables = [
        SlotTable(islice(numbers, count), make_policy(policy, 0, layer))
        for layer, count in enumerate(slots_per_layer)
    ]
    guesses = spares if store.berths.complete else spares - SPARE_SLOTS
    return ExpertCache(form, store, device, tables, Spares(numbers, guesses), prefetch)


def make_channels(
    device: torch.device,
    arena: Arena,
    files: ExpertFiles | None = None,
    link_gbps: float | None = None,
    disk_gbps: float | None = None,
) -> Channels:
    """A channel to the device, and with files those back from it and from the files. The rates are a CPU's
    alone."""
    rate = link_gbps * 1e9 if link_gbps else None
    up: Link = HostLink(rate)
    back: Link = HostLink(rate)
    gpu = device if device.type == "cuda" else None
    if gpu:
        up, back = CudaLink(device, None if arena.pinned else arena.locked), CudaReturn(device, arena.pinned)
    if files is None:
        return Channels(CopyEngine(up, device=gpu))
    reads = DiskLink(files, disk_gbps * 1e9 if disk_gbps and not gpu else None)
    return Channels(
        CopyEngine(up, device=gpu),
        CopyEngine(back, "expert-returns", gpu),
        CopyEngine(reads, "expert-reading", gpu),
    )
