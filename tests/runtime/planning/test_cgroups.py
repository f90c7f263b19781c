"""Limits of control groups, on machines that are folders here."""

from pathlib import Path

import pytest

from runtime.planning import cgroups
from runtime.planning.memory import free_host_bytes
from runtime.process import threads

MIB = 1 << 20
V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 30 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
)


def machine(root: Path, own: str, mounts: str) -> Path:
    """A root folder."""
    write(root / "proc/self/cgroup", own)
    write(root / "proc/self/mountinfo", mounts)
    write(root / "proc/meminfo", "MemAvailable: 8388608 kB\n")
    return root


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group2(folder: Path, limit: object, used: int = 0, cached: int = 0, cpu: str = "max 100000") -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon 5\ninactive_file {cached // 4}\nactive_file {cached - cached // 4}")
    write(folder / "cpu.max", cpu)


def group1(folder: Path, limit: int, used: int = 0, cached: int = 0) -> None:
    write(folder / "memory.limit_in_bytes", limit)
    write(folder / "memory.usage_in_bytes", used)
    write(
        folder / "memory.stat",
        f"inactive_file 1\ntotal_inactive_file {cached // 4}\ntotal_active_file {cached - cached // 4}",
    )


@pytest.mark.parametrize(("limits", "left"), [
    (("max", "max", "max"), None),
    ((900 * MIB, "max", "max"), 900 * MIB),
    (("max", 800 * MIB, "max"), 800 * MIB),  # of the group above the process's own
    (("max", "max", 700 * MIB), 700 * MIB),
    ((900 * MIB, 800 * MIB, 700 * MIB), 700 * MIB),
    ((600 * MIB, 800 * MIB, 700 * MIB), 600 * MIB),
])  # fmt: skip
def test_the_smallest_limit_up_to_the_root_counts(
    tmp_path: Path, limits: tuple[object, ...], left: int | None
) -> None:
    root = machine(tmp_path, "0::/slurm/job 7\n", V2)
    for folder, limit in zip(("slurm/job 7", "slurm", ""), limits, strict=True):
        group2(root / "sys/fs/cgroup" / folder, limit)
    group2(root / "sys/fs/cgroup/other", MIB)
    assert cgroups.memory_left(root) == left
    assert free_host_bytes(root) == min(left or 8 << 30, 8 << 30)


def test_what_each_group_has_left_counts_not_its_limit(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a/b\n", V2)
    group2(root / "sys/fs/cgroup/a/b", 900 * MIB, used=100 * MIB)
    group2(root / "sys/fs/cgroup/a", 1000 * MIB, used=700 * MIB, cached=200 * MIB)  # others are in it as well
    assert cgroups.memory_left(root) == 500 * MIB
    (root / "sys/fs/cgroup/a/memory.stat").unlink()
    assert cgroups.memory_left(root) == 300 * MIB
    group2(root / "sys/fs/cgroup/a", 500 * MIB, used=600 * MIB)
    assert cgroups.memory_left(root) == 0


def test_version_1_has_a_hierarchy_for_each_controller(tmp_path: Path) -> None:
    own = "9:memory:/job/task\n4:cpu,cpuacct:/batch\n0::/elsewhere\n"
    root = machine(tmp_path, own, V1)
    top = root / "sys/fs/cgroup/memory"
    group1(top / "job/task", 9223372036854771712)
    group1(top / "job", 600 * MIB, used=200 * MIB, cached=50 * MIB)
    group1(top, 9223372036854771712, used=4096 * MIB)
    assert cgroups.memory_left(root) == 450 * MIB
    assert cgroups.processors(root) is None
    for folder, quota in (("batch", -1), ("", 250000)):
        write(root / "sys/fs/cgroup/cpu,cpuacct" / folder / "cpu.cfs_quota_us", quota)
        write(root / "sys/fs/cgroup/cpu,cpuacct" / folder / "cpu.cfs_period_us", 100000)
    assert cgroups.processors(root) == 2.5


def test_both_versions_at_once(tmp_path: Path) -> None:
    mounts = V1 + "41 31 0:38 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw\n"
    root = machine(tmp_path, "9:memory:/job\n0::/user\n", mounts)
    group1(root / "sys/fs/cgroup/memory/job", 600 * MIB)
    write(root / "sys/fs/cgroup/unified/user/cpu.max", "300000 100000")
    assert (cgroups.memory_left(root), cgroups.processors(root)) == (600 * MIB, 3.0)


@pytest.mark.parametrize(("own", "top"), [
    ("/docker/ab", "/docker/ab"),  # a container that sees its own group as the top
    ("/docker/ab/inner", "/docker/ab"),
    ("/", "/"),  # one with a name space of its own
    ("/../ab", "/"),
    ("/somewhere/else", "/docker/ab"),
])  # fmt: skip
def test_a_container_sees_its_group_as_the_top(tmp_path: Path, own: str, top: str) -> None:
    root = machine(tmp_path, f"0::{own}\n", V2.replace(" / ", f" {top} ", 1))
    group2(root / "sys/fs/cgroup", 300 * MIB, cpu="150000 100000")
    assert cgroups.memory_left(root) == 300 * MIB
    assert cgroups.processors(root) == 1.5


def test_a_mount_elsewhere_with_a_space_in_its_name(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", V2.replace("/sys/fs/cgroup", r"/my\040groups"))
    group2(root / "my groups", 300 * MIB)
    assert cgroups.memory_left(root) == 300 * MIB


@pytest.mark.parametrize(("own", "mounts"), [
    ("", ""), ("0::/a\n", ""), ("", V2),
    ("nonsense\n:::\n0:", "nonsense - \n - cgroup2\n1 2 3 - cgroup2 x y\n"),
])  # fmt: skip
def test_systems_that_tell_nothing(tmp_path: Path, own: str, mounts: str) -> None:
    root = machine(tmp_path, own, mounts)
    assert cgroups.memory_left(root) is None and cgroups.processors(root) is None
    assert cgroups.memory_left(tmp_path / "none") is None
    for text in ("", "max", "-5", "x\ny", "1 2 3"):
        write(root / "sys/fs/cgroup/a/cpu.max", text)
        assert cgroups.processors(root) is None


@pytest.mark.parametrize(("quota", "count"), [
    ("max 100000", 6), ("150000 100000", 1), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 6),
])  # fmt: skip
def test_a_quota_in_whole_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, count: int
) -> None:
    root = machine(tmp_path, "0::/a\n", V2)
    group2(root / "sys/fs/cgroup/a", "max", cpu=quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert threads.usable_processors(root) == count
