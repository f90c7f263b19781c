"""Size against quality: the frontier, the tables, the plot, and the command on a stand-in for quantizing."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dev.bench import command as bench
from dev.bench import quality, quality_table
from dev.bench.quality import first_bytes
from dev.bench.quality_plot import plot
from dev.bench.quality_table import (
    Result,
    all_formats,
    frontier,
    markdown,
    parse_formats,
    short,
    table,
)
from model.checkpoint import open_checkpoint
from model.mixtral import Mixtral
from model.quant.formats import Formats
from model.quant.size import expert_bits, model_size
from model.quant.solve import quantize
from model.shapes import MIXTRAL_8X7B
from runtime import MixtralError
from runtime.engine import DEMO
from tokenizer import Tokenizer
from tools.perplexity import Score, negative_log_likelihood
from tools.quantize import command as quantize_command

MEASURED = {  # size, nats per token
    "16/16": (20_000_000, 1.50), "16/4": (9_000_000, 1.53), "4/16": (17_000_000, 1.51),
    "4/4": (8_000_000, 1.54), "4/3": (6_000_000, 1.70), "4/2": (6_500_000, 1.90), "4/2g64": (5_000_000, 2.10),
}  # fmt: skip


def result(formats: str, size: int, nats: float) -> Result:
    made = parse_formats(formats)
    bits = expert_bits(MIXTRAL_8X7B, made.experts)
    return Result(made, size, bits, Score(nats * 10, tokens=10, bytes=30, seconds=1.0))


@pytest.fixture
def results() -> list[Result]:
    return [result(formats, *measured) for formats, measured in MEASURED.items()]


def test_what_is_measured_by_default() -> None:
    formats = [short(one) for one in all_formats()]
    assert len(formats) == len(set(formats)) == 21
    assert {f"{a}/{e}" for a in (16, 4, 3, 2) for e in (16, 4, 3, 2)} <= set(formats)
    # as users write them; what is a default group comes out without it
    wanted = ["4/2g64", "4/2g32", "4/2g16", "4/3g128", "4/3g64", "4/4g64", "4/4g128", "4/8"]
    assert {short(parse_formats(text)) for text in wanted} <= set(formats)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12))
def test_the_frontier_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    results = [result("4/4", size, nats) for size, nats in points]
    best = {(one.bytes, one.score.nats / 10) for one in frontier(results)}
    for size, nats in points:
        beaten = any(s <= size and n <= nats and (s, n) != (size, nats) for s, n in points)
        assert ((size, nats) in best) == (not beaten)
    sizes = [one.bytes for one in frontier(results)]
    assert sizes == sorted(sizes)


def test_tables(results: list[Result]) -> None:
    first, second, note = markdown(results).split("\n\n")
    assert [line.split("|")[1:3] for line in first.splitlines()[2:]] == [
        [" **16** ", " **16** "], [" **16** ", " **4** "], [" **4** ", " **16** "], [" **4** ", " **4** "],
        [" **4** ", " **3** "], [" 4 ", " 2 "],
    ]  # fmt: skip
    assert "| **4** | **4** | **16** | 4.26 | 8.00 | 40.0 % | 4.665 | +4.1 % | 0.7406 |" in first
    assert [line.split("|")[2].strip(" *") for line in second.splitlines()[2:]] == ["4", "2", "3", "2g64"]
    assert "bold" in note
    rows = [line.count("|") for line in first.splitlines() + second.splitlines()]
    assert set(rows) == {10}


def test_tables_without_the_original(results: list[Result]) -> None:
    some = [one for one in results if short(one.formats) in ("4/4", "3/3")]
    assert "| **4** | **4** | **16** | 4.26 | 8.00 | - | 4.665 | - | 0.7406 |" in table(some, None, some)
    assert "+" not in markdown(some)


def test_what_fits_neither_table_is_in_a_third(results: list[Result]) -> None:
    odd = [result("8/3g128", 9_500_000, 1.52), result("4/4/8", 7_900_000, 1.5401)]
    third = markdown([*results, *odd]).split("\n\n")[2].splitlines()[2:]
    assert [line[:28] for line in third] == ["| **8** | **3g128** | **16**", "| **4** | **4** | **8** | 4."]


def test_a_plot(results: list[Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(results, tmp_path / "quality.png")
    data = (tmp_path / "quality.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_the_first_bytes_of_texts() -> None:
    texts = ["ab", "é", "cd"]
    assert ["".join(first_bytes(texts, n)) for n in (1, 2, 3, 4, 5, 99)] == [
        "a", "ab", "ab", "abé", "abéc", "abécd",
    ]  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Figures from the table above instead of a quantizer and a model; what was asked for is kept."""
    asked: list[tuple[str, int]] = []

    def write(source: Path, out: Path, formats: Formats) -> None:
        asked.append((short(formats), 0))
        out.mkdir()

    def judge(folder: Path, formats: Formats, texts: list[str], fast: bool) -> Result:
        assert folder.is_dir() and not fast
        asked[-1] = (asked[-1][0], len("".join(texts).encode()))
        return result(short(formats), *MEASURED[short(formats)])

    monkeypatch.setattr(quality, "write", write)
    monkeypatch.setattr(quality, "judge", judge)
    return asked


def test_the_command(
    measured: list[tuple[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tables.md"
    words = ["quality", "--formats", *MEASURED, "--bytes", "1000", "--markdown", str(file)]
    assert bench.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert measured == [(formats, 1000) for formats in MEASURED]
    assert report["frontier"] == ["4/2g64", "4/3", "4/4", "16/4", "4/16", "16/16"]
    first = report["results"][0]
    assert (first["attention"], first["experts"], first["bytes"]) == ("16", "16", 20_000_000)
    assert first["score"]["bits_per_byte"] == pytest.approx(
        result("4/4", *MEASURED["16/16"]).score.bits_per_byte
    )
    assert err.count("\n") == len(MEASURED) and err.startswith("1 of 7: 16/16, 20.00 MB, perplexity 4.4817")
    assert bench.main(words) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(file.read_text().rstrip()) and "1,000 bytes of text in float32, 7 s on" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "4"], "'4' is not a pair of formats: write attention/experts"),
        (["--formats", "4/5"], "5 bits per weight are not supported"),
        (["--bytes", "0"], "--bytes is 0"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_measured(
    measured: list[tuple[str, int]], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["quality", *words]) == (2 if "--bytes" in words else 1)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert measured == []


def test_without_matplotlib(
    measured: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["quality", "--plot", "x.png"]) == 2
    assert capsys.readouterr().err.startswith("error: --plot needs matplotlib; install it")
    assert measured == []


def test_a_quantizer_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quantize_command, "main", lambda argv: 1)
    with pytest.raises(MixtralError, match="cannot be quantized to 4/4"):
        quality.write(tmp_path, tmp_path / "out", parse_formats("4/4"))
    monkeypatch.setattr(quantize_command, "main", lambda argv: 130)
    with pytest.raises(KeyboardInterrupt):
        quality.write(tmp_path, tmp_path / "out", parse_formats("4/4"))


def test_a_native_checkpoint_is_as_good_as_its_dequantized_weights(tmp_path: Path) -> None:
    formats, text = parse_formats("4/3g128/4"), Path(quality_table.__file__).read_text()[:3000]
    quality.write(DEMO, tmp_path / "out", formats)
    measured = quality.judge(tmp_path / "out", formats, [text])
    checkpoint = open_checkpoint(DEMO)
    ids = Tokenizer.load(DEMO).encode(text)
    model = Mixtral(checkpoint.config).requires_grad_(False)
    checkpoint.load(model)
    plain = negative_log_likelihood(model, ids, 1024, 512)
    for name, weight in model.named_parameters():
        for word, spec in (
            ("self_attn", formats.attention),
            (".experts.", formats.experts),
            ("lm_head", formats.head),
        ):
            if word not in name:
                continue
            weight.copy_(quantize(weight, spec, name)[0].dequantize())
    expected = negative_log_likelihood(model, ids, 1024, 512)
    assert measured.bytes == model_size(checkpoint.config, formats).total
    assert measured.score.nats == pytest.approx(expected, rel=1e-5)
    assert abs(expected / plain - 1) > 1e-3


def test_the_fast_product_has_a_column_of_its_own() -> None:
    exact, rounded = Score(nats=2.0, tokens=1, bytes=1), Score(nats=2.001, tokens=1, bytes=1)
    results = [
        Result(parse_formats("4/4"), 5, 4.0, exact, rounded),
        Result(parse_formats("4/2"), 4, 2.0, exact),
    ]
    first, second = table(results, None, []).splitlines()[2:]
    assert first.endswith("| +0.10 % |") and second.endswith("| - |")
    assert results[0].as_dict()["fast"] == rounded.as_dict() and "fast" not in results[1].as_dict()
