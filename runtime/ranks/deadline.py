"""How long ranks wait for each other when they meet."""

import math
import time


class Deadline:
    """A moment, which may be made an earlier one."""

    def __init__(self, seconds: float) -> None:
        """So many seconds from now."""
        self.moment = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative afterwards."""
        return self.moment - time.monotonic()

    def end(self) -> None:
        """Let it be now."""
        self.moment = -math.inf
