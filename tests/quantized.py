"""Checkpoints quantized by the command, for tests that ask for their bytes and not for their quality."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tools.quantize import command as quantize


def quantize_folder(source: Path, folder: Path, experts: str) -> Path:
    """A checkpoint with attention at 4 bits, the head at 8, and experts in that format. Where hqq is not
    installed zeros are those that its solver begins with."""
    words = ["--attention", "4", "--experts", experts, "--head", "8"]
    words += ["--quiet", "--threads", "1", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("hqq") is None:
            optimize = SimpleNamespace(optimize_weights_proximal_legacy=unsolved)
            for name in ("hqq", "hqq.core"):
                patch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
            patch.setitem(sys.modules, "hqq.core.optimize", optimize)
        assert quantize.main([str(source), str(folder), *words]) == 0
    return folder


def quantizer(source: Path, made: Path) -> Callable[..., Path]:
    """A function that quantizes `source` to given formats of attention, experts and head, each only once.
    Folders are made below `made`."""

    def make(attention: object, experts: object, head: object = 16) -> Path:
        out = made / f"{attention}-{experts}-{head}"
        if not out.exists():
            words = ["--attention", str(attention), "--experts", str(experts), "--head", str(head)]
            words += ["--device", "cpu", "--threads", "1", "--quiet"]
            assert quantize.main([str(source), str(out), *words]) == 0
        return out

    return make


def unsolved(weights: Any, scale: Any, zero: Any, *limits: Any, **options: Any) -> tuple[Any, Any, Any]:
    """In place of hqq's solver."""
    return weights, scale, zero
