"""The naive way to run a model that is larger than the GPU: Transformers' Mixtral in bfloat16, its layers
placed by accelerate's `device_map`, which moves all experts of every layer that does not fit for every token.

    python -m dev.peers.accelerate [--shape mixtral-8x7b] [--layers 4] [--vram 12GiB] [--tokens 4] [--json]

Weights are random, and only some layers are made, because all of Mixtral-8x7B's would take 87 GiB of host
memory. Accelerate places all layers of the shape within the whole limit. The measured model has layers of
both kinds, resident and offloaded, in the same proportion (at least one of each). The time of a token of the
whole model is the sum of each kind's median over its layers, and of what is outside of layers.

cuDNN's attention is switched off: PyTorch prefers it on some GPUs, but it makes a plan for every length,
which means for every token, and would slow this down without need.

Without a GPU the same calls are made and nothing is moved, which checks this program and gives no figure.
"""

import argparse
import importlib.metadata
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from dev.peers.config import their_config
from model.config import ModelConfig
from model.shapes import SHAPES
from runtime.errors import DeviceError, MixtralError, OptionError
from runtime.planning.device import pick_device
from runtime.planning.memory import free_host_bytes
from runtime.shell.arguments import at_least_one, new_parser
from runtime.units import format_bytes, parse_bytes
from tools.bench.machine import machine
from tools.text import as_text

POOL = 1 << 24  # random numbers to fill weights with, because drawing all would take minutes
WARM_UP = 1  # tokens after the prompt that do not count

Place = int | str  # a device as accelerate names it: a GPU's number, or "cpu" for what is offloaded


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("dev.peers.accelerate", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="mixtral-8x7b")
    parser.add_argument("--layers", type=at_least_one, default=4, help="to measure (default: 4)")
    parser.add_argument("--vram", default="12GiB", help="limit for the whole model (default: 12GiB)")
    parser.add_argument("--prompt", type=at_least_one, default=8, help="tokens (default: 8)")
    parser.add_argument("--tokens", type=at_least_one, default=4, help="to decode after it (default: 4)")
    parser.add_argument("--device", help="(default: cuda if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what is meant to happen here
    try:
        with without_cudnn_attention():
            result = run(args)
    except (MixtralError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result, indent=2) if args.json else as_text(result))
    return 0


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Switch it off in the whole process, until this is left."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure. Raises `OptionError` or `DeviceError` if that is not possible."""
    try:
        versions = {name: importlib.metadata.version(name) for name in ("accelerate", "transformers")}
    except importlib.metadata.PackageNotFoundError as error:
        raise OptionError(f"{error.name} is not installed; pip install accelerate transformers") from None
    device, limit = pick_device(args.device), parse_bytes(args.vram)
    full = SHAPES[args.shape]
    count = min(args.layers, full.layers)
    model = empty_model(replace(full, layers=count))
    if (free := free_host_bytes()) is not None and free < weight_bytes(model):
        raise DeviceError(
            f"{count} layers take {format_bytes(weight_bytes(model))} of host memory, and "
            f"{format_bytes(free)} are free; make fewer --layers"
        )
    whole = empty_model(full)
    everywhere = place_layers(whole, limit)
    on_device = [everywhere[f"model.layers.{n}"] != "cpu" for n in range(full.layers)]
    resident = fewer(sum(on_device), full.layers, count)
    placed = {name: place for name, place in everywhere.items() if not name.startswith("model.layers.")}
    placed |= {f"model.layers.{n}": 0 if n < resident else "cpu" for n in range(count)}
    moved = sum(weight_bytes(module) for name, module in placeable(whole) if everywhere[name] == "cpu")
    fill(model)
    dispatch(model, placed, device)
    clock = measure(model, device, args.prompt, args.tokens)
    token = statistics.median(clock.tokens)
    kinds = clock.medians(resident)
    rest = token - sum(kinds[n < resident] for n in range(count))
    all_layers = rest + sum(kinds[kept] for kept in on_device)
    return {
        "benchmark": "accelerate",
        "machine": machine() | versions,
        "model": f"{args.shape}, {count} of {full.layers} layers, random, bfloat16",
        "kernels": {
            name: getattr(model.config, f"_{name}_implementation", None) for name in ("attn", "experts")
        },
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "device": str(device) if device.type == "cuda" else "cpu, where nothing is moved: not a figure",
        "limit_bytes": limit,
        "placement": f"accelerate's own for {full.layers} layers within the limit, {sum(on_device)} of them "
        f"on the device; measured with {resident} of {count}",
        "measured_ms_per_token": token * 1e3,
        "measured_tokens_per_s": 1 / token,
        "ms_per_layer_on_device": kinds[True] * 1e3 if resident else None,
        "ms_per_layer_offloaded": kinds[False] * 1e3 if resident < count else None,
        "ms_per_token_outside_layers": rest * 1e3,
        "bytes_moved_per_token": moved,
        "ms_per_token": all_layers * 1e3,
        "tokens_per_s": 1 / all_layers,
        "measured_peak_device_bytes": torch.cuda.max_memory_reserved(device)
        if device.type == "cuda"
        else None,
    }


def empty_model(config: ModelConfig) -> Any:
    """Transformers' model in bfloat16 without memory for its weights."""
    own_choices = MixtralConfig.from_dict(their_config(config).to_dict())  # of kernels, not the oracle's
    with torch.device("meta"):
        model: nn.Module = MixtralForCausalLM(own_choices)
        return model.to(torch.bfloat16).eval()


def weight_bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def placeable(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules that lie on one device as a whole: the layers, and everything beside them."""
    inside = [(f"model.{name}", module) for name, module in model.model.named_children() if name != "layers"]
    layers = [(f"model.layers.{n}", layer) for n, layer in enumerate(model.model.layers)]
    return [*inside, *layers, ("lm_head", model.lm_head)]


def place_layers(model: Any, limit: int) -> dict[str, Place]:
    """Where accelerate puts each part of a model, device 0 or "cpu", with `limit` bytes of device 0."""
    from accelerate import infer_auto_device_map

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of buffers, which are a few hundred bytes
        found = infer_auto_device_map(
            model,
            max_memory={0: limit, "cpu": 1 << 60},
            no_split_module_classes=model._no_split_modules,
        )
    return {name: look_up(found, name) for name, _ in placeable(model)}


def look_up(places: dict[str, Place], name: str) -> Place:
    """The place of a module. Accelerate names a parent if all its children are in one place.

    >>> look_up({"model.norm": 0, "model.layers": "cpu"}, "model.layers.3"), look_up({"": 0}, "lm_head")
    ('cpu', 0)
    """
    while name not in places:
        name = name.rpartition(".")[0]
    return places[name]


def fewer(resident: int, layers: int, count: int) -> int:
    """How many of `count` layers stand for `resident` of `layers`, with at least one of each kind.

    >>> fewer(3, 32, 4), fewer(30, 32, 4), fewer(16, 32, 4), fewer(0, 32, 4), fewer(32, 32, 1)
    (1, 3, 2, 0, 1)
    """
    if resident in (0, layers):
        return count if resident else 0
    if count < 2:
        raise OptionError(f"{resident} of {layers} layers fit the device; measure at least 2 --layers")
    return min(max(round(resident / layers * count), 1), count - 1)


@torch.no_grad()
def fill(model: Any) -> None:
    """Give all weights memory on the host: ones for norms, and random numbers that repeat for the rest."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    rotary = type(model.model.rotary_emb)
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary(model.config)  # its buffer is computed, and no weight
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.fill_(1)
        else:
            for part in weight.view(-1).split(POOL):
                part.copy_(pool[: len(part)])


def dispatch(model: Any, placed: dict[str, Place], device: torch.device) -> None:
    """Place the layers as `from_pretrained(device_map=...)` does after it has read the weights."""
    from accelerate import dispatch_model

    dispatch_model(
        model,
        {name: place if place == "cpu" else device for name, place in placed.items()},  # device is no string
        main_device=device,
        skip_keys=model._skip_keys_device_placement,
        force_hooks=True,
    )


@dataclass
class Clock:
    """Seconds of every token, and of each of its layers."""

    layers: list[list[float]]
    tokens: list[float] = field(default_factory=list)

    def medians(self, resident: int) -> dict[bool, float]:
        """Median seconds of a layer, by whether it is one of the first `resident`; 0 if there is none."""
        both = {True: self.layers[:resident], False: self.layers[resident:]}
        return {
            kind: statistics.median(taken for layer in layers for taken in layer) if layers else 0.0
            for kind, layers in both.items()
        }


@torch.no_grad()
def measure(model: Any, device: torch.device, prompt: int, tokens: int) -> Clock:
    """Decode greedily, one token after the other."""
    clock = Clock([[] for _ in model.model.layers])

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    for layer, taken in zip(model.model.layers, clock.layers, strict=True):
        layer.register_forward_pre_hook(lambda module, inputs, taken=taken: taken.append(-now()))

        def after(module: nn.Module, inputs: object, output: object, taken: list[float] = taken) -> None:
            taken[-1] += now()

        layer.register_forward_hook(after)

    ids: Tensor = torch.arange(prompt)[None].to(device) % model.config.vocab_size  # [1, P]
    past = None
    for _ in range(1 + WARM_UP + tokens):
        start = now()
        out = model(ids, past_key_values=past, use_cache=True)
        ids, past = out.logits[:, -1:].argmax(-1), out.past_key_values  # [1, 1]
        clock.tokens.append(now() - start)
    for taken in (clock.tokens, *clock.layers):
        del taken[: 1 + WARM_UP]
    return clock


if __name__ == "__main__":
    sys.exit(main())
