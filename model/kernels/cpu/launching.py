"""Launching the kernels of a CPU, and finding out whether it can run them.

numba's threads compute beside PyTorch's own, in turns: while one library's work, the other's wait. Both get
the same number, PyTorch's (`torch.set_num_threads`).
"""

import ctypes
import functools
import threading
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from model.kernels.cpu.rounding import Scheme
from model.quant.spec import QuantSpec

NUMBA = "numba>=0.62,<0.69"  # the versions that the tests have passed on
SMALL = 1 << 19  # products of weights and activations: below, waking other threads takes longer than the work

SHARES = 16  # of a thread: what it does before it looks whether others have left more

# One grid at a time: not all of numba's threading layers take two.
turn = threading.RLock()


@functools.cache
def unsupported() -> str | None:
    """Why this process cannot compile the kernels, and the remedy. None if it can."""
    if find_spec("numba") is None:
        return f"needs numba, which is not installed, and is 2 to 4 times as fast; pip install '{NUMBA}'"
    try:
        from numba import config

        if config.DISABLE_JIT:
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        compile_kernel("round_rows", QuantSpec(4))
    except Exception as error:  # numba's, LLVM's, or that of a library that does not fit them
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return (
            f"needs to compile kernels by numba, and that failed ({reason}); leave out numba's environment "
            f"variables, or pip install '{NUMBA}'"
        )
    return None


def compile_kernel(name: str, spec: QuantSpec) -> None:
    """Compile a kernel of `programs` for a format, or find it compiled."""
    from model.kernels.cpu import compiling

    compiling.kernel(name, Scheme.of(spec))


def compile_grids() -> None:
    """Compile what calls the kernels, or find it compiled."""
    from model.kernels.cpu import compiling

    compiling.grid(False)
    if most_threads() > 1:
        compiling.grid(True)


def launch(name: str, scheme: Scheme, count: int, arguments: Sequence[int], work: int) -> None:
    """Call a kernel of `programs` for `count` programs. `work` is the number of products in all of them."""
    from model.kernels.cpu import compiling

    kernel, values = compiling.kernel(name, scheme), numbers((0, *arguments))  # programs are taken by the 0
    start = ctypes.addressof(values)
    threads = 1 if work < SMALL else min(torch.get_num_threads(), most_threads(), count)
    if threads <= 1:
        compiling.grid(False)(kernel, start + 8, count, 1, count, start)
        return
    share = max(count // (SHARES * threads), 1)
    grid = compiling.grid(True)  # before the turn: compiling has a lock too, and a finalizer may want both
    with turn, compiling.using_threads(threads):
        grid(kernel, start + 8, count, threads, share, start)


def numbers(values: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
    """An array of int64. ctypes makes a small one in a fifth of the time that NumPy takes."""
    return (ctypes.c_int64 * len(values))(*values)


@functools.cache
def most_threads() -> int:
    """numba starts as many threads as there are processors, and cannot start more."""
    from numba import config

    return int(config.NUMBA_NUM_THREADS)
