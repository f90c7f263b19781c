"""`Engine.plan`: what `Engine.load` then keeps to, and what `tools.plan` prints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint
from runtime import DeviceError, Engine, EngineOptions, LoadError, OptionError
from runtime.engine import DEMO
from runtime.planning import memory
from tests.runtime.planning.test_plan import LiveBytes
from tools import plan as sheet

OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16", "context": 100},
    {"slots": 3, "lookahead": 2, "prefetch": 2},
    {"offload": "always", "ram": "100MiB"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_plan_is_that_of_the_loaded_engine(options: dict[str, Any]) -> None:
    wishes = EngineOptions(device="cpu", **options)
    planned = Engine.plan(None, wishes)
    with Engine.load(None, wishes) as engine:
        assert engine.plan == planned
        assert (planned.device, planned.dtype) == (engine.device, engine.dtype)
        assert planned.resident == (engine.runner.cache is None)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_plan_is_that_of_the_planners_sheet(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"ram": "10GiB", "dtype": "float32"} | options
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert sheet.main([str(DEMO), "--device", "cpu", *words, "--json"]) == 0
    [column] = json.loads(capsys.readouterr().out)["plans"]
    planned = Engine.plan(None, EngineOptions(device="cpu", **options)).as_dict()
    assert {name: column[name] for name in planned} == planned


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of 80 GiB and compute capability 9.0, with nothing on it but this process's context."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    total = 80 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - memory.CONTEXT_BYTES, total))
    monkeypatch.setattr("runtime.planning.rates.measure_link", lambda device: None)
    memory.context_bytes.cache_clear()
    yield
    memory.context_bytes.cache_clear()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("slots", [8, 3])
def test_a_card_that_is_there_is_planned_as_one_that_is_not(
    slots: int, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = Engine.plan(None, EngineOptions(slots=slots)).as_dict()
    assert sheet.main([str(DEMO), "--slots", str(slots), "--json"]) == 0
    [column] = json.loads(capsys.readouterr().out)["plans"]
    assert (planned.pop("device"), column.pop("device")) == ("cuda:0", "cuda")
    assert column["resident"] == (slots == 8)
    assert {name: column[name] for name in planned} == planned


def test_nothing_is_read_or_allocated_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "fill", lambda *words: pytest.fail("weights were read"))
    with LiveBytes() as made:
        planned = Engine.plan(None, EngineOptions(device="cpu", slots=2))
    assert planned.slots_bytes > 0 and made.peak == 0


def test_a_plan_is_refused_as_loading_is(tmp_path: Path) -> None:
    for options, error, message in (
        (EngineOptions(device="cpu", ram="10KiB"), DeviceError, "the budget is 10.0 KiB"),
        (EngineOptions(device="cpu", slots=9), OptionError, "slots is 9"),
    ):
        for what in (Engine.plan, Engine.load):
            with pytest.raises(error, match=message):
                what(None, options)
    with pytest.raises(LoadError, match=str(tmp_path)):
        Engine.plan(tmp_path)


def test_a_percentage_of_memory_that_is_not_known_names_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.planning.request.free_device_bytes", lambda device: None)
    with pytest.raises(OptionError, match=r"^ram: '90%': how much memory there is cannot be told"):
        Engine.plan(None, EngineOptions(device="cpu", ram="90%"))


def test_the_name_is_the_method_on_the_class_alone() -> None:
    assert "reads headers only" in (Engine.plan.__doc__ or "")
    with pytest.raises(AttributeError, match="none yet"):
        _ = Engine.__new__(Engine).plan
