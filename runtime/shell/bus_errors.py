"""One line when a mapped file is cut short while a command computes from it.

The system sends SIGBUS to the thread that reads where the file was. Python runs its own signal handlers after
the instruction under way, and this one never ends. So the handler is given to the C library.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

LINE = (
    b"error: a file of the model was cut short while it was in use, or its disk fails (SIGBUS); "
    b"load the model again\n"
)


@contextmanager
def one_line_bus_errors(status: int) -> Iterator[None]:
    """Inside, SIGBUS ends the process with a line on stderr and this exit status.

    Does nothing where there is no such signal, or where the user has enabled Python's `faulthandler`.
    """
    if not hasattr(signal, "SIGBUS") or faulthandler.is_enabled():
        yield
        return
    import ctypes

    ending: list[int] = []

    def report(number: int) -> None:
        if ending:  # the threads of a product read the same file, and one of them is about to end the process
            time.sleep(60)
        ending.append(number)
        os.write(2, LINE)
        os._exit(status)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(report)
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = set_handler(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGBUS, before)
