"""Ranks that disagree: another checkpoint, another option, other layers, or one that does not come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Command = list[str]


@dataclass(frozen=True)
class Disagreement:
    """The commands of all ranks, of which one differs; None is a rank that does not come. The refusal of each
    has to hold one of `words`."""

    name: str
    commands: tuple[Command | None, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoints:
    """What a rank may have in place of the checkpoint that the others have."""

    weights: str  # of the same shape
    shape: str
    missing: str


Maker = Callable[[Command, int, Random, Checkpoints], tuple[Command | None, tuple[str, ...]]]


def disagreement(command: Sequence[str], size: int, chance: Random, has: Checkpoints) -> Disagreement:
    """One rank gets something else than the others. `command` is that of all of them."""
    kind = chance.choice(list(KINDS))
    odd = chance.randrange(size)
    commands: list[Command | None] = [list(command) for _ in range(size)]
    commands[odd], words = KINDS[kind](list(command), size, chance, has)
    return Disagreement(kind, tuple(commands), words)


def with_model(command: Command, model: str) -> Command:
    at = command.index("--model") + 1
    return [*command[:at], model, *command[at + 1 :]]


def other_weights(
    command: Command, size: int, chance: Random, has: Checkpoints
) -> tuple[Command | None, tuple[str, ...]]:
    return with_model(command, has.weights), ("model", "checkpoint", "weights")


def other_shape(
    command: Command, size: int, chance: Random, has: Checkpoints
) -> tuple[Command | None, tuple[str, ...]]:
    return with_model(command, has.shape), ("model", "checkpoint", "layers")


def no_folder(
    command: Command, size: int, chance: Random, has: Checkpoints
) -> tuple[Command | None, tuple[str, ...]]:
    return with_model(command, has.missing), (has.missing,)


def other_option(
    command: Command, size: int, chance: Random, has: Checkpoints
) -> tuple[Command | None, tuple[str, ...]]:
    others = (("--context", "896"), ("--kv", "8"), ("--dtype", "bfloat16"), ("--parallel", "2"))
    name, value = chance.choice(others)
    return [*command, name, value], (name, name.removeprefix("--"))


def other_layers(
    command: Command, size: int, chance: Random, has: Checkpoints
) -> tuple[Command | None, tuple[str, ...]]:
    counts = chance.choice((["1"] * size, ["4"] * size, ["8"]))
    return [*command, "--rank-layers", ",".join(counts)], ("rank-layers", "rank_layers", "layers")


def does_not_come(
    command: Command, size: int, chance: Random, has: Checkpoints
) -> tuple[Command | None, tuple[str, ...]]:
    return None, ("rank",)


KINDS: dict[str, Maker] = {
    "other weights": other_weights,
    "another shape": other_shape,
    "no such folder": no_folder,
    "another option": other_option,
    "other layers": other_layers,
    "one does not come": does_not_come,
}
