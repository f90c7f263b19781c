"""How much memory and processor time this process's control groups allow.

A process is in one group of each hierarchy. Every group from there up to the root may set a limit, and the
smallest limit counts. Version 2 has one hierarchy for everything, version 1 has one for each controller, and
a machine may have both. `/proc/self/cgroup` names the process's groups. `/proc/self/mountinfo` says where the
hierarchies are mounted, and from which group down, because a container often sees only a part.

Functions take the root of the file system, so that a test can pass another machine's.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def memory_left(root: Path = ROOT) -> int | None:
    """Bytes of memory that every control group still allows; None if no group sets a limit.

    A group counts the page cache as used, but the kernel reclaims it when a process needs memory, as
    `MemAvailable` says of the whole machine. So it counts as free. A checkpoint that was just read must not
    seem to fill the machine, nor one that another process has mapped.
    """
    names = ("memory.max", "memory.current", "")
    left = [bytes_left(folder, *names) for folder in groups(root, None)]
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    left += [bytes_left(folder, *names) for folder in groups(root, "memory")]
    return min((size for size in left if size is not None), default=None)


def bytes_left(folder: Path, limit_name: str, used_name: str, prefix: str) -> int | None:
    limit, used = read_numbers(folder / limit_name), read_numbers(folder / used_name)
    if not limit or not used:  # no such file, or no limit
        return None
    counters = read_counters(folder / "memory.stat")
    cached = sum(counters.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return max(limit[0] - used[0] + cached, 0)


def processors(root: Path = ROOT) -> float | None:
    """Processors whose time every control group allows, such as 1.5; None if no group sets a limit."""
    shares = [share(read_numbers(folder / "cpu.max")) for folder in groups(root, None)]
    for folder in groups(root, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        shares.append(share([number for name in names for number in read_numbers(folder / name)]))
    return min((allowed for allowed in shares if allowed is not None), default=None)


def share(numbers: list[int]) -> float | None:
    """Processors that a quota of time allows, from the quota and its period in microseconds; None without a
    quota, which is written as -1.

    >>> share([150000, 100000]), share([-1, 100000]), share([100000])
    (1.5, None, None)
    """
    if len(numbers) != 2 or min(numbers) <= 0:
        return None
    return numbers[0] / numbers[1]


def groups(root: Path, controller: str | None) -> Iterator[Path]:
    """The folders of the process's group and of all visible groups above it, in the hierarchy of a version 1
    `controller` or, for None, of version 2."""
    own, mounts = own_group(root, controller), list(mounted(root, controller))
    if own is None:
        return
    for top, mount in mounts:
        inside = PurePosixPath(own)
        inside = inside.relative_to(top) if inside.is_relative_to(top) else PurePosixPath()
        if ".." in inside.parts:  # the group is outside of what this process may see
            inside = PurePosixPath()
        for part in (inside, *inside.parents) if inside.parts else (inside,):
            yield mount / part


def own_group(root: Path, controller: str | None) -> str | None:
    """The path of the process's group, from lines like `4:cpu,cpuacct:/user`, or for version 2 `0::/user`."""
    for line in read_lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controller in controllers.split(",") if controller else number == "0" and not controllers:
            return group
    return None


def mounted(root: Path, controller: str | None) -> Iterator[tuple[str, Path]]:
    """The mounts of a hierarchy: the topmost visible group, and its folder.

    A line is `34 31 0:31 /top /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory`, with any number
    of words before the dash.
    """
    for line in read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        words, (kind, *options) = before.split(), after.split() or [""]
        controllers = options[-1].split(",") if options else []
        fits = kind == "cgroup" and controller in controllers if controller else kind == "cgroup2"
        if fits and len(words) > 4:
            yield unescaped(words[3]), root / unescaped(words[4]).lstrip("/")


def unescaped(path: str) -> str:
    r"""Decode a path from mountinfo, where spaces and the like are in octal.

    >>> unescaped(r"/a\040b")
    '/a b'
    """
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def read_lines(path: Path) -> list[str]:
    """The lines of a file; none if it does not exist, as on other systems than Linux."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def read_numbers(path: Path) -> list[int]:
    """The whole numbers in a file; none if it says that there is no limit."""
    try:
        return [int(word) for line in read_lines(path) for word in line.split()]
    except ValueError:  # max
        return []


def read_counters(path: Path) -> dict[str, int]:
    """The numbers in a file of lines with a name and a number each, by name."""
    pairs = [line.split() for line in read_lines(path)]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
