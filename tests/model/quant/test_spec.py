"""Weight formats: how they are written, and what is refused, by name and with a remedy."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ModelError
from model.quant.spec import DEFAULTS, QuantSpec

GROUPS = st.sampled_from([0, *(1 << power for power in range(4, 13))])
SCALES_PER_STEP = st.sampled_from([0, *(1 << power for power in range(13))])
SPECS = st.builds(QuantSpec, st.sampled_from([8, 4, 3, 2]), GROUPS, SCALES_PER_STEP) | st.just(QuantSpec(16))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", (16, 0, 0)),
        ("8", (8, 64, 256)),
        ("4", (4, 64, 256)),
        ("3", (3, 64, 128)),
        ("2", (2, 16, 128)),
        ("3g128", (3, 128, 128)),
        ("2g64", (2, 64, 128)),
        ("4g64", (4, 64, 256)),
        ("4g32m64", (4, 32, 64)),
        ("8m16", (8, 64, 16)),
        ("2g32m1", (2, 32, 1)),
    ],
)
def test_written(text: str, expected: tuple[int, int, int]) -> None:
    assert dataclasses.astuple(QuantSpec.parse(text)) == expected


@given(SPECS)
def test_what_is_written_is_read_back(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec
    assert QuantSpec(*dataclasses.astuple(spec)) == spec


@given(st.text(alphabet="0123468gm -+x٣", max_size=9) | st.text(max_size=5))
def test_any_text_is_a_format_or_a_model_error(text: str) -> None:
    try:
        spec = QuantSpec.parse(text)
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert spec.bits in DEFAULTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "5 bits per weight are not supported; choose 16, 8, 4, 3 or 2"),
        ("four", "'four' is not a weight format"),
        ("", "'' is not a weight format"),
        ("4g", "'4g' is not a weight format"),
        ("4g0", "'4g0' is not a weight format"),
        ("3g", "as in 3g128"),
        ("4g48", "group size 48 is not a power of two from 16 to 4096; the default for 4 bits is 64"),
        ("2g8", "group size 8 is not a power of two"),
        ("4g8192", "group size 8192 is not"),
        (
            "4m100",
            "number of scales per step 100 is not a power of two from 1 to 4096; the default for 4 bits",
        ),
        ("4m8192", "number of scales per step 8192 is not"),
        ("16g64", "16 bits are not quantized and have no groups; write 16 alone"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        QuantSpec.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("4", (32, 96), "layers.0.w2: 96 inputs do not divide into groups of 64; use 4g32"),
        ("4", (32, 40), "layers.0.w2: 40 inputs do not divide into groups of 64; leave it at 16 bits"),
        ("2g128", (32, 4096 + 64), "layers.0.w2: 4160 inputs do not divide into groups of 128; use 2g64"),
        ("4", (32, 48), "layers.0.w2: 48 inputs do not divide into groups of 64; leave it at 16 bits"),
        ("2", (32, 48), "layers.0.w2: 48 inputs are not a multiple of 32; leave it at 16 bits"),
        ("2", (24, 64), "layers.0.w2: 24 rows are not a multiple of 16; leave it at 16 bits"),
        ("2", (64,), "layers.0.w2: shape [64] is not a matrix, and only matrices are quantized"),
        ("2", (0, 64), "layers.0.w2: shape [0, 64] is not a matrix"),
    ],
)
def test_shapes_refused(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        QuantSpec.parse(spec).check("layers.0.w2", shape)
    assert message in str(caught.value)


def test_shapes_taken() -> None:
    QuantSpec(4).check("w", (16, 64))
    QuantSpec(16).check("w", (7, 13))
    QuantSpec(16).check("norm", (7,))


@pytest.mark.parametrize(
    ("text", "K", "bits"),
    [
        ("16", 4096, 16.0),
        ("8", 4096, 8.258),
        ("4", 4096, 4.258),
        ("4", 14336, 4.252),
        ("3", 4096, 3.258),
        ("3g128", 4096, 3.133),
        ("2", 4096, 3.016),
        ("2g64", 4096, 2.258),
        ("2g64", 14336, 2.254),
        ("2g64m1", 14336, 2.75),
        ("4", 64, 4.75),
    ],
)
def test_bits_per_weight(text: str, K: int, bits: float) -> None:
    assert QuantSpec.parse(text).bits_per_weight(K) == pytest.approx(bits, abs=5e-4)
