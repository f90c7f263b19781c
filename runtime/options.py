"""What can be asked of an engine and of a request. Every field is also a flag of the command line."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import OptionError
from runtime.experts.policy import POLICIES
from runtime.units import parse_bytes

DTYPES = ("float32", "bfloat16", "float16")
OFFLOAD = ("auto", "never", "always")


def option(default: Any, help: str, parse: Callable[[str], Any] = str, **argparse_words: Any) -> Any:
    """A dataclass field that knows how to be a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "type": parse} | argparse_words)


def parse_bias(text: str) -> tuple[int, float]:
    """A token id and what to add to its logit, as the command line writes them.

    >>> parse_bias("13=-inf")
    (13, -inf)
    """
    token, _, bias = text.partition("=")
    return int(token), float(bias)


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a model is held in memory and computed. `None` leaves the choice to the machine.

    Raises `OptionError` when a value makes no sense; whether this machine can honour it shows at
    `Engine.load`.
    """

    device: str | None = option(None, "cpu, cuda or cuda:N (default: cuda if there is one)", metavar="NAME")
    dtype: str | None = option(None, "what to compute in (default: by device)", choices=DTYPES)
    vram: str | None = option(
        None,
        "device memory to use at most, like 11GiB, or 90%% of what is free (default: all of it)",
        metavar="SIZE",
    )
    ram: str | None = option(
        None,
        "host memory to use at most, like 20GiB, or 90%% of what is free (default: all of it)",
        metavar="SIZE",
    )
    context: int | None = option(
        None, "tokens of KV cache (default: 4096, or the model's limit if smaller)", int, metavar="N"
    )

    offload: str = option(
        "auto", "keep experts in host memory: if they do not all fit the device, never, or always (a study)",
        choices=OFFLOAD,
    )  # fmt: skip
    slots: int | None = option(
        None, "experts of each layer on the device (default: as many as fit)", int, metavar="N"
    )
    policy: str = option("lru", "which expert leaves when another needs its slot", choices=tuple(POLICIES))
    lookahead: int = option(1, "layers to look ahead for experts to copy early: 0, 1 or 2", int, metavar="N")
    prefetch: int = option(1, "experts to copy early for each of these layers", int, metavar="N")
    graphs: bool = option(
        True, "put a token's step on a GPU as CUDA graphs, rather than launch by launch",
        action=argparse.BooleanOptionalAction,
    )  # fmt: skip
    link_gbps: float | None = option(
        None, "GB/s to copy experts at, at most: to study a slower link (CPU only)", float, metavar="G"
    )

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}, and must be one of {', '.join(DTYPES)}")
        if self.device is not None:
            object.__setattr__(self, "device", str(self.device))  # a torch.device will do
        for name in ("vram", "ram"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, size := str(size))  # a plain number is bytes
                try:
                    enough = parse_bytes(size, whole=1 << 60) >= 1
                except OptionError as error:
                    raise OptionError(f"{name}: {error}") from None
                require(enough, name, size, "at least 1 byte; leave it out to use what is free")
        enough = self.context is None or (isinstance(self.context, int) and self.context >= 2)
        require(enough, "context", self.context, "a whole number of tokens, at least 2")
        for name, choices in (("offload", OFFLOAD), ("policy", tuple(POLICIES))):
            value = getattr(self, name)
            require(value in choices, name, value, f"one of {', '.join(choices)}")
        for name, least, most in (("slots", 1, 1 << 20), ("lookahead", 0, 2), ("prefetch", 0, 64)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            require(whole or (name == "slots" and value is None), name, value, f"from {least} to {most}")
        require(isinstance(self.graphs, bool), "graphs", self.graphs, "True or False")
        number = isinstance(self.link_gbps, (int, float)) and 0 < self.link_gbps < math.inf
        require(number or self.link_gbps is None, "link_gbps", self.link_gbps, "a number above 0")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from the logits, and when to stop.

    The filters apply in this order: repetition penalty, logit bias, temperature, top-k, top-p, min-p.
    Raises `OptionError` when a value makes no sense.
    """

    max_new_tokens: int = option(256, "stop after this many tokens", int, metavar="N")
    temperature: float = option(0.7, "0 takes the likeliest token; higher is more varied", float, metavar="T")
    top_k: int = option(0, "consider only the K likeliest tokens; 0 is all", int, metavar="K")
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
        (), "add BIAS to a token's logit", parse_bias, nargs="+", metavar="ID=BIAS"
    )
    seed: int | None = option(
        None, "the same seed gives the same text (default: a new one each time)", int, metavar="S"
    )
    stop: tuple[str, ...] = option((), "end before any of these texts", nargs="+", metavar="TEXT")
    ignore_eos: bool = option(False, "go on past the model's end-of-sequence token", action="store_true")

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            require(
                isinstance(value, int) or (name == "seed" and value is None), name, value, "a whole number"
            )
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            require(isinstance(getattr(self, name), (int, float)), name, getattr(self, name), "a number")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        require(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0"
        )
        require(all(isinstance(text, str) and text for text in self.stop), "stop", self.stop,
                "texts that are not empty")  # fmt: skip
        for token, bias in self.logit_bias.items():
            numbers = isinstance(token, int) and isinstance(bias, (int, float))
            require(numbers and token >= 0 and not math.isnan(bias) and bias < math.inf, "logit_bias",
                    f"{token}={bias}", "a token id and a number (-inf forbids the token)")  # fmt: skip
        require(self.seed is None or 0 <= self.seed < 1 << 63, "seed", self.seed, "from 0 to 2**63 - 1")


def require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise OptionError(f"{name} is {value!r}, and must be {expected}")
