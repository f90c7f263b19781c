"""Picking device and dtype, and measuring free memory, on machines that this one is not."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.target import Target
from runtime import DeviceError, EngineOptions, OptionError
from runtime.planning import device, memory
from runtime.planning.device import find_device, pick_device, pick_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 1 << 30


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this build of torch has kernels for."""
    built = ["sm_75", "sm_80", "sm_90", "compute_90"]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    return built


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, built: list[str]) -> None:
    """Two GPUs of compute capability 7.5 (turing) and 8.0 (ampere)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (8, 0))[device.index])


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("gpus")
def test_with_gpus() -> None:
    assert pick_device(None) == pick_device("cuda") == pick_device("cuda:0") == CUDA
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"cuda:2: there are 2"):
        pick_device("cuda:2")
    with pytest.raises(DeviceError, match=r"cuda:256"):  # torch.device would make this cuda:0
        pick_device("cuda:256")


@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_the_build_has_no_kernels_for_is_not_chosen(built: list[str]) -> None:
    """And asked for, it is refused before anything is loaded."""
    warnings.simplefilter("error")
    built.remove("sm_75")
    assert pick_device(None) == torch.device("cuda", 1)
    with pytest.raises(DeviceError) as caught:
        pick_device("cuda")
    assert str(caught.value) == (
        f"device cuda: this GPU has compute capability 7.5, and torch {torch.__version__} has kernels for "
        "sm_80, sm_90, compute_90; use --device cpu or install a build of torch for it"
    )
    built[:] = ["sm_90", "compute_90"]
    with pytest.warns(RuntimeWarning, match=r"on the CPU, because .* 7\.5, and torch .* sm_90") as warned:
        assert pick_device(None) == CPU
    assert len(warned) == 1
    assert pick_device("cpu") == CPU
    assert find_device(None) == find_device("cuda") == CUDA, "nothing is asked of it"
    built.append("compute_70")  # intermediate code is compiled for any later GPU
    assert pick_device(None) == pick_device("cuda") == CUDA
    built[:] = ["gfx90a"]
    assert pick_device(None) == CUDA, "nothing is known of it"


@pytest.mark.usefixtures("no_gpu")
def test_without_gpus() -> None:
    warnings.simplefilter("error")
    assert pick_device(None) == pick_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"device cuda: .*use --device cpu"):
        pick_device("cuda")


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cpu:1", "meta", "mps", "cuda:0 ", "y" * 10**6]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="device is") as caught:
        pick_device(name)
    assert repr(name)[:9] in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.usefixtures("gpus")
def test_dtype_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_dtype(None, Target.of(CUDA), 1) is torch.float16
    assert pick_dtype(None, Target.of(torch.device("cuda", 1)), 1) is torch.bfloat16
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("runtime.planning.device.cpu_multiplies_bfloat16", lambda fast=fast: fast)
        assert pick_dtype(None, Target(CPU), 46_700_000_000) is expected
        assert pick_dtype(None, Target(CPU), 8_900_000) is torch.float32
    for name in ("float32", "bfloat16", "float16"):
        assert pick_dtype(EngineOptions(dtype=name).dtype, Target(CUDA, (7, 5)), 1) is getattr(torch, name)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder for what the system tells about memory."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 9999999 kB\nMemAvailable:    8388608 kB\nBuffers: 1 kB\n"
    )
    free = memory.free_host_bytes
    monkeypatch.setattr(memory, "free_host_bytes", lambda: free(tmp_path))
    return tmp_path


def write_cgroup(machine: Path, limit: object, used: int, cached: int) -> None:
    folder = machine / "sys/fs/cgroup"
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile {cached + 7}\ninactive_file {cached}\n")


def test_free_memory_is_what_the_kernel_calls_available(machine: Path) -> None:
    assert memory.free_host_bytes() == 8 * GIB
    assert memory.free_device_bytes(CPU) == 8 * GIB - memory.HOST_MARGIN


@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (4 * GIB, GIB, 0, 3 * GIB),
        (4 * GIB, 4 * GIB, 3 * GIB, 3 * GIB),  # the page cache is given up when it is asked for
        (2 * GIB, 3 * GIB, 0, 0),
        (64 * GIB, GIB, 0, 8 * GIB),
        ("max", GIB, 0, 8 * GIB),
    ],
)
def test_a_containers_limit_counts(machine: Path, limit: object, used: int, cached: int, free: int) -> None:
    write_cgroup(machine, limit, used, cached)
    assert memory.free_host_bytes() == free
    assert memory.free_device_bytes(CPU) == max(free - memory.HOST_MARGIN, 0)


def test_bfloat16_is_fast_where_the_processor_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for flags, fast in (
        ("fpu avx512f avx512_bf16 sse", True),
        ("fpu amx_bf16", True),
        ("fp asimd bf16 i8mm", True),
        ("fpu avx512f avx2", False),
        ("fpu xbf16y", False),
    ):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        monkeypatch.setattr(device, "Path", lambda path: tmp_path / "cpuinfo")
        assert device.cpu_multiplies_bfloat16() is fast, flags
    monkeypatch.setattr(device, "Path", lambda path: tmp_path / "none")
    assert device.cpu_multiplies_bfloat16() is False


class Allocator:
    """Stands in for PyTorch's: what it is asked to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[object] = []
        self.reserved, self.allocated = 5 * GIB, 3 * GIB
        self.taken = 600 << 20  # of 80 GiB, outside of the allocator
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.info)
        memory.context_bytes.cache_clear()
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("empty"))
        monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(*shape))
        monkeypatch.setattr(
            torch, "empty", lambda size, dtype, device: self.calls.append((size, dtype, device))
        )

    def info(self, device: torch.device) -> tuple[int, int]:
        return 80 * GIB - self.taken - self.reserved, 80 * GIB


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Allocator]:
    yield Allocator(monkeypatch)
    memory.context_bytes.cache_clear()


@pytest.mark.parametrize(
    ("taken", "context"),
    [
        (600 << 20, 600 << 20),
        (memory.MOST_CONTEXT, memory.MOST_CONTEXT),
        (memory.MOST_CONTEXT + 1, memory.CONTEXT_BYTES),  # others are there as well
        (40 * GIB, memory.CONTEXT_BYTES),
        (0, memory.CONTEXT_BYTES),
        (-GIB, memory.CONTEXT_BYTES),  # an allocator that PyTorch does not tell the truth about
    ],
)
def test_the_context_is_measured_where_a_process_is_alone(
    allocator: Allocator, taken: int, context: int
) -> None:
    allocator.taken = taken
    free = memory.free_device_bytes(CUDA)
    assert free == 80 * GIB - taken - allocator.reserved + 2 * GIB + context
    driver = memory.driver_bytes(Target(CUDA, (8, 0)))
    left = free - driver
    assert driver == context + memory.LATER_BYTES
    assert left == 80 * GIB - taken - allocator.allocated - memory.LATER_BYTES, "it is there, and counts once"


def test_the_context_is_what_it_was_when_first_measured(allocator: Allocator) -> None:
    """What is taken outside of the allocator later is not the context, and one plan is like another."""
    first = memory.context_bytes(CUDA)
    allocator.taken += 100 << 20
    assert memory.context_bytes(CUDA) == first == 600 << 20


def test_of_a_gpu_that_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    assert memory.driver_bytes(Target.hypothetical()) == memory.CONTEXT_BYTES + memory.LATER_BYTES
    assert memory.driver_bytes(Target(CPU)) == memory.context_bytes(CPU) == 0


def test_what_a_gpus_allocator_takes_beside_tensors() -> None:
    """A workspace of cuBLAS for two threads, that loads and that serves, on two streams each."""
    cards = [Target.hypothetical((8, 6)), *(Target(CUDA, found) for found in ((9, 0), (8, 6), (7, 5)))]
    sizes = [memory.overhead_bytes(card) for card in cards]
    assert sizes[0] == sizes[1] == 4 * (32 << 20) + memory.ROUNDING_BYTES
    assert sizes[2] == sizes[3] == 4 * ((8 << 20) + (128 << 10)) + memory.ROUNDING_BYTES
    assert memory.overhead_bytes(Target(CPU)) == 0


def test_only_a_gpus_memory_is_reserved_and_released(allocator: Allocator) -> None:
    memory.reserve(CPU, 7), memory.release(CPU)
    assert not allocator.calls
    memory.reserve(CUDA, 7), memory.release(CUDA)
    assert allocator.calls == [(7, torch.uint8, CUDA), "empty"]
