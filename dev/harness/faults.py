"""Faults in the n-th of the calls that could fail: to the disk, for memory, for threads.

Each context manager replaces functions of the standard library or of torch while it is entered, and has a
`Fault` count their calls. A fault without a number only counts.
"""

import builtins
import errno
import functools
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ON_DISK = ("open", "stat", "mkdir", "rmdir", "unlink", "replace", "rename", "listdir", "scandir", "statvfs")
BY_HANDLE = ("fstat", "fsync", "pread", "read", "write")
IN_FILES = ("read", "readinto", "readline", "readlines", "write", "flush", "seek", "truncate", "tell")
ALLOCATING = (
    "empty", "zeros", "ones", "full", "arange", "tensor", "cat", "stack", "empty_like", "zeros_like",
    "full_like", "where", "topk", "softmax", "log_softmax", "multinomial", "outer", "matmul",
)  # fmt: skip
OF_TENSORS = ("clone", "float", "to", "contiguous", "new_empty", "new_zeros", "masked_fill", "sort", "topk")
NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 16777216 bytes. Error code 12 (Cannot allocate memory)"
)


class Fault:
    """Counts calls while it is entered. Call number `at` raises the error that `make` gives for the name of
    the call's file; with `lasting`, so do all later calls. `begin` is called on entering, `end` on leaving.
    """

    def __init__(
        self,
        at: int | None = None,
        make: Callable[[str], BaseException] = OSError,
        lasting: bool = False,
        begin: Callable[[], object] = bool,
        end: Callable[[], object] = bool,
    ) -> None:
        self.at, self.make, self.lasting, self.begin, self.end = at, make, lasting, begin, end
        self.calls = 0
        self.entered = False
        self.fired = ""  # the call that failed
        self.lock = threading.Lock()

    def __enter__(self) -> "Fault":
        self.entered = True
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.over()

    def over(self) -> None:
        self.entered = False
        self.end()

    def hit(self, call: str, name: str = "") -> None:
        with self.lock:
            if not self.entered:
                return
            self.calls += 1
            if self.at is None or self.calls < self.at or (self.fired and not self.lasting):
                return
            if self.make is interrupted and threading.current_thread() is not threading.main_thread():
                return  # Python interrupts only the main thread, so its next call is the one
            self.fired = self.fired or call
        raise self.make(name)


def system_error(number: int) -> Callable[[str], BaseException]:
    return lambda name: OSError(number, os.strerror(number), *([name] if name else []))


DISK_ERRORS = tuple(map(system_error, (
    errno.EIO, errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EMFILE, errno.ESTALE, errno.EROFS,
)))  # fmt: skip


@contextmanager
def disk(fault: Fault, folder: Path) -> Iterator[None]:
    """Count what is done to files of `folder`, and what the system is asked about itself."""
    places = (str(folder), "/proc", "/sys")

    def ours(target: Any) -> bool:
        return isinstance(target, (str, os.PathLike)) and str(target).startswith(places)

    def opened(target: Any, *args: Any, **kwargs: Any) -> Any:
        if not ours(target):
            return real_open(target, *args, **kwargs)
        fault.hit("open", str(target))
        return FaultyFile(real_open(target, *args, **kwargs), fault)

    real_open = io.open
    with ExitStack() as stack:
        for name in ON_DISK:
            stack.enter_context(counted(os, name, fault, name, ours))
        for name in BY_HANDLE:
            stack.enter_context(counted(os, name, fault, name))
        stack.enter_context(mock.patch.object(io, "open", opened))
        stack.enter_context(mock.patch.object(builtins, "open", opened))
        yield


def counted(
    owner: object, name: str, fault: Fault, call: str, ours: Callable[[Any], bool] | None = None
) -> AbstractContextManager[object]:
    """While entered, a function of `owner` has `fault` count its calls; of those with `ours`, only calls that
    have such an argument."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if ours is None:
            fault.hit(call)
        elif any(map(ours, args)):
            fault.hit(call, str(args[0]))
        return real(*args, **kwargs)

    return mock.patch.object(owner, name, replacement)


class FaultyFile:
    """An open file whose calls count."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self.file, self.fault = file, fault

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.file, name)
        if name not in IN_FILES:
            return real

        def counted(*args: Any) -> Any:
            self.fault.hit(name)
            return real(*args)

        return counted

    def __enter__(self) -> "FaultyFile":
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        for line in self.file:
            self.fault.hit("next line")
            yield line


@contextmanager
def memory(fault: Fault) -> Iterator[None]:
    """Count what makes a tensor, as far as Python sees it."""
    with ExitStack() as stack:
        for name in ALLOCATING:
            stack.enter_context(counted(torch, name, fault, name))
        for name in OF_TENSORS:
            stack.enter_context(counted(torch.Tensor, name, fault, f"Tensor.{name}"))
        yield


@contextmanager
def thread_starts(fault: Fault, afterwards: bool = False) -> Iterator[None]:
    """Count starts of threads; with `afterwards`, when the thread runs, as an interrupt may come then."""
    name = next(n for n in ("_start_joinable_thread", "_start_new_thread") if hasattr(threading, n))
    real = getattr(threading, name)

    def started(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        fault.hit("thread")
        return found

    starting = counted(threading, name, fault, "thread")
    with mock.patch.object(threading, name, started) if afterwards else starting:
        yield


def no_memory(name: str) -> BaseException:
    return RuntimeError(NO_MEMORY)


def python_memory(name: str) -> BaseException:
    return MemoryError()


def no_thread(name: str) -> BaseException:
    return RuntimeError("can't start new thread")


def interrupted(name: str) -> BaseException:
    return KeyboardInterrupt()
