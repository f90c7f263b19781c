"""Progress on stderr for work that takes more than a second."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def byte_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes done, rate and time left. Gives the function to call with each increment."""
    with tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, unit_divisor=1024, delay=1, leave=False
    ) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance


@contextmanager
def kernel_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of steps done while a GPU's kernels are compiled, which takes seconds where they never were."""
    with tqdm(total=total, desc="compiling kernels", delay=1, leave=False) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance
