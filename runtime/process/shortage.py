"""Memory that runs short, on the host or on a device: how to tell it from other errors, and what to say.

It shows in many ways: Python's `MemoryError`; PyTorch's error for GPUs, and a plain `RuntimeError` of its
allocator for CPUs; the driver's own refusals, such as of a kernel that is loaded when it is first used; the
system's refusal of a mapping, or of a thread, whose stack is memory.
"""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.errors import MixtralError

SIGNS = (  # in the texts of `RuntimeError`
    "out of memory",  # PyTorch's for GPUs, CUDA's runtime and driver, Triton's
    "can't allocate memory",  # PyTorch's allocator for CPUs
    "not enough memory",  # the same on other systems than Linux
    "Cannot allocate memory",  # the C library's ENOMEM
    "bad_alloc",  # C++
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
    "could not create a primitive",  # oneDNN, which does not say why: the product was possible before
    "could not execute a primitive",
    "can't start new thread",
)
REMEDY = "lower --context, or free some"
LONGEST = 200  # characters of a reason


def ran_short(error: BaseException) -> bool:
    """Whether the error says that there was too little memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # PyTorch's own errors are such
        return any(sign in str(error) for sign in SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def shortage_as(kind: type[MixtralError], remedy: str = REMEDY) -> Iterator[None]:
    """Raise memory running short inside as an error of this family, in one line that ends with `remedy`.

    What the calls that failed hold is let go at once, so that the next attempt has it.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, MixtralError) or not ran_short(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise kind(f"out of memory ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """
    >>> reason(RuntimeError("[enforce fail at a.cpp:1]  no memory\\nmore")), reason(MemoryError())
    ('[enforce fail at a.cpp:1] no memory', 'MemoryError')
    """
    first = (str(error).splitlines() or [""])[0]
    return " ".join(first.split())[:LONGEST] or type(error).__name__
