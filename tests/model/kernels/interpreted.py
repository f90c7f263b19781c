"""Where kernels run, in Triton's interpreter on a CPU or on a GPU, and what the interpreter needs."""

import os
from typing import Any

import pytest

from model.kernels import launching
from model.target import TURING

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(params=["tensor cores", "none"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of this device, or those for GPUs where Triton uses no tensor cores."""
    if request.param == "none":
        monkeypatch.setattr(launching, "capability_of", lambda device: TURING)


def mend() -> None:
    """The interpreter of Triton 3.6 takes a loop's bounds from arrays of one number by `int(array)`, which
    NumPy refuses from 2.4 on. Later ones do as this does."""
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang_tensor

    def prepared(tensor: Any, *scope: Any) -> None:
        prepare(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = prepared


if INTERPRETED:
    mend()
