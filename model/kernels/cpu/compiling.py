"""Compiles the kernels, once for each format and processor. numba keeps what it has compiled in the user's
cache folder (~/.cache/numba on Linux, or NUMBA_CACHE_DIR).

This module imports numba. Others import it when a kernel is first needed.
"""

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import torch
from numba.core import caching, registry
from numba.core.ccallback import CFunc

from model.errors import ModelError
from model.kernels.cpu import programs
from model.kernels.cpu.dots import Way
from model.kernels.cpu.rounding import Scheme

ADDRESS, COUNT = numba.int64, numba.int64
KERNEL = numba.void(COUNT, ADDRESS)  # program, arguments
GRID = numba.void(ADDRESS, ADDRESS, COUNT, COUNT, COUNT, ADDRESS)  # see `grid`

lock = threading.RLock()  # numba compiles in one thread at a time


def processor() -> Way:
    """The way to multiply that this processor has, or as much of it as NUMBA_CPU_FEATURES leaves."""
    features = registry.cpu_target.target_context.codegen().magic_tuple()[2]
    return Way.of({name[1:] for name in features.split(",") if name.startswith("+")})


@functools.cache
def kernel(name: str, scheme: Scheme, way: Way | None = None) -> int:
    """The address of a kernel of `programs`, compiled for a format, and for this processor unless `way` says
    otherwise: a function of a program's number and the address of its arguments."""
    number, bits, group = programs.NAMES.index(name), scheme.bits, scheme.group
    chosen = int(processor() if way is None else way)

    def run(program: int, arguments: int) -> None:
        programs.run_program(number, bits, group, chosen, program, arguments)

    name_for_cache(run, name, bits, group, chosen)
    callback: Any = CFunc(run, (KERNEL.args, KERNEL.return_type), {}, {"nogil": True})
    finish(callback, run, callback.compile)
    return int(callback.address)


@functools.cache
def grid(parallel: bool) -> Any:
    """A function that calls a kernel for every program of a grid, in this thread or in several.

    `next_one` is the address of an int64 that is 0. A thread takes `share` programs at a time: many
    processors have slow cores beside fast ones, and a core may have other work to do. Raises `ModelError` if
    numba cannot start threads.
    """

    def run(kernel: int, arguments: int, count: int, threads: int, share: int, next_one: int) -> None:
        for _ in numba.prange(threads):
            first = programs.take(next_one, share)
            while first < count:
                for program in range(first, min(first + share, count)):
                    programs.call_program(kernel, program, arguments)
                first = programs.take(next_one, share)

    name_for_cache(run, "grid", parallel)
    dispatcher = numba.njit(parallel=parallel, nogil=True)(run)
    own = torch.get_num_threads()
    try:
        finish(dispatcher, run, functools.partial(dispatcher.compile, GRID.args))
    except ValueError as error:  # it looks for a library of threads when it compiles, or finds compiled
        reason, layer = str(error).splitlines()[0], numba.config.THREADING_LAYER
        raise ModelError(
            f"numba cannot start threads ({reason}); NUMBA_THREADING_LAYER is {layer}, leave it out"
        ) from error
    finally:  # starting threads of OpenMP, numba sets the number that PyTorch takes in this thread
        if torch.get_num_threads() != own:
            torch.set_num_threads(own)
    dispatcher.disable_compile()
    return dispatcher


def finish(function: Any, source: Callable[..., None], compile: Callable[[], object]) -> None:
    """Have `compile` compile `function`, or find it in the cache."""
    with lock:
        with contextlib.suppress(RuntimeError):  # where no folder can be written to
            function._cache = UserCache(source)
        compile()


class UserFolder(caching.CompileResultCacheImpl):
    """Keeps compiled functions in the user's cache folder. numba's own choice is the folder of the source,
    where not every user may write, and where packages are checked for files that do not belong there."""

    _locator_classes = [caching.UserProvidedCacheLocator, caching.UserWideCacheLocator]  # noqa: RUF012


class UserCache(caching.FunctionCache):
    """A cache that is a help and never a condition: its folder may be damaged, or its disk full."""

    _impl_class = UserFolder

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of unpickling, which may be any
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


def name_for_cache(function: Any, *parts: object) -> None:
    """Name a function after all that its compiled form depends on, so that it has files of its own.

    numba would keep functions with one name in numbered files and list them in one index. Two processes that
    compile at the same time would give two of them one number, and a later one would compute with the wrong
    kernel. numba itself also looks at the file of a function only, not at those of the kernels.
    """
    function.__qualname__ = "_".join(map(str, (*parts, version())))


@functools.cache
def version() -> str:
    """It changes with any file of the kernels, and with the processor."""
    digest = hashlib.sha256(repr(registry.cpu_target.target_context.codegen().magic_tuple()).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Inside, numba computes for this thread of the program with `count` threads."""
    own = numba.get_num_threads()
    if own == count:
        yield
        return
    try:
        numba.set_num_threads(count)
        yield
    finally:
        numba.set_num_threads(own)
