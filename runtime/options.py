"""Options of an engine and of a request. Every field is also a flag of the command line."""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from model.errors import quoted
from model.kv_cache import BITS
from runtime.checks import json_object, number, one_of, plain, require, truth, whole
from runtime.errors import OptionError
from runtime.experts.policy import POLICIES, PolicyMaker
from runtime.experts.tiers import SPARE_BERTHS
from runtime.units import parse_bytes

DTYPES = ("float32", "bfloat16", "float16")
OFFLOAD = ("auto", "never", "always")
MISSES = ("copy", "compute", "auto")
RATES = ("link_gbps", "disk_gbps", "cpu_gbps")
LONGEST_SILENCE = 86400  # seconds that a rank may be waited for


def option(default: Any, help: str, parse: Callable[[str], Any] = str, **argparse_words: Any) -> Any:
    """A dataclass field with what its command-line flag needs. With `contents=True`, the flag names a file,
    and the field is its text."""
    return dataclasses.field(default=default, metadata={"help": help, "type": parse} | argparse_words)


def parse_bias(text: str) -> tuple[int, float]:
    """A token id and the number to add to its logit, as the command line writes them.

    >>> parse_bias("13=-inf")
    (13, -inf)
    """
    token, _, bias = text.partition("=")
    return int(token), float(bias)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a model is held in memory and computed. None is a default that depends on machine and model.

    Raises `OptionError` if a value makes no sense. `Engine.load` raises if this machine or the model cannot
    do what a value asks for.
    """

    device: str | None = option(None, "cpu, cuda or cuda:N (default: cuda if there is one)", metavar="NAME")
    dtype: str | None = option(None, "what to compute in (default: by device)", choices=DTYPES)
    vram: str | None = option(
        None,
        "most device memory to use, as 11GiB or 90%% of what is free (default: all of it)",
        metavar="SIZE",
    )
    ram: str | None = option(
        None,
        "most host memory to use, as 20GiB or 90%% of what is free (default: all of it)",
        metavar="SIZE",
    )
    map: bool = option(
        True, "on a CPU, use a quantized model's files as memory (default), or read them into memory",
        action=argparse.BooleanOptionalAction,
    )  # fmt: skip
    context: int | None = option(
        None, "most tokens of a text (default: 4096, or the model's limit if smaller)", int, metavar="N"
    )
    kv: int = option(
        16,
        "bits of keys and values: 8 takes half the memory, 16 keeps what is computed",
        int,
        choices=BITS,
    )
    chat_template: str | None = option(
        None, "file with the template that writes conversations (default: the checkpoint's)", metavar="FILE"
    )
    threads: int | None = option(
        None,
        "threads to compute with on a CPU (default: PyTorch's choice, at most the processors it may use)",
        int,
        metavar="N",
    )

    offload: str = option(
        "auto", "keep experts in host memory: auto does so if they do not all fit the device",
        choices=OFFLOAD,
    )  # fmt: skip
    slots: int | None = option(
        None, "experts of each layer on the device (default: as many as fit)", int, metavar="N"
    )
    berths: int | None = option(
        None, "experts in host memory, of all layers together (default: as many as fit)", int, metavar="N"
    )
    policy: str | PolicyMaker = option(  # noqa: RUF009
        "lru", "which expert to evict when another needs its slot", choices=tuple(POLICIES)
    )
    lookahead: int = option(1, "how many layers ahead to guess experts: 0, 1 or 2", int, metavar="N")
    prefetch: int = option(1, "experts to prefetch for each of these layers", int, metavar="N")
    graphs: bool = option(
        True, "on a GPU, run a token's step as CUDA graphs (default), or launch by launch",
        action=argparse.BooleanOptionalAction,
    )  # fmt: skip
    misses: str = option(
        "copy", "copy missing experts to the device, or compute them on the CPU, or what is faster (auto)",
        choices=MISSES,
    )  # fmt: skip
    link_gbps: float | None = option(
        None, "GB/s at which experts are copied: on a CPU at most, on a GPU instead of measuring it",
        float, metavar="G",
    )  # fmt: skip
    disk_gbps: float | None = option(
        None, "GB/s at which experts are read from files: on a CPU at most, on a GPU instead of measuring it",
        float, metavar="G",
    )  # fmt: skip
    cpu_gbps: float | None = option(
        None, "GB/s of packed experts that the CPU computes, to repeat a run of --misses auto exactly",
        float, metavar="G",
    )  # fmt: skip
    parallel: int = option(
        1, "texts to keep and to compute at once, each of up to --context tokens", int, metavar="N"
    )

    distributed: bool = option(
        False, "compute as one of the ranks that torchrun starts, each with layers of its own",
        action="store_true",
    )  # fmt: skip
    rank_layers: str | None = option(
        None, "layers of each rank, as 10,22 (default: by each rank's memory)", metavar="N,N..."
    )
    rank_timeout: float = option(
        10.0, "end if another rank has not answered for so many seconds", float, metavar="S"
    )

    def __post_init__(self) -> None:
        if self.device is not None:
            settle(self, "device", str(self.device))  # it may be a torch.device
        if self.chat_template is not None:
            file = isinstance(self.chat_template, (str, os.PathLike))
            require(file, "chat_template", self.chat_template, "the path of a file")
            settle(self, "chat_template", os.fsdecode(self.chat_template))
        if self.dtype is not None:
            one_of("dtype", self.dtype, DTYPES)
        for name in ("vram", "ram"):
            if getattr(self, name) is not None:
                settle(self, name, check_size(name, getattr(self, name)))
        if self.context is not None:
            expected = "a whole number of tokens, at least 2"
            settle(self, "context", whole("context", self.context, 2, expected=expected))
        settle(self, "kv", whole("kv", self.kv, *BITS, expected="8 or 16"))
        require(self.kv in BITS, "kv", self.kv, "8 or 16")
        one_of("offload", self.offload, OFFLOAD)
        one_of("misses", self.misses, MISSES)
        if not callable(self.policy):
            one_of("policy", self.policy, POLICIES)
        numbers = {"slots": (1, 1 << 20), "berths": (SPARE_BERTHS, 1 << 20), "threads": (1, 1 << 12)}
        numbers = {name: limits for name, limits in numbers.items() if getattr(self, name) is not None}
        numbers |= {"lookahead": (0, 2), "prefetch": (0, 64), "parallel": (1, 256)}
        for name, (least, most) in numbers.items():
            settle(self, name, whole(name, getattr(self, name), least, most))
        for name in ("map", "graphs"):
            settle(self, name, truth(name, getattr(self, name)))
        for name in (name for name in RATES if getattr(self, name) is not None):
            rate = number(name, getattr(self, name), lambda g: 0 < g < math.inf, "a number above 0")
            settle(self, name, rate)
        settle(self, "distributed", truth("distributed", self.distributed))
        if self.rank_layers is not None:
            settle(self, "rank_layers", check_layers(self.rank_layers, self.distributed))
        expected = f"a number of seconds above 0, and at most {LONGEST_SILENCE}"
        silence = number("rank_timeout", self.rank_timeout, lambda s: 0 < s <= LONGEST_SILENCE, expected)
        settle(self, "rank_timeout", silence)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled from the logits, and when the text ends.

    Options apply in this order: repetition penalty, presence and frequency penalties, logit bias,
    temperature, top-k, top-p, min-p. Raises `OptionError` if a value makes no sense.
    """

    max_new_tokens: int = option(256, "stop after this many tokens", int, metavar="N")
    temperature: float = option(0.7, "0 takes the likeliest token; higher is more varied", float, metavar="T")
    top_k: int = option(0, "consider only the K likeliest tokens; 0 considers all", int, metavar="K")
    top_p: float = option(
        0.95, "consider only the likeliest tokens that together reach probability P", float, metavar="P"
    )
    min_p: float = option(
        0.0, "consider only tokens at least P times as likely as the likeliest", float, metavar="P"
    )
    repetition_penalty: float = option(
        1.0, "above 1 makes tokens that already occurred less likely", float, metavar="R"
    )
    logit_bias: Mapping[int, float] = option(
        (), "add BIAS to the logit of token ID", parse_bias, nargs="+", metavar="ID=BIAS"
    )
    seed: int | None = option(
        None, "the same seed gives the same text (default: a new one each time)", int, metavar="S"
    )
    stop: tuple[str, ...] = option((), "end before any of these texts", nargs="+", metavar="TEXT")
    ignore_eos: bool = option(False, "go on past the model's end-of-sequence token", action="store_true")
    presence_penalty: float = option(
        0.0, "take P from the logit of each token that was sampled before", float, metavar="P"
    )
    frequency_penalty: float = option(
        0.0, "take P from the logit of a token for each time that it was sampled before", float, metavar="P"
    )
    top_logprobs: int = 0  # likeliest tokens that every `Token` lists; no flag, since the shell shows none
    json_schema: str | Mapping[str, Any] | None = option(
        None, "write JSON that fits the JSON schema in FILE", metavar="FILE", contents=True
    )
    grammar: str | None = option(
        None, "write a text of the grammar in FILE, which is in llguidance's dialect of Lark",
        metavar="FILE", contents=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self, "stop", check_stop(self.stop))
        settle(self, "logit_bias", check_bias(self.logit_bias))
        for name, least, expected in WHOLE:
            if name != "seed" or self.seed is not None:
                settle(self, name, whole(name, getattr(self, name), least, expected=expected))
        for name, holds, expected in NUMBERS:
            settle(self, name, number(name, getattr(self, name), holds, expected))
        settle(self, "ignore_eos", truth("ignore_eos", self.ignore_eos))
        if self.json_schema is not None:
            settle(self, "json_schema", json_object("json_schema", self.json_schema))
        if self.grammar is not None:
            named = isinstance(self.grammar, str) and bool(self.grammar.strip())
            require(named, "grammar", self.grammar, "the text of a grammar")
        given = [n for n in ("json_schema", "grammar", "ignore_eos") if getattr(self, n) not in (None, False)]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} contradict each other; give one of them")


WHOLE = (
    ("max_new_tokens", 1, "a whole number, at least 1"),
    ("top_k", 0, "a whole number, 0 (all) or more"),
    ("seed", 0, "a whole number from 0 to 2**63 - 1"),
    ("top_logprobs", 0, "a whole number, 0 or more"),
)
NUMBERS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda t: 0 <= t < math.inf, "a number, 0 or more"),
    ("top_p", lambda p: 0 < p <= 1, "a number above 0 and at most 1"),
    ("min_p", lambda p: 0 <= p <= 1, "a number from 0 to 1"),
    ("repetition_penalty", lambda r: 0 < r < math.inf, "a number above 0"),
    ("presence_penalty", math.isfinite, "a finite number"),
    ("frequency_penalty", math.isfinite, "a finite number"),
)


def settle(options: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass to its checked value."""
    object.__setattr__(options, name, value)


def check_size(name: str, size: object) -> str:
    """A size as users write it. A plain number is bytes."""
    expected = "at least 1 byte; leave it out to use what is free"
    size = plain(size)
    text = str(whole(name, size, 1, expected=expected)) if isinstance(size, int) else str(size)
    try:
        enough = parse_bytes(text, whole=1 << 60) >= 1
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None
    require(enough, name, text, expected)
    return text


def check_layers(layers: object, distributed: bool) -> str:
    """Numbers of layers with commas between them, without spaces.

    >>> check_layers("10, 22", distributed=True)
    '10,22'
    """
    text = layers.replace(" ", "") if isinstance(layers, str) else ""
    right = len(text) <= 4096 and re.fullmatch(r"[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", text) is not None
    expected = "whole numbers from 1 to 9999 with commas between them, one for each rank, as 10,22"
    require(right, "rank_layers", layers, expected)
    if not distributed:
        raise OptionError(f"rank_layers is {text}, and there is one rank; add --distributed, or leave it out")
    return text


def check_stop(stop: object) -> tuple[str, ...]:
    """One text or several as a tuple."""
    try:
        texts: tuple[str, ...] = (stop,) if isinstance(stop, str) else tuple(stop)  # type: ignore[arg-type]
    except TypeError:  # a number, or a tensor of no dimensions
        raise OptionError(f"stop is {quoted(stop)}, and must be a text or several") from None
    require(all(isinstance(text, str) and text for text in texts), "stop", texts, "texts that are not empty")
    return texts


def check_bias(bias: Any) -> dict[int, float]:
    """Numbers to add to logits, by token id, from a mapping or from pairs."""
    try:
        pairs = dict(bias).items()
    except (TypeError, ValueError):
        raise OptionError(f"logit_bias is {quoted(bias)}, and must map token ids to numbers") from None
    checked = {}
    for token, value in pairs:
        try:
            checked[whole("", token, 0)] = number("", value, lambda b: b < math.inf, "")
        except OptionError:
            raise OptionError(
                f"logit_bias is {quoted(token)}={quoted(value)}, and must be a token id and a number "
                "(-inf forbids the token)"
            ) from None
    return checked
