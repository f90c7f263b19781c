"""Sizes: reading, writing, refusing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import quoted
from runtime import OptionError
from runtime.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("1k", 1024),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("11GiB", 11 << 30),
        ("11G", 11 << 30),
        ("11 gib", 11 << 30),
        ("11GB", 11 * 10**9),
        ("0.5 MiB", 512 << 10),
        ("2TB", 2 * 10**12),
        (" 2TiB ", 2 << 40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "size"), [("90%", 900), ("100 %", 1000), ("0%", 0), ("12.5%", 125)])
def test_percentages_are_of_the_whole(text: str, size: int) -> None:
    assert parse_bytes(text, whole=1000) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "-1",
        "-1GiB",
        "1e9",
        "1.GiB",
        ".5G",
        "1 2",
        "11 GiBs",
        "11Gb/s",
        "0x10",
        "1_000",
        "9" * 400,
    ],
)
def test_anything_else_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_bytes(text)
    assert quoted(text) in str(caught.value)


def test_percentages_need_a_whole_and_stay_below_it() -> None:
    with pytest.raises(OptionError, match="'101%' is more"):
        parse_bytes("101%", whole=1000)
    with pytest.raises(OptionError, match=r"'50%'.*write the size in GiB"):
        parse_bytes("50%")


@given(st.integers(0, 1 << 60))
def test_what_is_written_reads_back_within_its_rounding(size: int) -> None:
    text = format_bytes(size)
    unit = text.split()[1]
    assert abs(parse_bytes(text) - size) <= 0.05 * parse_bytes("1" + unit) + 1
    assert size < 1024 or 1 <= float(text.split()[0]) <= 1024 or unit == "TiB"


def test_borders_between_units() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1024, 1 << 20, (1 << 30) - 1, 1 << 40, 3 << 50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.0 MiB",
        "1024.0 MiB",
        "1.0 TiB",
        "3072.0 TiB",
    ]
