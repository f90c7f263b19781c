"""Several downloads at once: results in order, and one error ends all."""

import time
from collections.abc import Callable

import pytest

from runtime.hub.at_once import at_once


def test_results_are_in_order() -> None:
    def work(number: int, go_on: Callable[[], None]) -> int:
        time.sleep(0.01 * (5 - number))
        go_on()
        return number * number

    assert at_once(work, range(5), 3) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("error", [ValueError("the third"), KeyboardInterrupt()])
def test_an_error_ends_the_others(error: BaseException) -> None:
    begun: list[int] = []

    def work(number: int, go_on: Callable[[], None]) -> None:
        begun.append(number)
        if number == 2:
            raise error
        while True:  # the others, until they are told to end
            go_on()
            time.sleep(0.001)

    with pytest.raises(type(error)):
        at_once(work, range(9), 3)
    assert {0, 1, 2} <= set(begun)
