"""What must be the same on all ranks, so that they compute one model as a single process would."""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import Identity
from runtime.options import RATES, EngineOptions
from runtime.planning.device import find_device

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("model", "runtime", "tokenizer")
# Options that describe one machine, and one that only the rank with the tokenizer uses.
OWN = {"device", "vram", "ram", "threads", *RATES, "chat_template"}


def facts(options: EngineOptions, identity: Identity) -> dict[str, Any]:
    """This rank's, for `Meeting.share`.

    Kernels count where a CPU computes, since its numbers depend on whether numba is there. A GPU's build of
    torch may differ from a CPU's.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    own: dict[str, Any] = {
        "model": [identity.name, identity.digest],
        "mixtral-runtime": version(),
        "torch": torch.__version__.split("+")[0],
        "options": {
            name: value if isinstance(value, (int, float, str, type(None))) else f"{value}"
            for name, value in values.items()
            if name not in OWN
        },
    }
    if callable(options.policy):
        own["options"]["policy"] = getattr(options.policy, "__qualname__", type(options.policy).__name__)
    if find_device(options.device).type == "cpu":
        own["numba"] = find_spec("numba") is not None
    return own


def version(root: Path = ROOT) -> str:
    """This package's version, and a digest of its sources, since a version may have more than one state."""
    try:
        number = importlib.metadata.version("mixtral-runtime")
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the repository
        number = "not installed"
    digest = hashlib.sha256()
    for file in sorted(file for room in SOURCES for file in (root / room).rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0")
        digest.update(file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return f"{number} ({digest.hexdigest()[:12]})"


def differences(facts: Sequence[dict[str, Any]]) -> str | None:
    """One line that names a rank and what it has otherwise than rank 0, or a later rank; None if all agree.
    `facts` are those of all ranks, in their order.

    >>> differences([{"torch": "2.13.0"}, {"torch": "2.11.0"}])
    'rank 1 has torch 2.11.0, and rank 0 has 2.13.0; install the same on all ranks'
    """
    for judge in (program, checkpoint, kernels, option):
        for rank, own in enumerate(facts):
            for other, theirs in enumerate(facts[:rank]):
                if line := judge(f"rank {rank}", own, f"rank {other}", theirs):
                    return line
    return None


def program(rank: str, own: dict[str, Any], other: str, theirs: dict[str, Any]) -> str | None:
    for name in ("mixtral-runtime", "torch"):
        if own.get(name) != theirs.get(name):
            return (
                f"{rank} has {name} {own.get(name)}, and {other} has {theirs.get(name)}; "
                "install the same on all ranks"
            )
    return None


def checkpoint(rank: str, own: dict[str, Any], other: str, theirs: dict[str, Any]) -> str | None:
    (name, digest), (their_name, their_digest) = own.get("model", "??"), theirs.get("model", "??")
    if digest == their_digest:
        return None
    return (
        f"{rank} has another checkpoint than {other}: {name} (digest {digest[:12]}) and "
        f"{their_name} ({their_digest[:12]}); give all ranks the same --model, with the same files"
    )


def kernels(rank: str, own: dict[str, Any], other: str, theirs: dict[str, Any]) -> str | None:
    """Only of ranks that compute on a CPU."""
    if "numba" not in own or "numba" not in theirs or own["numba"] == theirs["numba"]:
        return None
    has, lacks = (rank, other) if own["numba"] else (other, rank)
    return (
        f"{has} has numba and {lacks} has not, so they would compute by other kernels than each other; "
        "pip install 'mixtral-runtime[cpu]' on all ranks that compute on a CPU, or on none"
    )


def option(rank: str, own: dict[str, Any], other: str, theirs: dict[str, Any]) -> str | None:
    mine, others = own.get("options", {}), theirs.get("options", {})
    for name in sorted(mine.keys() | others.keys()):
        if mine.get(name) != others.get(name):
            return (
                f"{rank} has the option {name} {said(mine.get(name))}, and {other} {said(others.get(name))}; "
                "give all ranks the same"
            )
    return None


def said(value: object) -> str:
    """
    >>> said(None), said(16)
    ('by default', '16')
    """
    return "by default" if value is None else f"{value}"
