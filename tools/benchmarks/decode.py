"""Speed of a model: tokens per second of prompts and of decoding, against what memory bandwidth allows.

At batch 1 every new token reads the trunk's weights and its chosen experts' once, and hardly computes. So the
bytes to read over the bandwidth of memory, measured in turns with the model, is the time that no program can
beat.

Ids are random and the model is called as the engine calls it; the tokenizer and the sampler are left out.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, open_checkpoint
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.linear import PackedLinear
from model.mixtral import Mixtral
from model.moe import SparseMoE
from model.quant.expert import BlobExperts, ExpertFormat
from model.quant.linear import QuantisedLinear, scratch_bytes
from model.quant.spec import QuantSpec
from runtime.device import choose_device, choose_dtype
from runtime.setup import DEFAULT_CONTEXT
from runtime.errors import OptionError
from runtime.footprint import PREFILL_CHUNK, Plan
from runtime.loader import attention_bytes, load_resident
from runtime.memory import free_device_bytes
from runtime.options import DTYPES
from runtime.planner import count_weights, plan
from tools.benchmarks.load import at_least_one
from tools.random_model import SHAPES, random_model

BUFFER = 1 << 30  # bytes read to measure the bandwidth: several times any cache
DISTINCT = 2  # experts of a random model; the others are copies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("model", type=Path, nargs="?", help="a checkpoint folder")
    source.add_argument("--shape", choices=SHAPES, help="a model of random weights, made in memory")
    parser.add_argument("--layers", type=at_least_one, help="of the random model (default: the shape's)")
    parser.add_argument(
        "--attention", metavar="FORMAT", help="of the random model, like 4 or 3g128 (default: 4)"
    )
    parser.add_argument("--experts", metavar="FORMAT", help="of the random model (default: 4)")
    parser.add_argument("--prompt", type=at_least_one, default=128, help="tokens (default: 128)")
    parser.add_argument("--tokens", type=at_least_one, default=32, help="to decode after it (default: 32)")
    parser.add_argument(
        "--repeats", type=at_least_one, default=5, help="the median of these counts (default: 5)"
    )
    parser.add_argument("--threads", type=at_least_one, help="(default: as PyTorch chooses)")
    parser.add_argument("--device", help="(default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: by device)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, printing a line per repeat on stderr. Returns all figures.

    Raises `OptionError`, `DeviceError` or `ModelError` before anything is loaded or made.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        model, planned, report = make_model(args)
        return report | measure(model, planned, args.prompt, args.tokens, args.repeats)
    finally:
        torch.set_num_threads(before)


def make_model(args: argparse.Namespace) -> tuple[Mixtral, Plan, dict[str, Any]]:
    """The model that the command line describes, with the engine's plan for it, and what to say of it."""
    checkpoint: Checkpoint | None = None
    if args.shape:
        config = SHAPES[args.shape]
        config = dataclasses.replace(config, layers=args.layers or config.layers)
        formats = QuantSpec.parse(args.attention or "4"), QuantSpec.parse(args.experts or "4")
        layers = f"{config.layers} layer{'s' * (config.layers > 1)}"
        about = f"{args.shape}, {layers}, random, attention {formats[0]}, experts {formats[1]}"
    else:
        for name in ("layers", "attention", "experts"):
            if getattr(args, name) is not None:
                raise OptionError(f"--{name} is for a random model; a checkpoint has its own")
        checkpoint = open_checkpoint(args.model)
        config, formats = checkpoint.config, (checkpoint.attention, checkpoint.experts)
        about = checkpoint.description
    count = args.prompt + args.tokens
    if count > config.context:
        raise OptionError(
            f"--prompt {args.prompt} and --tokens {args.tokens} are {count} tokens, "
            f"and this model was made for {config.context}"
        )
    device = choose_device(args.device)
    quantised = any(spec.quantised for spec in formats)
    dtype = choose_dtype(args.dtype, device, sum(count_weights(config)), quantised)
    form = ExpertFormat.choose(config, formats[1], dtype, device)
    free = free_device_bytes(device)
    planned = plan(
        config,
        dtype,
        max(count, min(DEFAULT_CONTEXT, config.context)),
        attention_bytes(config, formats[0], dtype, device),
        form.blob_bytes,
        scratch_bytes(device, max(config.hidden, config.ffn)) if quantised else 0,
        budget=None if free is None else max(free - BUFFER, 0),
        shared=device.type == "cpu",
        offload="never",
        place=f"memory on {device}",
    )
    if checkpoint:
        model = load_resident(checkpoint, form, dtype, device)
    else:
        model = random_model(config, *formats, dtype, device, distinct=DISTINCT)
    return (
        model,
        planned,
        {
            "model": about,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "threads": torch.get_num_threads(),
        },
    )


def measure(model: Mixtral, planned: Plan, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians and best of `repeats`, in each of which memory, a prompt and its continuation take turns."""
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    cache = KVCache.allocate(model.config, 1, planned.context, dtype, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab, (1, prompt + tokens), generator=generator).to(device)
    buffer = torch.ones(BUFFER // 8, dtype=torch.int64, device=device)  # zeros might take no memory
    forward(model, ids[:, : min(prompt, planned.chunk)], cache)  # first calls make what later ones re-use
    forward(model, ids[:, -1:], cache)
    prompt_rates, decode_rates, bandwidths = [], [], []
    for repeat in range(repeats):
        bandwidths.append(buffer.nbytes / seconds(lambda: int(buffer.sum())))
        cache.truncate(0)
        prompt_rates.append(prompt / seconds(lambda: forward(model, ids[:, :prompt], cache, planned.chunk)))
        decode_rates.append(tokens / seconds(lambda: decode(model, ids[:, prompt:], cache)))
        print(
            f"{repeat + 1} of {repeats}: prompt {prompt_rates[-1]:,.1f} tokens/s, "
            f"decode {decode_rates[-1]:,.2f} tokens/s, memory {bandwidths[-1] / 1e9:.1f} GB/s",
            file=sys.stderr,
        )
    size = bytes_per_token(model)
    bound = statistics.median(bandwidths) / size
    return {
        "prompt": {"tokens": prompt} | rates(prompt_rates),
        "decode": {"tokens": tokens} | rates(decode_rates),
        "memory": {
            "weight_bytes_per_token": size,
            "bandwidth_bytes_per_s": statistics.median(bandwidths),
            "best_bandwidth_bytes_per_s": max(bandwidths),
            "bound_tokens_per_s": bound,
            "decode_share_of_bound": statistics.median(decode_rates) / bound,
        },
    }


def rates(values: list[float]) -> dict[str, float]:
    return {"tokens_per_s": statistics.median(values), "best_tokens_per_s": max(values)}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forward(model: Mixtral, ids: Tensor, cache: KVCache, chunk: int = PREFILL_CHUNK) -> int:  # ids [1, T]
    """What the engine does with ids, and the likeliest next one: who has it has waited for the device."""
    with torch.inference_mode():
        for part in ids.split(chunk, dim=1):
            logits = model(part, cache, last=True)  # [1, 1, V]
        return int(logits[0, 0].float().argmax())


def decode(model: Mixtral, ids: Tensor, cache: KVCache) -> None:  # ids [1, T]
    """One id after the other, each after the answer to the last."""
    for one in ids.split(1, dim=1):
        forward(model, one, cache)


def bytes_per_token(model: Mixtral) -> int:
    """Bytes of weights that decoding one token reads, as they are kept in memory: of the embeddings one row,
    of the experts the chosen ones."""
    embeddings = model.embed_tokens.weight
    size = embeddings[0].nbytes - embeddings.nbytes
    for name, parameter in model.named_parameters():
        size += 0 if ".experts." in name else parameter.nbytes
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            size += sum(tensor.nbytes for tensor in module.memory.values())
        elif isinstance(module, PackedLinear):
            size += module.packed.numel() * module.packed.element_size()
        elif isinstance(module, SparseMoE):
            size += model.config.experts_per_token * expert_bytes(module, model.config)
    return size


def expert_bytes(module: SparseMoE, config: ModelConfig) -> int:
    if isinstance(module.experts, BlobExperts):
        return module.experts.blobs[0].nbytes
    parameters = (parameter for name, parameter in module.named_parameters() if name != "gate.weight")
    return sum(parameter.nbytes for parameter in parameters) // config.experts
