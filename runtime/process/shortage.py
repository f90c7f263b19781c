"""Recognize that memory ran short, on the host or on a device, and report it in one line.

It surfaces as Python's `MemoryError`, as PyTorch's error for GPUs, as a plain `RuntimeError` of its CPU
allocator, as the driver's refusal to load a kernel, and as the system's refusal of a mapping or of a thread,
whose stack is memory.
"""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import MixtralError

SIGNS = (  # in the text of a `RuntimeError`
    "out of memory",  # PyTorch's for GPUs, CUDA's runtime and driver, Triton's
    "can't allocate memory",  # PyTorch's allocator for CPUs
    "not enough memory",  # the same on systems other than Linux
    "Cannot allocate memory",  # the C library's ENOMEM
    "bad_alloc",  # C++
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
    "could not create a primitive",  # oneDNN gives no reason, but the same product worked before
    "could not execute a primitive",
    "can't start new thread",
)
REMEDY = "lower --context, or free some"
LONGEST = 200  # characters of a reason


def ran_short(error: BaseException) -> bool:
    """Whether the error reports too little memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # the base of PyTorch's own errors
        return any(sign in str(error) for sign in SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def shortage_as(kind: type[MixtralError], remedy: str = REMEDY) -> Iterator[None]:
    """Inside, an error that reports too little memory becomes a `kind`, in one line that ends with `remedy`.

    The frames of the failed calls are cleared, so that the next attempt can have the memory they held.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, MixtralError) or not ran_short(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise kind(f"out of memory ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none.

    >>> reason(RuntimeError("[enforce fail at a.cpp:1]  no memory\\nmore")), reason(MemoryError())
    ('[enforce fail at a.cpp:1] no memory', 'MemoryError')
    """
    first = (str(error).splitlines() or [""])[0]
    return " ".join(first.split())[:LONGEST] or type(error).__name__
