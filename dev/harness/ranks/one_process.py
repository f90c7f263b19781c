"""What one process writes: the text that ranks have to write as well."""

from collections.abc import Sequence
from pathlib import Path

from dev.harness.outcome import Wrong
from dev.harness.ranks.asked import Asked
from dev.harness.ranks.launching import Ranks, Way
from dev.harness.ranks.moments import PATIENCE, Pace, Scene, Terminal


def written_by_one(command: Sequence[str], messages: Sequence[str], folder: Path) -> str:
    """What the command writes to stdout, if the messages are typed. Raises `Wrong` if it fails."""
    terminal = Terminal() if messages else None
    ranks = Ranks([command], Way("alone"), folder, terminal=terminal.path if terminal else None)
    scene = Scene(ranks, Asked(tuple(command), "", tuple(messages)), Pace(), terminal)
    try:
        for message in messages:
            scene.type(message)
        if terminal:
            scene.until(scene.asks)
            terminal.write("\x04")
        if not ranks.launched_end(PATIENCE) or ranks.status(0):
            raise Wrong(f"one process does not write the text: {scene.told()}")
        return ranks.out(0)
    finally:
        ranks.end()
        if terminal:
            terminal.close()
