"""`runtime.generate`, whose ranks wait only some seconds until all have come, and not minutes."""

from runtime.shell.command import launch

if __name__ == "__main__":
    launch("dev.harness.ranks.impatient")

from functools import partial

from runtime import generate
from runtime.ranks.meeting import Meeting

PATIENCE = 20.0  # seconds, on a busy machine


def main() -> int:
    Meeting.join = partial(Meeting.join, patience=PATIENCE)  # type: ignore[method-assign]
    return generate.main()
