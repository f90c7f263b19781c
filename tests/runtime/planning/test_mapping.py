"""Plans of models whose files are mapped: what is allocated, and when the files are too large."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.quant.backends import Blocks
from model.quant.formats import Formats
from model.quant.size import model_size
from model.quant.spec import QuantSpec
from model.target import Target
from runtime import DeviceError, EngineOptions
from runtime.planning.plan import Plan
from runtime.planning.planner import larger_than_memory, make_plan
from runtime.planning.request import Budget, Budgets, Request
from runtime.planning.search import excess_bytes
from runtime.units import format_bytes, parse_bytes
from tests.runtime.planning.asked import CPU, SMALL
from tools import plan as sheet

GIVEN = replace(SMALL, hidden=128, heads=8, ffn=256, vocab=512, context=512)
SPECS = st.sampled_from([QuantSpec.parse(text) for text in ("16", "8", "4", "3g128", "2", "2g64")])
FORMATS = st.builds(Formats, SPECS, SPECS, SPECS)
FILES = [torch.bfloat16, torch.float16]


def request(
    formats: Formats,
    dtype: torch.dtype,
    files: torch.dtype | None,
    budget: int | None = None,
    **options: Any,
) -> Request:
    wishes = EngineOptions(dtype=str(dtype).removeprefix("torch."), **options)
    budgets = Budgets(Budget(budget, "memory"), Budget(None, "memory"))
    return Request.make(GIVEN, formats, wishes, Target(CPU), budgets, files)


@given(
    FORMATS,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(FILES),
    st.sampled_from(["auto", "always"]),
)
def test_what_is_mapped_is_not_allocated(
    formats: Formats, dtype: torch.dtype, files: torch.dtype, offload: str
) -> None:
    mapped = make_plan(request(formats, dtype, files, offload=offload))
    read = make_plan(request(formats, dtype, files, offload=offload, map=False))
    assert read == make_plan(request(formats, dtype, None, offload=offload)), "files that cannot be mapped"
    same = ("chunk", "kv_bytes", "workspace_bytes", "staging_bytes", "arena_bytes", "blob_bytes", "resident")
    assert all(getattr(mapped, name) == getattr(read, name) for name in same)
    assert mapped.slots_per_layer == read.slots_per_layer and read.mapped_bytes == 0
    saved = read.device_bytes - mapped.device_bytes
    pieces = 1 + 2 * GIVEN.layers + GIVEN.layers * GIVEN.experts  # are rounded up in memory
    if dtype != torch.bfloat16:  # Blocks serve these, and keep files' bytes
        assert 0 <= saved - mapped.mapped_bytes <= 256 * pieces
        size = model_size(GIVEN, formats)
        expected = size.experts if mapped.resident and (formats.experts.quantized or dtype == files) else 0
        assert (mapped.mapped_bytes >= expected) and (mapped.slots_bytes == 0) == (expected > 0)
    else:
        assert saved >= 0 and (mapped.mapped_bytes > 0) >= (files == dtype)


def test_a_backend_that_keeps_files_bytes_is_mapped_in_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.quant.backends.BACKENDS", (Blocks,))
    formats = Formats(QuantSpec(4), QuantSpec(3), QuantSpec(8))
    size = model_size(GIVEN, formats)
    planned = make_plan(request(formats, torch.bfloat16, torch.bfloat16))
    attention = GIVEN.layers * 2 * (GIVEN.heads + GIVEN.kv_heads) * GIVEN.head_dim * GIVEN.hidden
    least = size.experts + attention * 4 // 8 + size.head + GIVEN.vocab * GIVEN.hidden * 2
    assert least < planned.mapped_bytes < least * 1.05 and planned.slots_bytes == 0


@given(st.data(), FORMATS, st.booleans())
def test_only_what_is_allocated_has_to_fit(data: st.DataObject, formats: Formats, wish: bool) -> None:
    free = make_plan(request(formats, torch.float32, torch.bfloat16, map=wish))
    everything = free.device_bytes + free.mapped_bytes
    budget = data.draw(
        st.integers(free.device_bytes - 9, free.device_bytes + 9) | st.integers(1, 2 * everything)
    )
    asked = request(formats, torch.float32, torch.bfloat16, budget, map=wish)
    if budget < free.device_bytes:
        with pytest.raises(DeviceError, match="need "):
            make_plan(asked.changed(offload="never"))  # an arena may need less
        return
    planned = make_plan(asked)
    assert planned == free
    line = larger_than_memory(asked, planned)
    assert excess_bytes(asked, planned) == max(everything - budget, 0) * (free.mapped_bytes > 0)
    assert (line is not None) == (free.mapped_bytes > 0 and budget < everything)
    if line:
        said = re.match(r"the model is (\S+ \S+) larger than memory \((\S+ \S+)\): ", line)
        assert said and "\n" not in line
        for text, size in zip(said.groups(), (everything - budget, budget), strict=True):
            assert abs(parse_bytes(text) - size) <= 0.06 * max(size, 1024) and parse_bytes(text) >= 0


def test_on_a_gpu_nothing_is_mapped() -> None:
    formats, options = Formats(QuantSpec(4), QuantSpec(3), QuantSpec(8)), EngineOptions()
    asked = Request.make(GIVEN, formats, options, Target.hypothetical(), None, torch.bfloat16)
    plan: Plan = make_plan(asked)
    assert plan.mapped_bytes == 0 and plan.slots_bytes > 0


def test_the_sheet_tells_mapped_bytes_from_allocated_ones(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "mixtral-8x7b", "--attention", "4", "--experts", "3g128", "--head", "8"]
    words += ["--device", "cpu", "--dtype", "float32", "--ram"]
    assert sheet.main([*words, "8GiB,32GiB", "--json"]) == 0
    small, large = json.loads(capsys.readouterr().out)["plans"]
    assert small["mapped_bytes"] == large["mapped_bytes"] > 16 << 30 and small["slots_bytes"] == 0
    assert small["left_over_bytes"] + small["device_bytes"] == 8 << 30
    assert small["excess_bytes"] == small["device_bytes"] + small["mapped_bytes"] - (8 << 30)
    assert large["excess_bytes"] == 0
    assert sheet.main([*words, "8GiB,32GiB"]) == 0
    out = capsys.readouterr().out
    row = re.search(r"^mapped from files, GiB +(\S+) +(\S+)$", out, re.MULTILINE)
    assert row and {*row.groups()} == {f"{small['mapped_bytes'] / 2**30:.2f}"}
    excess = format_bytes(small["excess_bytes"])
    assert re.findall(r"^(\S+): (the model is .*) \(8.0 GiB\)", out, re.MULTILINE) == [
        ("8GiB", f"the model is {excess} larger than host memory")
    ]
    assert sheet.main([*words, "8GiB,32GiB", "--no-map"]) == 0
    out = capsys.readouterr().out
    assert "mapped" not in out and "8GiB: need " in out
