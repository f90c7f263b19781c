"""docs/ranks.md: its commands are run, its plans are what they print, and its arithmetic is done again."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

from model.config import ModelConfig
from model.quant.formats import Formats
from model.quant.spec import QuantSpec
from model.shapes import SHAPES
from model.target import Target
from runtime.planning.costs import Costs
from runtime.ranks.frames import frame_bytes
from runtime.ranks.orders import Order
from tests.test_docs import FENCE, ROOT, free_port, programs
from tools import plan

PAGE = (ROOT / "docs" / "ranks.md").read_text("utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
PLANNED = ["Two GPUs in a box", "Two machines in a house", "A small cluster"]


def blocks(section: str, kind: str) -> list[str]:
    return [text for found, text in FENCE.findall(SECTIONS[section]) if found == kind]


def commands(section: str, program: str) -> list[list[str]]:
    lines = [line for block in blocks(section, "sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith(program)]


def rows(section: str, *heading: str) -> list[list[str]]:
    """The cells of the table with this heading."""
    pattern = r"^\| *" + r" *\| *".join(map(re.escape, heading)) + r" *\|\n\|[-|:]+\|\n((?:\|.*\n)+)"
    found = re.search(pattern, SECTIONS[section], re.MULTILINE)
    assert found, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


@pytest.mark.parametrize("section", PLANNED)
def test_plans_are_what_the_command_prints(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    [command, *others] = commands(section, "python -m tools.plan")
    [shown] = [block for block in blocks(section, "") if "rank 0:" in block]
    assert plan.main(command[3:]) == 0
    printed = capsys.readouterr().out.splitlines()
    places = [printed.index(line) for line in shown.splitlines()]
    assert places == sorted(places) and len(places) >= 5
    for other in others:
        assert plan.main(other[3:]) == 0
        assert "6 in " in capsys.readouterr().out


def planned(section: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], Costs, ModelConfig]:
    """The plan of a section's first command, and what its layers take on a card."""
    words = commands(section, "python -m tools.plan")[0]
    assert plan.main([*words[3:], "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    formats = Formats(*(QuantSpec.parse(made[kind]) for kind in ("attention", "experts", "head")))
    config = SHAPES[made["model"]]
    return made, Costs.of(config, formats, torch.bfloat16, Target.hypothetical()), config


@pytest.mark.parametrize("section", PLANNED)
def test_what_to_expect_is_arithmetic(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    made, costs, config = planned(section, capsys)
    layer = config.experts_per_token * costs.blob_bytes + costs.attention_bytes
    table, total, ranks = rows(section, "rank", "a token reads", "at", "takes"), 0.0, made["ranks"]
    assert len(table) == len(ranks) + 2 and "by arithmetic and not measured" in SECTIONS[section]
    for name, reads, rate, takes in table[:-2]:
        words = re.fullmatch(r"rank (\d): (\d+) layers(, head)?", name)
        assert words and int(words[2]) == ranks[int(words[1])]["layers"]
        assert (words[3] is not None) == (words[1] == "0")
        size = int(words[2]) * layer + (costs.head_bytes if words[3] else 0)
        ms = size / float(rate.split()[0]) / 1e6
        assert (reads, takes) == (f"{size / 1e9:.2f} GB", f"{ms:.1f} ms")
        total += ms
    hops, said = (
        table[-2],
        re.search(r"([\d.]+) ms for a hop|a hop in a box is taken as ([\d.]+) ms", SECTIONS[section]),
    )
    assert hops[0] == f"{len(ranks)} hops" and said
    each, gbit = (
        float(said[1] or said[2]),
        {"Two GPUs in a box": 1000, "Two machines in a house": 1}.get(section, 10),
    )
    sizes = [frame(1, config)] * (len(ranks) - 1) + [frame(1, None)]
    network = sum(each + size * 8 / gbit / 1e6 for size in sizes)
    assert hops[3] == f"{network:.1f} ms"
    total += network
    assert table[-1][3] == f"{total:.1f} ms: {1000 / total:.0f} tokens/s at most"
    [in_latency] = [row for row in latencies() if row[1] == f"{total - network:.1f} ms"]
    tenth = (total - network) / 10
    assert in_latency[2:] == [f"{tenth:.1f} ms", f"{tenth / len(ranks):.1f} ms each"]


def latencies() -> list[list[str]]:
    heading = "computing a token", "one hop costs 10 % at", "all hops together cost 10 % at"
    return rows("The network", "", *heading)


def frame(texts: int, config: ModelConfig | None) -> int:
    """The bytes of a message with a token's hidden state, or with an id."""
    order = Order.length(texts)
    return (
        frame_bytes(1, config.hidden, torch.bfloat16, order)
        if config
        else frame_bytes(1, 1, torch.int64, order)
    )


def test_what_crosses(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = [SHAPES[name] for name in ("mixtral-8x7b", "mixtral-8x22b")]
    table = [
        row[1:] for row in rows("The network", "for each token, decoded or of a prompt", "8x7B", "8x22B")
    ]
    assert table[0] == ["8 B", "8 B"]
    assert table[1] == [f"{config.hidden * 2:,} B" for config in shapes]
    order = frame(1, None) - 8
    assert (
        150 <= order <= 250
        and "It has some 200 bytes, and 16 for\neach text beyond" in SECTIONS["The network"]
    )
    assert frame(5, None) - frame(4, None) == 16
    assert table[2] == [f"{frame(1, config) / 1024:.1f} KiB" for config in shapes]
    assert table[3] == [f"{2048 * config.hidden * 2 / 2**20:.1f} MiB" for config in shapes]
    assert table[4] == [f"{1e9 / (config.hidden * 16):,.0f} a second" for config in shapes]
    for section in PLANNED:
        made, _, config = planned(section, capsys)
        assert [hop["token_bytes"] for hop in made["hops"]] == [8] + [config.hidden * 2] * (
            len(made["ranks"]) - 1
        )
        assert {rank["chunk"] for rank in made["ranks"]} == {2048}


@pytest.mark.parametrize("section", PLANNED)
def test_torchrun_takes_its_flags(section: str) -> None:
    for words in commands(section, "torchrun"):
        args = get_args_parser().parse_args(
            [word.replace("N", "3") if word == "N" else word for word in words[1:]]
        )
        assert args.module and args.training_script in ("runtime.generate", "runtime.serve")
        assert "--distributed" in args.training_script_args


@pytest.mark.slow
def test_the_commands_for_two_machines_run_on_one() -> None:
    """Each as the page has it, but with the demo, on CPUs, over the loopback interface."""
    port, own = (
        str(free_port()),
        {"192.168.1.10": "127.0.0.1", "mixtral-4-3g128": str(ROOT / "runtime" / "demo")},
    )
    started = []
    for words in commands("Two machines in a house", "torchrun"):
        words = [own.get(word, word).replace("29500", port) for word in words]
        words = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *words[1:],
            "--device",
            "cpu",
            "--max-new-tokens",
            "5",
        ]
        started.append(
            subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    (text, said), (nothing, _) = (process.communicate(timeout=120) for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    assert text.strip() and not nothing
    assert re.search(
        r"^rank 1 on \S+: embeddings and layers 0 to 3, in float32 on cpu", said, re.MULTILINE
    ), said


@pytest.mark.slow
def test_the_program_runs_on_two_ranks(tmp_path: Path) -> None:
    [code] = [code for code in programs() if "distributed=True" in code]
    (tmp_path / "program.py").write_text(code)
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(tmp_path / "program.py"),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
