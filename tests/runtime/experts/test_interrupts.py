"""Ctrl-C at any moment: a short run of `interrupts.py`. Its long run is 40 times this."""

import signal
from pathlib import Path
from typing import Any

import pytest

from runtime import Engine, EngineOptions
from runtime.experts.link import HostLink
from tests.runtime.experts.interrupts import AtOnce, hammer_copies, hammer_requests

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")


@pytest.mark.parametrize("link", [HostLink, AtOnce, lambda: HostLink(50e6)], ids=["host", "at once", "slow"])
def test_interrupts_of_copies_leave_nothing_locked_and_no_wrong_byte(link: Any) -> None:
    assert hammer_copies(500, link()) == 500 * 4


OFFLOADED: dict[str, Any] = {"offload": "always", "slots": 2, "prefetch": 2}
OPTIONS = [{"offload": "never"}, OFFLOADED, OFFLOADED | {"misses": "auto", "link_gbps": 1.0, "cpu_gbps": 2.0}]


@pytest.mark.parametrize("options", OPTIONS)
def test_interrupts_of_requests_leave_nothing_locked_and_no_wrong_token(
    checkpoint: Path, options: dict[str, Any]
) -> None:
    with Engine.load(checkpoint, EngineOptions(device="cpu", dtype="float32", **options)) as engine:
        hammer_requests(100, engine, [5, 6, 7])
