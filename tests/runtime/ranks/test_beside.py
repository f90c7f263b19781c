import threading
import time

import pytest

from runtime.ranks.beside import beside
from runtime.ranks.deadline import Deadline


def test_results_and_errors_come_through() -> None:
    assert beside(lambda: 5, lambda: None) == 5
    with pytest.raises(ZeroDivisionError):
        beside(lambda: 1 // 0, lambda: None)


def test_work_that_is_given_up_ends() -> None:
    """Whatever ends the waiting: here `look`, and in life Ctrl-C, too."""
    deadline, before = Deadline(60), threading.active_count()

    def work() -> None:
        while deadline.left > 0:
            time.sleep(0.01)

    def look() -> None:
        if threading.active_count() > before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        beside(work, look, deadline.end)
    assert threading.active_count() == before
