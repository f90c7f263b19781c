"""Options: defaults, refusals that name field and value, and the same fields as flags."""

import argparse
import dataclasses
import math
import re
import shlex
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime import EngineOptions, OptionError, SamplingParams
from runtime.shell.arguments import GROUPS, add_flags, flag, from_flags


def test_defaults() -> None:
    assert dataclasses.asdict(EngineOptions()) == {
        "device": None,
        "dtype": None,
        "vram": None,
        "ram": None,
        "map": True,
        "context": None,
        "kv": 16,
        "offload": "auto",
        "slots": None,
        "berths": None,
        "policy": "lru",
        "lookahead": 1,
        "prefetch": 1,
        "chat_template": None,
        "threads": None,
        "graphs": True,
        "misses": "copy",
        "link_gbps": None,
        "disk_gbps": None,
        "cpu_gbps": None,
        "parallel": 1,
        "distributed": False,
        "rank_layers": None,
        "rank_timeout": 10.0,
    }
    assert dataclasses.asdict(SamplingParams()) == {
        "max_new_tokens": 256,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "seed": None,
        "stop": (),
        "ignore_eos": False,
        "top_logprobs": 0,
        "json_schema": None,
        "grammar": None,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int8"),
        ("dtype", ""),
        ("vram", "much"),
        ("vram", "0"),
        ("vram", "0%"),
        ("vram", "150%"),
        ("ram", "-1GiB"),
        ("ram", ""),
        ("context", 1),
        ("context", 0),
        ("context", -5),
        ("kv", 4),
        ("kv", 12),
        ("kv", 8.0),
        ("kv", "8"),
        ("kv", None),
        ("offload", "sometimes"),
        ("offload", True),
        ("slots", 0),
        ("slots", 2.0),
        ("slots", True),
        ("berths", 1),
        ("berths", -2),
        ("berths", True),
        ("misses", "drop"),
        ("misses", None),
        ("policy", "fifo"),
        ("policy", None),
        ("lookahead", 3),
        ("lookahead", -1),
        ("lookahead", None),
        ("prefetch", -1),
        ("prefetch", 65),
        ("prefetch", "1"),
        ("link_gbps", 0),
        ("link_gbps", -1.0),
        ("link_gbps", math.inf),
        ("link_gbps", math.nan),
        ("link_gbps", "fast"),
        ("disk_gbps", 0),
        ("cpu_gbps", math.nan),
        ("distributed", "yes"),
        ("distributed", None),
        ("rank_timeout", 0),
        ("rank_timeout", -1.0),
        ("rank_timeout", 86401),
        ("rank_timeout", math.inf),
        ("rank_timeout", None),
        *(
            ("rank_layers", it)
            for it in ("", "0,3", "3,", ",", "3,-1", "2.5", "3;4", "many", "12345", 3, [3, 4])
        ),
    ],
)
def test_engine_options_refuse(field: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        EngineOptions(**{field: value})
    assert field in str(caught.value) and repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("seed", -1),
        ("seed", 1 << 63),
        ("stop", ("a", "")),
    ],
)
def test_sampling_params_refuse(field: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value).startswith(f"{field} is {value!r}, and must be ")


NUMERIC = [
    *((EngineOptions, name) for name in ("context", "slots", "berths", "lookahead", "prefetch")),
    *((EngineOptions, name) for name in ("link_gbps", "disk_gbps", "cpu_gbps")),
    *((EngineOptions, name) for name in ("vram", "ram", "graphs", "kv")),
    *((EngineOptions, name) for name in ("distributed", "rank_layers", "rank_timeout")),
    *((SamplingParams, name) for name in ("max_new_tokens", "top_k", "seed", "temperature", "top_p")),
    *((SamplingParams, name) for name in ("min_p", "repetition_penalty", "ignore_eos", "logit_bias", "stop")),
]
HOSTILE: list[Any] = [
    10**400, 10**5000, -(10**5000), math.nan, -math.inf, 1j, [3], object(), b"1", np.float32("nan"),
    np.array([1, 2]), torch.tensor([1.0, 2.0]), {1: True}, {1: 10**400}, {10**400: 1.0},
]  # fmt: skip


@pytest.mark.parametrize(("options", "field"), NUMERIC, ids=[field for _, field in NUMERIC])
def test_no_value_passes_that_fails_later(options: type, field: str) -> None:
    """A field refuses hostile values at once, in one short line."""
    texts, truths = (
        ["\x1b[2J", {"a": 1}] * (field != "stop"),
        [True] * (field not in ("graphs", "ignore_eos", "distributed")),
    )
    for value in HOSTILE + texts + truths:
        with pytest.raises(OptionError) as caught:
            options(**{field: value})
        message = str(caught.value)
        assert field in message and message.isprintable() and len(message) < 250


def test_a_tensor_without_dimensions_is_no_text_to_stop_at() -> None:
    with pytest.raises(OptionError, match=r"stop is tensor\(3\), and must be a text or several"):
        SamplingParams(stop=torch.tensor(3))  # type: ignore[arg-type]


def test_scalars_of_numpy_and_torch_are_numbers() -> None:
    params = SamplingParams(
        max_new_tokens=np.int64(5), top_k=torch.tensor(3), seed=np.uint8(7), temperature=np.float32(0.5),
        top_p=1, ignore_eos=np.bool_(True), logit_bias={np.int32(3): np.float64(1.5)}, min_p=Fraction(1, 4),
    )  # type: ignore[arg-type]  # fmt: skip
    assert params == SamplingParams(5, 0.5, 3, 1.0, 0.25, 1.0, {3: 1.5}, 7, (), True)
    kinds = [type(value) for value in dataclasses.asdict(params).values() if value is not None]
    assert kinds == [int, float, int, float, float, float, dict, int, tuple, bool, float, float, int]
    options = EngineOptions(context=np.int64(512), vram=np.int64(4096), link_gbps=1)  # type: ignore[arg-type]
    assert options == EngineOptions(context=512, vram="4096", link_gbps=1.0)


def test_layers_of_ranks_are_for_several_ranks() -> None:
    assert EngineOptions(distributed=True, rank_layers=" 10 ,22").rank_layers == "10,22"
    with pytest.raises(
        OptionError, match="rank_layers is 10,22, and there is one rank; add --distributed, or"
    ):
        EngineOptions(rank_layers="10,22")


@pytest.mark.parametrize("bias", [{-1: 0.0}, {3: math.inf}, {3: math.nan}])
def test_logit_bias_refuses(bias: dict[int, float]) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingParams(logit_bias=bias)
    ((token, value),) = bias.items()
    assert "logit_bias" in str(caught.value) and f"{token}={value}" in str(caught.value)


def test_the_borders_of_what_is_allowed() -> None:
    SamplingParams(
        max_new_tokens=1, temperature=0, top_p=1e-9, min_p=1, seed=(1 << 63) - 1, logit_bias={0: -math.inf}
    )
    EngineOptions(context=2, ram="100%", vram="1B")
    EngineOptions(slots=1, berths=2, lookahead=0, prefetch=0, link_gbps=1e-9, disk_gbps=1e-9, cpu_gbps=1e-9)
    EngineOptions(offload="never", lookahead=2, prefetch=64, link_gbps=3)


def test_options_are_frozen_and_own_what_they_were_given() -> None:
    bias, stop = {1: 2.0}, ["x"]
    params = SamplingParams(logit_bias=bias, stop=stop)  # type: ignore[arg-type]
    bias[1], stop[0] = 9.0, "y"
    assert (params.logit_bias, params.stop) == ({1: 2.0}, ("x",))
    assert SamplingParams(stop="one text").stop == ("one text",)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def parse(options: type, words: list[str]) -> Any:
    parser = argparse.ArgumentParser()
    add_flags(parser, options)
    return from_flags(options, parser.parse_args(words))


@pytest.mark.parametrize("options", [EngineOptions, SamplingParams])
def test_no_flags_give_the_defaults(options: type) -> None:
    assert parse(options, []) == options()


def test_each_field_is_a_flag_under_a_title_for_people() -> None:
    names = [name for names in GROUPS.values() for name in names]
    fields = [*dataclasses.fields(EngineOptions), *dataclasses.fields(SamplingParams)]
    assert sorted(names) == sorted(field.name for field in fields if field.metadata)
    parser = argparse.ArgumentParser()
    add_flags(parser, SamplingParams, EngineOptions)
    shown = re.findall(r"^(\S.*):$", parser.format_help(), re.MULTILINE)
    assert [title for title in shown if title != "options"] == list(GROUPS)


def test_each_field_can_be_given_as_a_flag() -> None:
    assert parse(
        EngineOptions, shlex.split("--device cuda:1 --dtype float16 --vram 90% --ram 20GiB --context 512")
    ) == EngineOptions(device="cuda:1", dtype="float16", vram="90%", ram="20GiB", context=512)
    assert parse(
        EngineOptions,
        shlex.split("--offload always --slots 3 --policy lfu --lookahead 2 --prefetch 4 --link-gbps 1.5"),
    ) == EngineOptions(offload="always", slots=3, policy="lfu", lookahead=2, prefetch=4, link_gbps=1.5)
    assert parse(
        EngineOptions, shlex.split("--berths 9 --misses auto --disk-gbps 2 --cpu-gbps 30")
    ) == EngineOptions(berths=9, misses="auto", disk_gbps=2.0, cpu_gbps=30.0)
    assert parse(
        EngineOptions, shlex.split("--distributed --rank-layers 10,22 --rank-timeout 2.5")
    ) == EngineOptions(distributed=True, rank_layers="10,22", rank_timeout=2.5)
    assert parse(
        SamplingParams,
        shlex.split(
            "--max-new-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 "
            "--logit-bias 3=-inf 4=1.5 --logit-bias 5=-2 --seed 7 --stop END '\n' --stop x --ignore-eos"
        ),
    ) == SamplingParams(
        max_new_tokens=5,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        logit_bias={3: -math.inf, 4: 1.5, 5: -2.0},
        seed=7,
        stop=("END", "\n", "x"),
        ignore_eos=True,
    )


@given(
    st.builds(
        SamplingParams,
        max_new_tokens=st.integers(1, 9999),
        temperature=st.floats(0, 5),
        top_k=st.integers(0, 99),
        top_p=st.floats(0, 1, exclude_min=True),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.1, 5),
        presence_penalty=st.floats(-9, 9),
        frequency_penalty=st.floats(-9, 9),
        logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
        seed=st.none() | st.integers(0, (1 << 63) - 1),
        stop=st.lists(st.text(min_size=1), max_size=3),
        ignore_eos=st.booleans(),
    )
)
def test_params_survive_being_written_as_flags(params: SamplingParams) -> None:
    words: list[str] = []
    for name, value in dataclasses.asdict(params).items():
        if name == "top_logprobs":  # for programs
            assert value == 0
        elif name == "logit_bias":
            words += [f"--logit-bias={token}={bias!r}" for token, bias in value.items()]
        elif name == "stop":
            words += [f"--stop={text}" for text in value]
        elif value is True:
            words.append(flag(name))
        elif value is not None and value is not False:
            words.append(f"{flag(name)}={value!r}")
    assert parse(SamplingParams, words) == params


@pytest.mark.parametrize(
    "words",
    [
        "--top-k x",
        "--seed 1.5",
        "--temperature",
        "--logit-bias 5",
        "--logit-bias x=1",
        "--dtype int8",
        "--stop",
    ],
)
def test_malformed_flags_are_usage_errors_that_name_the_flag(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(EngineOptions if "dtype" in words else SamplingParams, words.split())
    assert caught.value.code == 2
    assert f"argument {words.split()[0]}" in capsys.readouterr().err
