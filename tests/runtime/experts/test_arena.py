"""The arena: one reservation, locked in pieces or not at all."""

import contextlib
import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import DeviceError
from runtime.experts import arena as module
from runtime.experts import making
from runtime.experts.arena import DIRECT, Arena, private_memory
from tests.leftovers import resident_at


class Driver:
    """Stands in for the CUDA runtime. Refuses the run with the number `refused`, counted from 0."""

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused
        self.locked: dict[int, int] = {}  # address -> bytes
        self.asked: list[tuple[int, int, int]] = []
        self.cleared = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.asked.append((address, size, flags))
        if len(self.asked) - 1 == self.refused:
            return 2
        assert address not in self.locked
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Any:
    def drive(refused: int | None = None) -> Driver:
        driver = Driver(refused)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
        monkeypatch.setattr(module, "PIN_BYTES", 8192)
        monkeypatch.setattr(
            module, "clear_last_error", lambda: setattr(driver, "cleared", driver.cleared + 1)
        )
        return driver

    return drive


def test_blobs_are_apart_and_begin_on_a_page() -> None:
    arena = Arena(12, blob_bytes=192)
    assert arena.berths.shape == (12, 192) and arena.berths.data_ptr() % mmap.PAGESIZE == 0
    assert not arena.pinned and not arena.berths.any()
    for n in range(12):
        arena.berth(n).fill_(n)
    assert all(torch.all(arena.berth(n) == n) for n in range(12))
    assert arena.berth(11).data_ptr() == arena.berths.data_ptr() + 11 * 192  # nothing in between


@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("size", [1, 192, 4096, 9000])
def test_tiered_berths_have_room_for_whole_blocks_around_a_blob(drive: Any, pin: bool, size: int) -> None:
    drive()
    arena = Arena(3, size, pin=pin, tiered=True)
    assert arena.berths.shape[1] >= DIRECT - 1 + size + DIRECT - 1
    assert all(arena.berth(n).data_ptr() % DIRECT == 0 for n in range(3))
    arena.close()


def test_all_pages_are_locked_in_pieces(drive: Any) -> None:
    driver = drive()
    arena = Arena(10, 4096, pin=True)  # 40 KiB in pieces of 8
    start = arena.berths.data_ptr()
    assert arena.pinned and driver.asked == [(start + n * 8192, 8192, 1) for n in range(5)]
    arena.close()
    assert not driver.locked and not arena.pinned
    arena.close()


@given(st.integers(1, 15), st.integers(1, 30_000), st.integers(4096, 40_000), st.booleans())
def test_every_berth_lies_in_one_registration(count: int, size: int, piece: int, tiered: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        driver = Driver()
        patch.setattr(torch.cuda, "cudart", lambda: driver)
        patch.setattr(module, "PIN_BYTES", piece)
        arena = Arena(count, size, pin=True, tiered=tiered)
        places = []
        for n in range(count):
            berth = arena.berth(n)
            assert len(berth) >= size and berth.is_contiguous()
            places.append(berth.data_ptr())
            first = max(address for address in driver.locked if address <= places[-1])
            assert places[-1] + len(berth) <= first + driver.locked[first]
        assert all(b - a >= size for a, b in pairwise(places))
        assert all(
            start % mmap.PAGESIZE == locked % mmap.PAGESIZE == 0 for start, locked in driver.locked.items()
        )
        del berth
        arena.close()
        assert not driver.locked


def test_the_driver_is_asked_for_its_own_device(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[torch.device] = []

    @contextlib.contextmanager
    def use(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def see(call: Callable[..., int], *args: int) -> int:
        calls.append(list(inside))
        return call(*args)

    driver, calls = drive(refused=1), list[list[torch.device]]()
    for name in ("cudaHostRegister", "cudaHostUnregister"):
        monkeypatch.setattr(driver, name, partial(see, getattr(driver, name)))
    monkeypatch.setattr(module, "clear_last_error", lambda: calls.append(list(inside)))
    monkeypatch.setattr(torch.cuda, "device", use)
    device = torch.device("cuda", 1)
    assert not Arena(10, 4096, pin=True, device=device).pinned
    assert len(calls) == 4 and all(set(found) == {device} for found in calls)
    calls.clear()
    driver.refused = None
    arena = Arena(10, 4096, pin=True, device=device)
    arena.close()
    assert len(calls) == 10 and all(set(found) == {device} for found in calls) and not inside
    Arena(10, 4096, pin=False, device=device).close()
    assert len(calls) == 10


def test_the_last_piece_may_be_short(drive: Any) -> None:
    driver = drive()
    arena = Arena(3, 4096, pin=True)
    assert [size for _, size, _ in driver.asked] == [8192, 4096]
    arena.close()


@pytest.mark.parametrize("refused", range(5))
def test_what_could_be_locked_stays_so(drive: Any, refused: int) -> None:
    driver = drive(refused)
    arena = Arena(10, 4096, pin=True)
    assert not arena.pinned and len(driver.locked) == refused and len(driver.asked) == refused + 1
    assert arena.locked_bytes == refused * 8192 and driver.cleared == 1
    berths = [arena.berth(n) for n in range(10)]
    assert [arena.locked(berth) for berth in berths] == [n < 2 * refused for n in range(10)]
    assert [arena.locked(berth[4000:]) for berth in berths] == [n < 2 * refused for n in range(10)]
    berths[9].fill_(7)  # and it is memory all the same
    arena.close()
    assert not driver.locked and not arena.locked(berths[0])


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for as Linux has it")
def test_huge_pages_are_advised_and_a_fork_gets_no_copy() -> None:
    huge = torch.frombuffer(private_memory(4 << 20, huge=True), dtype=torch.uint8)
    assert {"hg", "wf", "mr"} <= flags_of(huge.data_ptr()), "huge, wiped on fork, may be read"
    arena = Arena(4, 1 << 20)
    arena.berths.fill_(7)
    assert {"wf", "mr"} <= flags_of(arena.berths.data_ptr()), "wiped on fork, may be read"
    assert "sh" not in flags_of(arena.berths.data_ptr())
    child = os.fork()
    if child == 0:
        os._exit(int(arena.berths.any()))
    assert os.waitpid(child, 0)[1] == 0 and torch.all(arena.berths == 7)


def flags_of(address: int) -> set[str]:
    """Of the mapping at that address."""
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                start, end = (int(part, 16) for part in first.split("-"))
                inside = start <= address < end
            elif inside and first == "VmFlags:":
                return set(line.split()[1:])
    return set()


@pytest.mark.parametrize("release", ["6.8.0-45-generic", "5.15.153.1-microsoft-standard-WSL2"])
def test_what_is_not_locked_is_said_with_a_remedy(
    drive: Any, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    drive(refused=3)
    monkeypatch.setattr(module.platform, "release", lambda: release)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(making, "cache_over", lambda store, *args: store)
    monkeypatch.setattr(making, "make_channels", lambda *args: None)
    form: Any = SimpleNamespace(blob_bytes=4096, kept=[SimpleNamespace(end=4096)])
    with pytest.warns(RuntimeWarning) as caught:
        store: Any = making.make_cache(form, torch.device("cuda", 0), 5, (1, 1), spares=0, berths=10)
    [message] = [str(warning.message) for warning in caught]
    assert message.startswith("the driver locks 24.0 KiB of the 40.0 KiB of host memory that hold experts; ")
    assert ("`memory` under [wsl2] in .wslconfig" in message) == ("WSL2" in release)
    assert "ulimit" not in message and "\n" not in message
    store.arena.close()


def test_an_arena_that_is_never_closed_is_unlocked_before_its_memory_goes(drive: Any) -> None:
    driver = drive()
    arena = Arena(10, 4096, pin=True)
    assert driver.locked
    del arena
    gc.collect()
    assert not driver.locked


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_lets_go_of_the_memory() -> None:
    arena = Arena(64, 1 << 20)
    arena.berths.fill_(1)
    address = arena.berths.data_ptr()
    assert resident_at(address) >= 64 << 20
    arena.close()
    gc.collect()
    assert resident_at(address) < 16 << 20


def test_more_than_the_machine_can_reserve() -> None:
    with pytest.raises(DeviceError, match=r"cannot reserve 64\.0 EiB|cannot reserve .*iB of host memory"):
        Arena(1 << 23, 1 << 39)


def test_clearing_an_error_needs_no_gpu_to_be_harmless() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *a, **w: (_ for _ in ()).throw(RuntimeError("CUDA error")))
        module.clear_last_error()
