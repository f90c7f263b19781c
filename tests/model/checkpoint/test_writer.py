"""Files that the writer makes open with the safetensors package; unfinished ones are not there."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open

from model.checkpoint.safetensors import DTYPES, read_header
from model.checkpoint.writer import DATA_ALIGNMENT, TensorSpec, Writer

SPECS = [TensorSpec("b", torch.float32, (2, 3)), TensorSpec("a", torch.bfloat16, (4,))]


@given(
    st.lists(
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        max_size=6,
    )
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_opens_with_the_package(tmp_path: Path, kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> None:
    path = tmp_path / "a.safetensors"
    specs = [TensorSpec(f"tensor {i}", *kind) for i, kind in enumerate(kinds)]
    tensors = {spec.name: torch.randint(0, 2, spec.shape).to(spec.dtype) for spec in specs}
    with Writer(path, specs, {"format": "pt"}) as writer:
        for spec in specs:
            writer.write(spec.name, tensors[spec.name])
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = read_header(path)
    assert list(header.tensors) == [spec.name for spec in specs] or any(spec.bytes == 0 for spec in specs)
    assert all(entry.offset % DATA_ALIGNMENT == 0 for entry in list(header.tensors.values())[:1])


def test_takes_views_and_parameters(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    with Writer(tmp_path / "a", SPECS[:1]) as writer:
        writer.write("b", parameter.T)
    assert torch.equal(load_file(tmp_path / "a")["b"], parameter.T)


def test_unfinished_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("what was there before")
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "a", SPECS) as writer:
        writer.write("b", torch.zeros(2, 3))
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match="1 tensors have not been written"),
        Writer(tmp_path / "a", SPECS) as writer,
    ):
        writer.write("b", torch.zeros(2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "what was there before"


def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a", SPECS)
    writer.write("b", torch.zeros(2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.part"]
    writer.file.close()


def test_refuses_what_was_not_declared(tmp_path: Path) -> None:
    for name, tensor in {
        "a": torch.zeros(4, dtype=torch.bfloat16),
        "b": torch.zeros(3, 2),
    }.items():
        with pytest.raises(ValueError, match="expected TensorSpec"), Writer(tmp_path / "a", SPECS) as writer:
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="after the last"), Writer(tmp_path / "a", []) as writer:
        writer.write("a", torch.zeros(1))
    with pytest.raises(ValueError, match="'b'"):
        Writer(tmp_path / "a", [SPECS[0], SPECS[0]])
    assert list(tmp_path.iterdir()) == []
