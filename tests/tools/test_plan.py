"""The planner's sheet: shapes and checkpoints, several sizes at once, refusals and usage."""

import json
import re
from collections.abc import Callable

import pytest
import torch

from model.quant.expert import aligned
from model.quant.formats import Formats
from model.quant.size import model_size
from model.quant.spec import QuantSpec
from model.quant.streams import matrix_fields
from model.shapes import MIXTRAL_8X7B, SHAPES
from runtime.engine import DEMO
from tools import plan

Run = Callable[..., tuple[int, str, str]]
SHEET = ("--shape", "mixtral-8x7b", "--attention", 4, "--experts", 2, "--head", 8)
FORMATS = Formats(QuantSpec(4), QuantSpec(2), QuantSpec(8))
THREE = Formats(QuantSpec(4), QuantSpec(3, 128), QuantSpec(8))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, on a machine without a GPU; gives status, stdout and stderr."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("the GPU was asked for"))

    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = plan.main([str(word) for word in words])
        except SystemExit as exit:
            status = int(str(exit.code))
        return status, *capsys.readouterr()

    return run


def test_a_table_has_a_column_for_each_size(run: Run) -> None:
    status, out, err = run(*SHEET, "--vram", "8GiB,11GiB,12GiB,16GiB,24GiB")
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert lines[0] == [f"mixtral-8x7b, {FORMATS}, in bfloat16 on cuda, context 4096 tokens"]
    assert lines[1] == ["", "8GiB", "11GiB", "12GiB", "16GiB", "24GiB"]
    rows = {row[0]: row[1:] for row in lines[2:-1]}
    assert all(len(row) == 5 for row in rows.values())
    assert rows["slots per layer"][0] == "2 in 14 layers, 3 in 18" and rows["slots per layer"][-1] == "all 8"
    assert rows["spare slots"] == ["1", "1", "1", "1", "0"]
    used = [int(cell.replace(",", "")) for cell in rows["device, all, bytes"]]
    left = [int(cell.replace(",", "")) for cell in rows["left over, bytes"]]
    assert [a + b for a, b in zip(used, left, strict=True)] == [n << 30 for n in (8, 11, 12, 16, 24)]
    assert rows["device, all, GiB"][0] == f"{used[0] / 2**30:.2f}"
    assert lines[-1][0].startswith(
        "An expert is 63.3 MiB (66,404,352 bytes); a miss takes 5.5 ms at 12 GB/s, "
    )


def test_json_has_the_bytes_of_every_term(run: Run) -> None:
    status, out, _ = run(*SHEET, "--vram", "24GiB,8GiB,1GiB", "--json")
    sheet = json.loads(out)
    resident, offloaded, refused = sheet["plans"]
    size = model_size(MIXTRAL_8X7B, FORMATS)
    assert [sheet[key] for key in ("attention", "experts", "head", "device")] == ["4", "2", "8", "cuda"]
    assert status == 0
    assert resident["resident"] and resident["slots_bytes"] == size.experts and resident["arena_bytes"] == 0
    assert (
        resident["trunk_bytes"] == size.trunk + size.gates + 2 * 32768 * 128 * 2
    )  # float32 gates; rotary tables
    assert offloaded["arena_bytes"] == offloaded["host_bytes"] == size.experts
    assert sum(offloaded["slots_per_layer"]) * size.expert == offloaded["slots_bytes"]
    assert offloaded["budget_bytes"] == 8 << 30 == offloaded["device_bytes"] + offloaded["left_over_bytes"]
    assert offloaded["seconds_per_miss"]["25 GB/s"] == size.expert / 25e9
    assert refused["size"] == "1GiB" and refused["error"].startswith("need ") and "slots_bytes" not in refused


def test_a_size_that_is_too_small_has_a_reason_instead_of_a_column(run: Run) -> None:
    status, out, err = run(*SHEET, "--vram", "6.75GiB,8GiB,9GiB", "--markdown")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert re.fullmatch(r"\| +\| +8GiB \| +9GiB \|", lines[2]) and lines[3] == "|---|---:|---:|"
    assert lines[-1].startswith("6.75GiB: need 4.0 GiB for 2 slots per layer, ")
    context = re.search(r"lower --context to (\d+)", lines[-1])
    assert context and run(*SHEET, "--vram", "6.75GiB", "--context", context[1])[0] == 0


def test_the_status_is_one_where_no_size_is_enough(run: Run) -> None:
    status, out, err = run(*SHEET, "--vram", "2GiB,1GiB")
    assert status == 1 and out == ""
    assert [line[:18] for line in err.splitlines()] == ["error: 2GiB: need ", "error: 1GiB: need "]
    status, out, _ = run(*SHEET, "--vram", "2GiB", "--json")
    assert status == 1 and json.loads(out)["plans"][0]["error"]
    status, _, err = run(*SHEET, "--vram", "12GiB", "--ram", "12GiB")
    assert status == 0 and err == ""
    plain = ("--shape", "mixtral-8x7b", "--vram", "32GiB", "--ram", "12GiB")
    status, _, err = run(*plain)
    assert status == 1 and "need 84.0 GiB of host memory for 8 experts in each of 32 layers" in err
    words = re.search(r"quantize with --experts (\S+) \(python -m tools.quantize\)", err)
    assert (
        words and json.loads(run(*plain, "--experts", words[1], "--json")[1])["plans"][0]["file_experts"] == 0
    )


@pytest.mark.parametrize("shape", ["mixtral-8x7b", "mixtral-8x22b"])
def test_one_size_gives_gib_and_bytes_side_by_side(run: Run, shape: str) -> None:
    status, out, _ = run("--shape", shape, "--experts", "3g128", "--vram", "40GB", "--slots", 2)
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert status == 0 and lines[1] == ["40GB", "GiB", "bytes"]
    assert ["slots per layer", f"2 in each of {SHAPES[shape].layers} layers"] in lines
    assert ["berths in host memory", f"all {SHAPES[shape].layers * 8}"] in lines
    for label, gib, exact in lines[2:-5]:
        assert gib == f"{int(exact.replace(',', '')) / 2**30:.2f}", label


def test_three_tiers_in_one_sheet(run: Run) -> None:
    words = ("--shape", "mixtral-8x7b", "--attention", 4, "--experts", 2)
    status, out, err = run(*words, "--vram", "15GiB, 8GiB", "--ram", "11GiB,8GiB")
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert (status, err) == (0, "") and lines[1] == ["", "15GiB + 11GiB", "8GiB + 8GiB"]
    rows = {row[0]: row[1:] for row in lines[2:-1]}
    columns = json.loads(run(*words, "--vram", "15GiB,8GiB", "--ram", "11GiB,8GiB", "--json")[1])["plans"]
    for n, (column, ram) in enumerate(zip(columns, (11, 8), strict=True)):
        assert rows["berths in host memory"][n] == f"{column['berths']} of 256"
        assert rows["experts read from files"][n] == str(column["file_experts"])
        assert column["arena_bytes"] == column["berths"] * (66404352 + 8192) <= ram << 30
        assert column["spares"] == 1 + 2
        assert column["file_experts"] == max(258 - column["berths"] - sum(column["slots_per_layer"]), 0)
        assert column["seconds_per_miss_from_files"] == {
            "0.5 GB/s": 66404352 / 5e8, "2 GB/s": 66404352 / 2e9, "6 GB/s": 66404352 / 6e9,
        }  # fmt: skip
    assert [column["file_experts"] > 0 for column in columns] == [False, True]
    assert lines[-1][0].endswith(
        "a miss takes 5.5 ms at 12 GB/s, 2.7 ms at 25 GB/s; one that is read from files takes "
        "133 ms at 0.5 GB/s, 33 ms at 2 GB/s, 11 ms at 6 GB/s."
    )
    out = run(*words, "--vram", "8GiB", "--ram", "8GiB", "--link-gbps", 4, "--disk-gbps", 5)[1]
    assert out.endswith("a miss takes 17 ms at 4 GB/s; one that is read from files takes 17 ms at 5 GB/s.\n")
    out = run(*words, "--vram", "8GiB", "--ram", "8GiB", "--disk-gbps", 20)[1]
    assert out.endswith("2.7 ms at 25 GB/s; one that is read from files takes 5.5 ms at 20 GB/s.\n")


def test_one_size_of_a_memory_goes_with_all_of_the_other(run: Run) -> None:
    def planned(*more: object) -> list[tuple[str, int, int]]:
        plans = json.loads(run(*SHEET, *more, "--json")[1])["plans"]
        return [(p["size"], sum(p["slots_per_layer"]), p["berths"]) for p in plans]

    [(_, few, some)] = planned("--vram", "8GiB", "--ram", "10GiB")
    [(_, more, _)] = planned("--vram", "11GiB", "--ram", "10GiB")
    [(_, _, most)] = planned("--vram", "8GiB", "--ram", "12GiB")
    assert some < most < 256 and few < more
    assert planned("--vram", "8GiB,11GiB", "--ram", "10GiB") == [("8GiB", few, some), ("11GiB", more, some)]
    assert planned("--vram", "8GiB", "--ram", "10GiB,12GiB") == [
        ("8GiB + 10GiB", few, some),
        ("8GiB + 12GiB", few, most),
    ]
    assert [berths for _, _, berths in planned("--vram", "8GiB", "--berths", 99)] == [99]


def test_an_older_card_is_planned_as_such(run: Run) -> None:
    new, old = (json.loads(run(*SHEET, *more, "--json")[1]) for more in ((), ("--capability", "7.5")))
    assert (new["capability"], new["dtype"]) == ("8.0", "bfloat16")
    assert (old["capability"], old["dtype"]) == ("7.5", "float16")
    title = run(*SHEET, "--capability", "7.5")[1].splitlines()[0]
    assert title.endswith("in float16 on cuda of compute capability 7.5, context 4096 tokens")


def test_of_a_checkpoint_headers_say_what_it_is(run: Run) -> None:
    status, out, _ = run(DEMO, "--dtype", "float32", "--json")
    sheet = json.loads(out)
    assert status == 0 and sheet["model"] == str(DEMO) and sheet["attention"] == "16"
    assert sheet["plans"][0]["blob_bytes"] == 3 * 256 * 128 * 4 and sheet["plans"][0]["resident"]
    assert sheet["plans"][0]["left_over_bytes"] is None
    smaller = json.loads(run(DEMO, "--dtype", "float32", "--head", "8", "--json")[1])["plans"][0]
    head = aligned(matrix_fields("", (2048, 256), QuantSpec(8))[-1].end)
    assert sheet["plans"][0]["trunk_bytes"] - smaller["trunk_bytes"] == 2048 * 256 * 4 - head
    smaller = json.loads(run(DEMO, "--dtype", "float32", "--experts", "4", "--json")[1])
    assert smaller["plans"][0]["blob_bytes"] == 54272


def test_on_a_cpu_arena_and_slots_share_one_memory(run: Run) -> None:
    words = (DEMO, "--device", "cpu", "--dtype", "float32", "--offload", "always", "--json")
    planned = json.loads(run(*words, "--ram", "100MiB")[1])["plans"][0]
    assert planned["slots_per_layer"] == [4] * 8
    assert planned["device_bytes"] + planned["arena_bytes"] + planned["left_over_bytes"] == 100 << 20
    status, out, _ = run(*words, "--ram", "100MiB,1MiB,40")
    assert status == 0 and [p["error"] is None for p in json.loads(out)["plans"]] == [True, False, False]


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ((), 2, "MODEL"),
        (("--shape", "mixtral-8x7b", DEMO), 2, "not allowed with"),
        (("--shape", "gpt"), 2, "invalid choice"),
        ((*SHEET, "--experts", "5"), 2, "5 bits per weight are not supported"),
        ((DEMO, "--head", "4g1024"), 2, "lm_head: 256 inputs do not divide into groups of 1024; use 4g256"),
        ((DEMO, "--experts", "4g1024"), 2, "do not divide into groups of 1024"),
        ((*SHEET, "--vram", "8GiB,much"), 2, "vram: 'much' is not a size"),
        (
            (*SHEET, "--vram", "90%"),
            2,
            "error: vram: '90%': how much memory there is cannot be told; write the size in GiB",
        ),
        (
            (*SHEET, "--ram", "8GiB,9GiB", "--vram", "1GiB,2GiB,3GiB"),
            2,
            "ram is 8GiB,9GiB; give one size, or",
        ),
        ((*SHEET, "--vram", "8GiB,"), 2, "vram: '' is not a size"),
        ((*SHEET, "--capability", "8"), 2, "'8', and must be like 7.5"),
        ((*SHEET, "--berths", "1"), 2, "berths is 1"),
        (("--shape", "mixtral-8x7b", "--berths", "99"), 2, "berths is 99, and all 256 experts need one"),
        ((*SHEET, "--berths", "99", "--offload", "never"), 2, "berths is 99 and offload is 'never'"),
        ((*SHEET, "--device", "cpu", "--vram", "8GiB"), 2, "limit it with --ram"),
        ((*SHEET, "--context", "40000"), 2, "at most 32768"),
        ((*SHEET, "--context", "1"), 2, "context is 1"),
        ((*SHEET, "--slots", "9"), 2, "slots is 9"),
        ((*SHEET, "--lookahead", "3"), 2, "lookahead is 3"),
        (("/nowhere",), 1, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: tuple[object, ...], status: int, reason: str) -> None:
    got, out, err = run(*words)
    assert got == status and out == "" and reason in err and "Traceback" not in err
    assert err.splitlines()[-1].count("error: ") == 1


RANKS = ("--shape", "mixtral-8x7b", "--attention", 4, "--experts", "3g128", "--head", 8, "--ranks")


def test_ranks_have_a_column_each(run: Run) -> None:
    status, out, err = run(*RANKS, "12GiB,cpu:32GiB,cpu", "--ram", "20GiB")
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines()]
    assert (status, err) == (0, "")
    assert lines[0] == [f"mixtral-8x7b, {THREE}, on 3 ranks, context 4096 tokens"]
    assert lines[1] == ["", "rank 0: 12GiB", "rank 1: cpu:32GiB", "rank 2: cpu"]
    rows = {row[0]: row[1:] for row in lines[2:-4]}
    assert [words.split()[-1] for words in rows["computes in"]] == ["cuda", "cpu", "cpu"]
    assert re.fullmatch(r"layers \d+ to 31 and the head", rows["has"][0])
    assert rows["has"][1].startswith("embeddings and layers 0 to ")
    assert lines[-3:-1] == [
        ["rank 0 to 1: 8 B a token, 16.0 KiB a chunk of a prompt"],
        ["rank 1 to 2, 2 to 0: 8.0 KiB a token, 16.0 MiB a chunk of a prompt"],
    ]
    taken = "8.0 KiB and 16.0 MiB take 66 us and 134 ms at 1 Gbit/s, 6.6 us and 13 ms at 10 Gbit/s"
    assert lines[-1] == [f"{taken}, and the network's latency."]
    assert run(*RANKS, "12GiB,cpu:32GiB,cpu", "--ram", "20GiB", "--markdown")[0] == 0


def test_json_has_each_ranks_plan_and_what_crosses(run: Run) -> None:
    status, out, _ = run(*RANKS, "9GiB,16GiB", "--ram", "4GiB,8GiB", "--json")
    sheet = json.loads(out)
    first, second = sheet["ranks"]
    assert status == 0 and "device" not in sheet and sheet["experts"] == "3g128"
    assert (first["rank"], first["first_layer"], second["first_layer"]) == (0, second["layers"], 0)
    assert first["layers"] + second["layers"] == 32 and len(first["slots_per_layer"]) == first["layers"]
    assert [rank["budget_bytes"] for rank in sheet["ranks"]] == [9 << 30, 16 << 30]
    for rank, host in ((first, 4 << 30), (second, 8 << 30)):
        assert rank["device_bytes"] + rank["left_over_bytes"] == rank["budget_bytes"]
        assert rank["host_bytes"] <= host and rank["left_over_bytes"] >= 0
    assert [(hop["sender"], hop["receiver"], hop["token_bytes"]) for hop in sheet["hops"]] == [
        (0, 1, 8),
        (1, 0, 8192),
    ]
    assert sheet["hops"][1]["seconds_per_token"] == {"1 Gbit/s": 8192 * 8 / 1e9, "10 Gbit/s": 8192 * 8 / 1e10}
    assert sheet["hops"][1]["chunk_bytes"] == 8192 * first["chunk"]


def test_one_rank_plans_what_one_device_does(run: Run) -> None:
    alone = json.loads(run(*RANKS[:-1], "--vram", "12GiB", "--json")[1])["plans"][0]
    [rank] = json.loads(run(*RANKS, "12GiB", "--json")[1])["ranks"]
    del alone["size"]
    assert {name: rank[name] for name in alone} == alone


def test_layers_of_ranks_can_be_given(run: Run) -> None:
    status, out, _ = run(*RANKS, "12GiB,12GiB", "--rank-layers", "10,22", "--json")
    assert status == 0 and [rank["layers"] for rank in json.loads(out)["ranks"]] == [10, 22]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("x,8GiB",), "ranks: 'x' is not a size"),
        (("8GiB,",), "ranks: '' is not a size"),
        (("cpu:,8GiB",), "ranks: '' is not a size"),
        (("gpu:8GiB",), "ranks: 'gpu:8GiB' is not a size"),
        (("0,8GiB",), "ranks is '0', and must be at least 1 byte"),
        (("90%,8GiB",), "vram: '90%': how much memory there is cannot be told; write the size in GiB"),
        (("8GiB", "--vram", "8GiB"), "vram is 8GiB, and ranks is 8GiB; write all ranks in --ranks"),
        (("8GiB", "--device", "cpu"), "device is cpu, and ranks is 8GiB; write all ranks in --ranks"),
        (
            ("8GiB,8GiB", "--ram", "1GiB,2GiB,3GiB"),
            "ram is 1GiB,2GiB,3GiB; give one size, or one for each of 2 ranks",
        ),
        (
            ("9GiB,9GiB", "--rank-layers", "10,20"),
            "rank_layers is 10,20, 30 in all, and the model has 32 layers",
        ),
        (
            ("9GiB,9GiB", "--rank-layers", "32"),
            "rank_layers is 32, and there are 2 ranks; give as many numbers",
        ),
        (
            ("9GiB,9GiB", "--rank-layers", "0,32"),
            "rank_layers is '0,32', and must be whole numbers from 1 to 9999",
        ),
        (
            (",".join(["9GiB"] * 33),),
            "there are 33 ranks, and the model has 32 layers; start at most 32 ranks",
        ),
        (("3GiB,3GiB",), "the model has 32 layers, and there is room for "),
    ],
)
def test_ranks_that_make_no_sense(run: Run, words: tuple[str, ...], expected: str) -> None:
    status, out, err = run(*RANKS, *words)
    assert status == (1 if words == ("3GiB,3GiB",) else 2) and out == ""
    assert err.startswith(f"error: {expected}") and err.count("\n") == 1


def test_layers_of_ranks_without_ranks_are_refused(run: Run) -> None:
    status, _, err = run(*RANKS[:-1], "--rank-layers", "10,22")
    assert status == 2 and err == "error: rank_layers is 10,22, and there are no ranks; add --ranks\n"
